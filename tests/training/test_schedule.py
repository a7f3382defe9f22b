"""The learning rate against the published schedule, and the arithmetic of epochs."""

import pytest

from fastpix2pix.config import train_config
from fastpix2pix.training import schedule


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(1, 2e-4), (100, 2e-4), (101, 2e-4 * 100 / 101), (150, 2e-4 * 51 / 101), (200, 2e-4 / 101)],
)
def test_linear_rate_of_200_epochs(epoch, rate):
    assert schedule.rate(train_config(), epoch - 1) == pytest.approx(rate, rel=1e-12)


def test_rates_as_published_to_four_digits():
    config = train_config()
    assert f"{schedule.rate(config, 100):.3e}" == "1.980e-04"
    assert f"{schedule.rate(config, 199):.2e}" == "1.98e-06"


def test_constant_rate_never_changes():
    config = train_config(schedule="constant")
    assert {schedule.rate(config, e) for e in range(200)} == {2e-4}


def test_rate_stays_positive_beyond_the_last_epoch():
    # the sampler wraps, so the last batch may begin an epoch more than there are
    assert schedule.rate(train_config(), 200) > 0


@pytest.mark.parametrize(
    ("pairs", "options", "steps"),
    [
        (400, {"epochs": 10}, 4000),
        (5, {"epochs": 3, "batch": 2}, 8),  # 15 items: the eighth batch wraps
        (1, {"epochs": 1, "batch": 4}, 1),  # fewer pairs than a batch
        (400, {"epochs": 10, "max_steps": 7}, 7),
    ],
)
def test_total_steps(pairs, options, steps):
    assert schedule.total_steps(train_config(**options), pairs) == steps


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_steps": 400}, "before its decay begins"),
        ({"max_steps": 400 * 150}, "inside its decay"),
        ({"max_steps": 400, "schedule": "constant"}, None),
        ({"max_steps": 400 * 200}, None),
        ({}, None),
    ],
)
def test_warns_where_the_decay_is_never_finished(options, says):
    found = schedule.warnings(train_config(**options), 400)
    assert (len(found) == 1 and says in found[0]) if says else found == []

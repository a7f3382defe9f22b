"""What a comparison reports: times of what is right, the reason of what is wrong, and a ratio that can be trusted."""

from __future__ import annotations

import random

import pytest
import torch

from bench.baselines import CompiledStep, StandardStep, plain_translate
from bench.comparison import PARTS, Comparison, all_comparisons, measure, planted, require_close, rounds_within
from bench.comparisons import loader
from bench.comparisons.steps import _require_same
from bench.devices import bench_setting
from bench.report import Mismatch, Skipped
from bench.roofline import Device
from bench.timing import Ratio, rotating
from fastpix2pix.model import Unet
from fastpix2pix.training.module_step import ModuleStep

CPU = torch.device("cpu")
AT = bench_setting(CPU, "smoke")
PEAKS = Device("one", 1e-3, 1e-3, 1, "made up")


def busy(microseconds: int):
    return lambda: torch.cumsum(torch.ones(microseconds * 100), 0)


def comparison(**ways) -> Comparison:
    return Comparison("kernels", "sum", ways, "ours", "plain", images=2, floor_ms=lambda peaks: peaks.tflops)


def test_a_row_has_times_ratios_and_the_floor():
    row = measure(comparison(ours=lambda: busy(100), plain=lambda: busy(400)), AT._replace(rounds=9), PEAKS)
    assert (row["status"], row["reason"], row["floor_ms"]) == ("ok", "", 1e-3)
    ours, plain = row["ways"]["ours"], row["ways"]["plain"]
    assert ours["ratio"]["low"] <= ours["ratio"]["median"] <= ours["ratio"]["high"]
    assert ours["ratio"]["median"] < 0.9 and plain["ratio"]["median"] == 1
    assert ours["images_per_s"] == pytest.approx(2000 / ours["ms"])


@pytest.mark.parametrize("wrong", ["ours", "plain"])
@pytest.mark.parametrize(
    ("error", "status"),
    [(Mismatch("off by 3"), "failed"), (RuntimeError("boom"), "failed"), (Skipped("none"), "skipped")],
)
def test_what_is_wrong_or_missing_is_not_timed(wrong, error, status):
    def broken():
        raise error

    called = []
    ways = {name: (lambda: lambda: called.append(1)) for name in ("ours", "plain", "third")}
    row = measure(comparison(**(ways | {wrong: broken})), AT, PEAKS)
    assert row["status"] == status and wrong in row["reason"] and str(error) in row["reason"]
    assert called == [] and not any("ms" in way for way in row["ways"].values())


def test_another_way_that_fails_stands_back():
    def broken():
        raise Mismatch("off by 3")

    row = measure(comparison(ours=lambda: busy(10), plain=lambda: busy(10), third=broken), AT, None)
    assert row["status"] == "ok" and row["floor_ms"] is None
    assert "off by 3" in row["ways"]["third"]["failed"]


def test_slow_ways_are_left_out_with_their_reason():
    ways = {"ours": lambda: busy(10), "plain": lambda: busy(10), "third": lambda: busy(10)}
    slow = Comparison("kernels", "sum", ways, "ours", "plain", slow=frozenset({"third"}))
    assert "--compile" in measure(slow, AT, None, slow=False)["ways"]["third"]["skipped"]
    assert "ms" in measure(slow, AT, None, slow=True)["ways"]["third"]


def test_a_planted_slow_down_shows():
    pair = comparison(ours=lambda: busy(300), plain=lambda: busy(300))
    at = AT._replace(rounds=15)
    assert measure(pair, at, None, plant=3)["ways"]["ours"]["ratio"]["median"] > 2
    calls = []
    planted(lambda: calls.append(1), 3)()
    assert len(calls) == 3


def test_ratio_cancels_what_both_meet():
    """Rounds that are up to ten times as slow for both: the ratio stays."""
    draws = random.Random(1)
    weather = [draws.uniform(1, 10) for _ in range(25)]
    ours = [2.0 * w * draws.uniform(0.97, 1.03) for w in weather]
    theirs = [1.0 * w * draws.uniform(0.97, 1.03) for w in weather]
    ratio = Ratio.of(ours, theirs)
    assert 1.94 < ratio.low <= ratio.median <= ratio.high < 2.06


@pytest.mark.parametrize(("rounds", "rank"), [(5, 0), (8, 0), (15, 2), (25, 5)])
def test_interval_of_the_median_is_between_order_statistics(rounds, rank):
    """Ranks from tables of the sign test at 99 %: of 15 the 3rd, of 25 the 6th smallest and largest."""
    ratio = Ratio.of([float(i) for i in range(rounds)], [1.0] * rounds)
    assert (ratio.low, ratio.high) == (rank, rounds - 1 - rank)


def test_interval_holds_the_median_as_often_as_it_says():
    draws = random.Random(0)
    held = 0
    for _ in range(2000):
        ratio = Ratio.of([draws.lognormvariate(0, 0.5) for _ in range(15)], [1.0] * 15)
        held += ratio.low <= 1.0 <= ratio.high
    assert held / 2000 > 0.985


def test_rotating_takes_other_memory_each_time():
    numbers = iter(range(9))
    seen = []

    def make():
        number = next(numbers)
        return lambda: seen.append(number)

    run = rotating(make, 3)
    for _ in range(7):
        run()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_rounds_fit_the_time():
    at = AT._replace(rounds=100, sample_s=0.1)
    assert rounds_within([lambda: None, lambda: None], at, 4.0) == 20
    assert rounds_within([lambda: None], at, 1e9) == 100 and rounds_within([lambda: None], at, 0.0) == 5


def test_require_close():
    a = torch.linspace(-2, 2, 9)
    require_close("a", [a, a], [a * (1 + 1e-5), a], 1e-4)
    for wrong in (a * 1.01, a + torch.tensor([0.0] * 8 + [float("nan")]), a[:8]):
        with pytest.raises(Mismatch, match=r"a \[0\]"):
            require_close("a", wrong, a, 1e-4)


def test_every_part_has_comparisons_with_names_of_their_own():
    found = list(all_comparisons(AT, PARTS))
    names = [c.what for c in found]
    assert {c.part for c in found} == set(PARTS) and len(names) == len(set(names))
    for c in found:
        assert {c.ours, c.baseline} <= set(c.ways) and c.ours != c.baseline and c.slow <= set(c.ways)


def build(kind, precision="fp32", **more):
    def made(**options):
        config = AT.config(2, precision=precision, **options)
        return kind(config, CPU, **more)

    return made


@pytest.mark.parametrize(
    ("kind", "precision", "more", "nchw"),
    [
        (StandardStep, "fp32", {"read": True}, True),
        (StandardStep, "fp32", {"read": False, "channels_last": True}, False),
        (StandardStep, "bf16", {"read": False, "channels_last": True}, False),
        (CompiledStep, "fp32", {"backend": "eager"}, False),
        (ModuleStep, "bf16", {}, False),
    ],
)
def test_baselines_compute_the_losses_of_the_plain_step(kind, precision, more, nchw):
    _require_same(AT, 2, build(kind, precision, **more), precision, nchw)


class Hasty(StandardStep):
    """Thirty times the rate."""

    def step(self, x, y, number, lr):
        return super().step(x, y, number, 30 * lr)


def test_a_baseline_that_trains_otherwise_is_found():
    with pytest.raises(Mismatch, match="losses of the"):
        _require_same(AT, 2, build(Hasty, read=False), "fp32", True)


@pytest.mark.parametrize("statistics", ["image", "running"])
def test_plain_translation_is_the_generators(statistics):
    from fastpix2pix.config import Modes

    torch.manual_seed(0)
    net = Unet(AT.config(1).generator)
    net(torch.rand(4, 3, 64, 64) * 2 - 1)  # running statistics
    net.eval()
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        wanted = net(x, Modes(norm_stats=statistics))
    torch.testing.assert_close(plain_translate(net, statistics, CPU)(x), wanted, atol=1e-5, rtol=1e-4)


def test_scales():
    full, short = bench_setting(CPU, "full"), bench_setting(CPU, "short")
    assert full.config(1).generator.ngf > short.config(1).generator.ngf > AT.config(1).generator.ngf
    assert {full.scale, short.scale, AT.scale} == {"full", "short", "smoke"}


@pytest.mark.parametrize("batch", [1, 4, 32, 64])
def test_a_measurement_of_a_loader_loads_something(batch):
    assert loader._calls(batch) * batch >= max(batch, loader.CHUNK // 2)

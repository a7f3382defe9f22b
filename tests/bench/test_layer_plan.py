"""The plan of every layer: complete, no better than possible, and the committed one is of this code."""

from pathlib import Path

import pytest

from bench.layer_plan import Row, main, rows, table
from bench.roofline import DEVICES
from fastpix2pix.config import train_config

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "layer_plan.md"
DEVICE_NAMES = ("A100", "H200")


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return list(rows(train_config(step="explicit", device="cpu"), 1, DEVICES["A100"]))


def test_every_product_of_both_networks_is_planned(found):
    products = {product: {row.layer for row in found if row.product == product} for product in ("forward", "dgrad", "wgrad")}  # fmt: skip  # noqa: E501
    assert len(products["forward"]) == len(products["wgrad"]) == 21
    assert products["forward"] - products["dgrad"] == {"generator.down.0"}  # nobody wants the image's gradient


@pytest.mark.parametrize("name", DEVICES)
def test_nothing_is_predicted_below_its_floor(found, name):
    for row in found:
        assert row.predicted_us(DEVICES[name]) >= row.floor.floor_us(DEVICES[name]) * 0.999, row[:3]
        assert row.bytes >= row.floor.bytes, row[:3]


def test_splits_are_paid_for(found):
    for row in found:
        assert (len(row.launches) > 1) == (row.plan.splits > 1)
        kernel = "_conv_wgrad_kernel" if row.product == "wgrad" else "_conv_kernel"
        assert [launch.kernel for launch in row.launches] == [kernel, *["_sum_splits_kernel"] * (row.plan.splits > 1)]


@pytest.mark.parametrize("name", DEVICE_NAMES)
def test_committed_tables_are_of_this_code(name):
    text = table(train_config(step="explicit", device="cpu"), 1, DEVICES[name])
    assert text in DOCUMENT.read_text(encoding="utf-8"), "run the command at the head of docs/layer_plan.md"


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--device", "TPU"], "'TPU': allowed are A100"), (["--batch", "one"], "batch one: whole numbers")],
)
def test_refusals(options, reason, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert reason in capsys.readouterr().err

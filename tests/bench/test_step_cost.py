"""The table of launches and bytes: what it says must hold for the fused step to be worth it."""

from pathlib import Path

import pytest

from bench.step_cost import STEPS, cost

DOC = Path(__file__).resolve().parents[2] / "docs" / "step_cost.md"


@pytest.fixture(scope="module")
def costs() -> dict:
    return {name: cost(options, 1) for name, options in STEPS.items() if "plain kernels" not in name}


def test_fused_step_launches_little_more_than_half(costs):
    fused, modules = costs["explicit, bf16, Triton kernels"], costs["modules, bf16 autocast"]
    assert fused.triton > 50
    assert fused.aten + fused.triton < 0.6 * modules.aten


def test_own_convolutions_launch_less_of_the_library(costs):
    own, library = costs["the same, own convolutions"], costs["explicit, bf16, Triton kernels"]
    assert own.aten < 0.5 * library.aten and own.triton > library.triton


def test_own_convolutions_spare_bytes_of_larger_batches():
    own, library = (cost(STEPS[n], 64) for n in ("the same, own convolutions", "explicit, bf16, Triton kernels"))
    assert own.megabytes < 0.9 * library.megabytes


def test_gradients_of_the_library_are_not_copied(costs):
    """A copy of each would read and write 229 MB; without, no more is moved than `python -m bench.roofline` allows for
    feature maps, kernels and the update, taps included that are not updated here."""
    assert costs["explicit, bf16, Triton kernels"].megabytes < 190 + 226 + 1730


def test_bytes_are_bounded_below_by_weights_and_optimiser(costs):
    parameters = 54_413_955 + 2_768_705
    for name, found in costs.items():
        assert found.megabytes > parameters * 28 / 1e6, name  # p, m, v, read and written, and a gradient


def test_document_is_of_this_code(costs):
    text = DOC.read_text()
    for name, found in costs.items():
        assert f"| {name} | {found.aten} | {found.triton} | {found.megabytes:,.0f} |" in text

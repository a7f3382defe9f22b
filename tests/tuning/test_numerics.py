"""A right plan passes, a wrong kernel does not."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpix2pix.kernels import operands
from fastpix2pix.kernels._triton import jit, tl
from fastpix2pix.kernels.conv import Norm, conv
from fastpix2pix.kernels.conv_plan import ConvPlan
from fastpix2pix.kernels.geometry import Geometry, Map, Source
from fastpix2pix.kernels.rows import Statistics
from fastpix2pix.kernels.wgrad_plan import WgradPlan
from fastpix2pix.tuning import numerics
from fastpix2pix.tuning.numerics import dgrad_error, exact_fp32, excess, forward_error, wgrad_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DOWN, SIZE = Geometry(4, 2, 1), Map(2, 6, 6)
WHOLE, SPLIT = ConvPlan(16, 16, 16, 1, 1, 1, 2), ConvPlan(16, 16, 16, 2, 1, 1, 2)
WGRAD = WgradPlan(16, 16, 16, 1, 1, 2)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def source() -> Source:
    return Source(rand(SIZE.rows, 16), "leaky", 1 + 0.1 * rand(2, 16), rand(2, 16))


def kernel() -> torch.Tensor:
    return (0.1 * rand(16, 16, 4, 4)).to(memory_format=torch.channels_last)


def norm() -> Norm:
    statistics = Statistics(rand(2, 16), 1 + rand(2, 16).abs())
    return Norm(rand(SIZE.rows, 16), rand(16), rand(16), statistics, "leaky")


@pytest.mark.parametrize("plan", [WHOLE, SPLIT], ids=["whole", "split"])
def test_right_plans_pass(plan):
    assert forward_error([source()], kernel(), DOWN, SIZE, 2, True, plan) == ""
    assert dgrad_error(rand(18, 16), kernel(), DOWN, SIZE, norm(), 2, plan) == ""


def test_a_right_wgrad_passes():
    assert wgrad_error([source()], rand(18, 16), kernel(), DOWN, SIZE, WGRAD) == ""


@jit
def unmasked(shift, ok):
    return shift.to(tl.float32)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="replaces a function that the interpreter calls")
def test_wrong_borders_are_found(monkeypatch):
    monkeypatch.setattr(operands, "padded", unmasked)
    assert "y is off" in forward_error([source()], kernel(), DOWN, SIZE, 2, False, WHOLE)
    assert "sum over rows is off" in wgrad_error([source()], rand(18, 16), kernel(), DOWN, SIZE, WGRAD)


def test_what_is_not_the_same_twice_is_found(monkeypatch):
    """By as little as the last bit of one number."""
    times = iter([0.0, 1e-7])

    def unsteady(sources, w, geometry, size, y, *, impl, **options):
        product = conv(sources, w, geometry, size, y, impl=impl, **options)
        if impl == "triton":
            y[0, 0] += y[0, 0].abs() * next(times)
        return product

    monkeypatch.setattr(numerics, "conv", unsteady)
    assert forward_error([source()], kernel(), DOWN, SIZE, 2, False, WHOLE) == "y is not the same twice"


def test_excess():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert excess(exact, exact, exact) == 0
    assert excess(exact + 2e-3, exact + 1e-3, exact) == pytest.approx(1, rel=0.01)
    assert excess(exact + 3e-3, exact + 1e-3, exact) > 1
    assert not excess(torch.tensor([float("nan"), 2.0]), exact, exact) <= 1


def test_excess_by_rule():
    """Of an error beside a number that plain torch has right, and others that it has not."""
    exact = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    same = exact + 1e-3 * torch.tensor([0.0, 1.0, 1.0, 4.0])
    fast = exact + 1e-3 * torch.tensor([2.0, 0.0, 0.0, 0.0])
    assert excess(fast, same, exact, by="each") > 100
    assert excess(fast, same, exact, by="typical") == pytest.approx(1 / math.sqrt(18 / 4), rel=0.01)
    assert excess(fast, same, exact, by="largest") == pytest.approx(1 / 4, rel=0.01)


class Widest(TorchDispatchMode):
    """Collects how many float64 numbers the tensors have that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.counts.append(out.numel())
        return out


@pytest.mark.parametrize("by", ["each", "typical", "largest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("at", [0, 500, 1000])
def test_excess_in_parts_is_excess(monkeypatch, dtype, by, at):
    """Wherever the largest error, the largest value or a NaN lies; in float64 there is never more than a part."""
    exact = rand(1001)
    same, fast = (exact.to(dtype, copy=True) for _ in range(2))
    exact[-1 - at], fast[at] = 9.0, fast[at] + 1
    whole = excess(fast, same, exact, by=by)
    monkeypatch.setattr(numerics, "CHUNK", 100)
    with Widest() as widest:
        assert excess(fast, same, exact, by=by) == whole > 0
    assert max(widest.counts) == 100
    fast[at] = torch.nan
    assert not excess(fast, same, exact, by=by) <= 1


@pytest.mark.parametrize(("off", "right"), [(1e-5, True), (1e-3, False)])
def test_excess_allows_what_tensor_cores_cut_off(off, right):
    """Beside sums near 0, where a half result has hardly a rounding to hide it in."""
    exact = torch.tensor([1e-6, 1.0], dtype=torch.float64)
    fast = torch.tensor([1e-6 + off, 1.0]).bfloat16()
    assert (excess(fast, exact.bfloat16(), exact) <= 1) == right


@pytest.mark.parametrize("search", [False, True])
def test_exact_fp32_gives_the_library_its_ways_back(monkeypatch, search):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", search)
    before = cudnn.allow_tf32, cudnn.benchmark
    with exact_fp32():
        assert (cudnn.allow_tf32, cudnn.benchmark) == (False, False)
    assert (cudnn.allow_tf32, cudnn.benchmark) == before

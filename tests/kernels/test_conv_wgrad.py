"""Kernel gradients against float64: every geometry, thin and odd channels, prologues, splits, the arena's memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpix2pix.kernels import conv_wgrad as module
from fastpix2pix.kernels import operands
from fastpix2pix.kernels._triton import jit, tl
from fastpix2pix.kernels.conv_wgrad import conv_wgrad
from fastpix2pix.kernels.dispatch import NotSupported, recorded
from fastpix2pix.kernels.geometry import Geometry, Map, Source
from fastpix2pix.kernels.split import sum_splits
from fastpix2pix.kernels.wgrad_plan import WgradPlan, roles_of, wgrad_candidates, wgrad_plan
from tests.kernels.common import DEVICE, DTYPES, interpreter, needs_triton, normal

HALF, DOUBLE, SAME = Geometry(4, 2, 1), Geometry(4, 2, 1, transposed=True), Geometry(4, 1, 1)


def run(impl, sources, g, geometry, size, dtype, **options) -> Tensor:
    """The gradient, from the middle of an arena whose other numbers must stay NaN."""
    channels, k = sum(source.rows.shape[1] for source in sources), geometry.kernel
    d0, d1 = (channels, g.shape[1]) if geometry.transposed else (g.shape[1], channels)
    arena = torch.full((d0 * d1 * k * k + 128,), math.nan, dtype=dtype, device=DEVICE)
    dw = arena.as_strided((d0, d1, k, k), (k * k * d1, 1, k * d1, d1), 64)
    if options.get("accumulate"):
        dw.fill_(1.0)
    conv_wgrad(sources, g, dw, geometry, size, impl=impl, **options)
    found = dw.clone()
    dw.fill_(math.nan)
    assert arena.isnan().all()
    return found


def double(source: Source) -> Source:
    return Source(*(v.double() if isinstance(v, Tensor) else v for v in source))


def excess(geometry, images, height, width, inputs, outputs, dtype, plan=None, affine=0, out=None, **options) -> float:
    """How far the kernel leaves the two-error rule: > 0 is wrong. |fast - f64| <= 2 |reference - f64| + a rounding.

    bf16 in the interpreter, which cuts off where hardware rounds, may be one more rounding of every operand away.
    """
    size, activations = Map(images, height, width), ("leaky", "relu")
    sources = []
    for i, channels in enumerate(inputs):
        vectors = normal(2, affine, channels, seed=10 + i).unbind() if affine else (None, None)
        wider = normal(size.rows, channels + 3, seed=20 + i).to(dtype)
        sources.append(Source(wider[:, :channels], activations[i], *vectors))
    g = normal(images * geometry.output(height) * geometry.output(width), outputs, seed=5).to(dtype)
    arguments = (geometry, size, out or dtype)
    fast = run("triton", sources, g, *arguments, plan=plan, **options)
    same = run("reference", sources, g, *arguments, **options)
    exact = run("reference", [double(s) for s in sources], g.double(), geometry, size, torch.float64, **options)
    cut = dtype == torch.bfloat16 and DEVICE == "cpu"
    rounding = (4 * torch.finfo(dtype).eps if cut else 2**-20) * exact.abs().max().item()
    error, allowed = ((v.double() - exact).abs().max().item() for v in (fast, same))
    found = error - 2 * allowed - rounding
    return math.inf if math.isnan(found) else found


SHAPES = [  # geometry, images, height, width, inputs, outputs, why
    (HALF, 1, 8, 8, (3,), 64, "e1: RGB, taps and channels are columns"),
    (HALF, 2, 6, 4, (6,), 20, "c1: both images, a map that is not square"),
    (HALF, 1, 4, 4, (20,), 18, "no channel count divides a block"),
    (HALF, 3, 2, 2, (16,), 20, "e8: one pixel of each of three images"),
    (HALF, 2, 7, 5, (17,), 9, "odd sizes"),
    (SAME, 2, 5, 5, (32,), 1, "c5: one channel comes out"),
    (SAME, 1, 4, 4, (2,), 4, "two channels to four"),
    (SAME, 1, 7, 6, (16,), 16, "c4: no power of two"),
    (Geometry(1, 1, 0), 2, 3, 5, (6,), 24, "a pixel discriminator"),
    (Geometry(3, 1, 1), 1, 4, 4, (24,), 12, "3x3"),
    (DOUBLE, 1, 1, 1, (32,), 16, "d8: one row in all"),
    (DOUBLE, 3, 1, 2, (20, 12), 14, "d7: two sources"),
    (DOUBLE, 1, 6, 5, (32, 32), 3, "d1: RGB comes out"),
]


HALVES = ("e1", "e8", "c5", "d8", "d1")  # shapes that half types are tried on: each way to load and store
TYPED = [(*shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype == DTYPES[0] or shape[-1].startswith(HALVES)]


@needs_triton
@pytest.mark.parametrize(("geometry", "images", "height", "width", "inputs", "outputs", "why", "dtype"), TYPED)
def test_against_float64(geometry, images, height, width, inputs, outputs, why, dtype):
    shape = (geometry, images, height, width, inputs, outputs, dtype)
    assert excess(*shape, affine=1, accumulate=True) <= 0
    small = WgradPlan(32, 16, 16, 2, 4, 2)  # more splits than some have rows
    assert excess(*shape, affine=images, plan=small, out=torch.float32) <= 0
    if dtype == torch.float32:
        assert excess(*shape) <= 0
        assert excess(*shape, plan=small, accumulate=True) <= 0
        assert excess(*shape, plan=small._replace(splits=3)) <= 0  # no power of two


@needs_triton
def test_taps_without_a_pixel_have_no_gradient():
    x = [Source(torch.full((4, 16), math.inf, device=DEVICE))]  # inf * 0 would be NaN
    g = normal(1, 32)
    dw = run("triton", x, g, HALF, Map(1, 2, 2), torch.float32)
    outer = torch.ones(4, 4, dtype=torch.bool)
    outer[1:3, 1:3] = False
    assert (dw[:, :, outer] == 0).all()
    assert dw[:, :, ~outer].isinf().all()


@jit
def _leaks(shift, inside):
    return shift.to(tl.float32)


@interpreter
def test_comparison_sees_a_shift_outside_the_map(monkeypatch):
    shape = (HALF, 1, 4, 4, (16,), 16, torch.float32)
    assert excess(*shape, affine=1) <= 0
    monkeypatch.setattr(operands, "padded", _leaks)
    assert excess(*shape, affine=1) > 0


@interpreter
def test_comparison_sees_a_split_left_out(monkeypatch):
    shape = (HALF, 2, 8, 8, (16,), 16, torch.float32)
    plan = WgradPlan(16, 16, 16, 2, 4, 2)
    assert excess(*shape, plan=plan) <= 0
    monkeypatch.setattr(module, "sum_splits", lambda parts, out, **options: sum_splits(parts[:1], out, **options))
    assert excess(*shape, plan=plan) > 0


@needs_triton
def test_launches_and_bytes():
    size, x, g = Map(1, 4, 4), normal(16, 64).half(), normal(4, 32).half()
    with recorded() as tape:
        run("triton", [Source(x)], g, HALF, size, torch.float16)
    (entry,) = tape
    assert (entry.kernel, entry.read, entry.written) == ("_conv_wgrad_kernel", 2 * (16 * 64 + 4 * 32), 2 * 16 * 64 * 32)
    with recorded() as tape:
        run("triton", [Source(x)], g, HALF, size, torch.float16, plan=WgradPlan(32, 32, 16, 2, 4, 2))
    assert [(entry.kernel, entry.written) for entry in tape] == [
        ("_conv_wgrad_kernel", 2 * 4 * 16 * 64 * 32),
        ("_sum_splits_kernel", 2 * 16 * 64 * 32),
    ]


LAYERS = [  # geometry, images, side, kernel, splits, why
    (HALF, 1, 256, (64, 3), 128, "e1: one tile of channels, all programs from rows"),
    (HALF, 1, 4, (512, 512), 1, "e7: write-bound, straight into the arena"),
    (DOUBLE, 1, 8, (1024, 512), 1, "d5 likewise"),
    (HALF, 64, 128, (128, 64), 16, "e2 at batch 64: eight tiles"),
    (SAME, 64, 31, (1, 512), 64, "c5: four tiles of channels"),
]


@pytest.mark.parametrize(("geometry", "images", "side", "kernel", "splits", "why"), LAYERS)
def test_plans_of_real_layers(geometry, images, side, kernel, splits, why):
    size, shape = Map(images, side, side), (*kernel, 4, 4)
    plans = wgrad_candidates(geometry, size, shape, 132)
    assert plans[0] == wgrad_plan(geometry, size, shape, 132)
    assert 1 <= len(plans) <= 4
    assert plans[0].splits == splits


def test_splits_fill_the_waves_of_the_gpu_at_hand():
    geometry, size, shape = SAME, Map(128, 32, 32), (512, 256, 4, 4)  # c4 at batch 64: 128 tiles
    a100, h100 = (wgrad_candidates(geometry, size, shape, processors) for processors in (108, 132))
    assert [plan.splits for plan in (a100[0], a100[-1], h100[0])] == [5, 1, 1]
    assert a100[0].programs(roles_of(geometry, size, shape)) / 108 == pytest.approx(6, rel=0.02)
    few = HALF, Map(64, 256, 256), (64, 3, 4, 4)
    assert wgrad_plan(*few, processors=108) == wgrad_plan(*few, processors=132)  # bound by memory
    small = HALF, Map(1, 8, 8), (512, 512, 4, 4)
    assert wgrad_plan(*small, processors=108) == wgrad_plan(*small, processors=132)  # too few rows to split


@needs_triton
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_splits(accumulate, dtype):
    parts = normal(5, 70, 33)
    whole = torch.full((72, 40), math.nan, device=DEVICE, dtype=dtype)
    results = []
    for impl in ("triton", "reference"):
        out = whole.clone()[1:-1, 3:36]
        out.fill_(1.0)
        sum_splits(parts, out, accumulate=accumulate, impl=impl)
        results.append(out)
    ulp = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(*results, rtol=2e-6 + ulp, atol=2e-6)
    with pytest.raises(NotSupported, match=r"\(5, 70, 33\).*contiguous fp32 needed"):
        sum_splits(parts.half(), whole[1:-1, 3:36], impl="triton")
    with pytest.raises(NotSupported, match="rows like the parts needed"):
        sum_splits(parts, whole, impl="triton")


def test_refusals():
    size, x, g = Map(1, 4, 4), normal(16, 8), normal(4, 6)
    dw = torch.empty(6, 4, 4, 8).permute(0, 3, 1, 2)
    cases = [
        ([Source(x[:, :4])] * 2, g, dw, "2 sources; one is allowed, or two of a transposed"),
        ([Source(x[:8])], g, dw, r"a source is \(8, 8\) .* 16 rows of torch.float32"),
        ([Source(x)], g[:3], dw, r"the gradient is \(3, 6\) .* 4 contiguous rows"),
        ([Source(x)], g, torch.empty(6, 8, 4, 4), r"\(6, 8, 4, 4\) with strides .* dense channels-last is needed"),
        ([Source(x)], g, dw[:5], r"a kernel gradient \(5, 8, 4, 4\) for 8 channels to 6"),
        ([Source(x, "none", *[normal(1, 7)] * 2)], g, dw, r"a scale is \(1, 7\) .* \[groups, 8\] contiguous fp32"),
        ([Source(x.double())], g.double(), dw, "float64; allowed are float32, float16, bfloat16"),
    ]
    for sources, gradient, into, message in cases:
        with pytest.raises(NotSupported, match=message):
            conv_wgrad(sources, gradient, into, HALF, size, impl="triton")

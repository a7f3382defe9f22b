"""Convolutions as gather products against float64: geometries, thin and odd channels, prologues, epilogues, splits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpix2pix.kernels import conv_kernel as module
from fastpix2pix.kernels import operands
from fastpix2pix.kernels._triton import jit, tl
from fastpix2pix.kernels.conv import Norm, Product, conv, conv_dgrad
from fastpix2pix.kernels.conv_plan import ConvPlan, Problem
from fastpix2pix.kernels.dispatch import NotSupported, recorded
from fastpix2pix.kernels.geometry import Geometry, Map, Source
from fastpix2pix.kernels.rows import Output, Statistics
from tests.kernels.common import DEVICE, DTYPES, guarded, interpreter, needs_triton, normal

HALF, DOUBLE, SAME = Geometry(4, 2, 1), Geometry(4, 2, 1, transposed=True), Geometry(4, 1, 1)


def kernel(geometry: Geometry, inputs: int, outputs: int, seed: int = 1) -> Tensor:
    shape = (inputs, outputs) if geometry.transposed else (outputs, inputs)
    side = geometry.kernel
    w = normal(shape[0], side, side, shape[1], seed=seed) / side / inputs**0.5
    return w.permute(0, 3, 1, 2)  # channels-last, whatever dimensions of 1 say


def cast(value, dtype):
    """Tensors of a call in another float type, wherever they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list):
        return [cast(v, dtype) for v in value]
    if isinstance(value, Source | Norm | Output | Statistics):
        return type(value)(*(cast(v, dtype) for v in value))
    return value


def run(op, impl, first, w, geometry, size, rows, channels, **options) -> tuple[list[Tensor], Product]:
    """The output, in guard bands that must stay NaN, and what the op returns."""
    y, whole = guarded(rows, channels, w.dtype)
    found = op(first, w, geometry, size, y, impl=impl, **options)
    written = y.clone()
    y.fill_(math.nan)
    assert whole.isnan().all()
    return written, found


def summary(y: Tensor, product: Product, size: Map) -> list[Tensor]:
    """What does not depend on tiles: the output, its statistics per group, the sums per group."""
    if product.tiles is not None:
        tiles = product.tiles
        groups, count, _ = tiles.mean.shape
        per_part = len(y) // groups // tiles.parts
        of_tile = [min(per_part - i * tiles.rows, tiles.rows) for i in range(count // tiles.parts)]
        weight = torch.tensor(of_tile * tiles.parts, device=y.device, dtype=tiles.mean.dtype)[:, None]
        assert int(weight.sum()) == len(y) // groups
        mean = (tiles.mean * weight).sum(1) / weight.sum()
        m2 = tiles.m2.sum(1) + ((tiles.mean - mean[:, None]) ** 2 * weight).sum(1)
        return [y, mean, m2]
    return [y, *(t.sum(1) for t in product.sums or ())]


def worst_excess(op, first, w, geometry, size, rows, channels, plan=None, slack: float = 0.0, **options) -> float:
    """How far the kernel leaves the two-error rule: > 0 is wrong. |fast - f64| <= 2 |reference - f64| + a rounding.

    For bf16 in the interpreter, which cuts off where hardware rounds, `slack` is added: one more rounding of every
    operand that is computed while loading. Sums over rows may differ by the roundings of what they add, which are the
    output's, half of them up and half down.
    """
    arguments = (first, w, geometry, size, rows, channels)
    fast = summary(*run(op, "triton", *arguments, plan=plan, **options), size)
    same = summary(*run(op, "reference", *arguments, **options), size)
    wide = {name: cast(value, torch.float64) for name, value in options.items()}
    exact = summary(*run(op, "reference", *(cast(a, torch.float64) for a in arguments), **wide), size)
    worst = -math.inf
    cut = w.dtype == torch.bfloat16 and DEVICE == "cpu"
    half_way = torch.finfo(w.dtype).eps * exact[0].abs().max().item() * rows**0.5 * (1 + slack * cut)
    for i, (f, s, e) in enumerate(zip(fast, same, exact, strict=True)):
        assert f.dtype == s.dtype
        rounding = (torch.finfo(w.dtype).eps if cut else 2**-20) * (1 + slack * cut) * e.abs().max().item()
        error, allowed = ((v.double() - e).abs().max().item() for v in (f, s))
        excess = error - 2 * allowed - max(rounding, half_way if i and "norm" in options else 0.0)
        worst = math.inf if math.isnan(excess) else max(worst, excess)
    return worst


def forward(geometry, images, height, width, inputs, outputs, dtype, **options) -> float:
    """worst_excess of a forward product; `affine` and `activations` describe the sources."""
    affine, activations = options.pop("affine", False), options.pop("activations", ("none",) * len(inputs))
    groups, size = options.get("groups", 1), Map(images, height, width)
    sources = []
    for i, (channels, activation) in enumerate(zip(inputs, activations, strict=True)):
        vectors = normal(2, groups, channels, seed=10 + i).unbind() if affine else (None, None)
        wider = normal(size.rows, channels + 3, seed=20 + i).to(dtype)  # rows lie apart
        sources.append(Source(wider[:, :channels], activation, *vectors))
    w = kernel(geometry, sum(inputs), outputs).to(dtype)
    rows = images * geometry.output(height) * geometry.output(width)
    return worst_excess(conv, sources, w, geometry, size, rows, outputs, **options)


SHAPES = [  # geometry, images, height, width, inputs, outputs, why
    (HALF, 1, 8, 8, (3,), 64, "e1: RGB, taps and channels as one dimension"),
    (HALF, 2, 4, 6, (6,), 16, "c1: both images, a map that is not square"),
    (HALF, 1, 4, 4, (20,), 40, "no channel count divides a block"),
    (HALF, 3, 2, 2, (32,), 20, "e8: one pixel of each of three images, 12 taps without input"),
    (HALF, 2, 7, 5, (33,), 17, "odd sizes: the last row and column have no partner"),
    (HALF, 1, 20, 14, (16,), 8, "more than one tile of rows"),
    (SAME, 2, 5, 5, (16,), 1, "c5: one channel comes out"),
    (SAME, 1, 13, 11, (16,), 16, "c4: 120 rows, no power of two"),
    (SAME, 1, 3, 3, (1,), 16, "one channel goes in"),
    (Geometry(1, 1, 0), 2, 3, 5, (6,), 24, "a pixel discriminator"),
    (Geometry(3, 1, 1), 1, 4, 4, (24,), 24, "3x3"),
    (DOUBLE, 1, 1, 1, (64,), 32, "d8: one pixel becomes four, by one tap each"),
    (DOUBLE, 3, 2, 3, (20, 12), 40, "d7: two sources"),
    (DOUBLE, 1, 9, 8, (32, 32), 3, "d1: RGB comes out, two tiles of each parity"),
    (DOUBLE, 2, 4, 4, (3,), 5, "three channels, flattened, by parity"),
]


HALVES = ("e1", "no channel", "c5", "d7")  # shapes that half types are tried on: each way to load and store
TYPED = [(*shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype == DTYPES[0] or shape[-1].startswith(HALVES)]


@needs_triton
@pytest.mark.parametrize(("geometry", "images", "height", "width", "inputs", "outputs", "why", "dtype"), TYPED)
def test_forward(geometry, images, height, width, inputs, outputs, why, dtype):
    shape = (geometry, images, height, width, inputs, outputs, dtype)
    assert forward(*shape) <= 0
    acts = ("leaky", "relu")[: len(inputs)]
    assert forward(*shape, activations=acts, bias=normal(outputs), activation="tanh", slack=4) <= 0
    if geometry.output(height) * geometry.output(width) > 1:
        assert forward(*shape, affine=True, activations=acts, statistics=True, groups=images, slack=8) <= 0


HALVES = ("e1", "no channel", "c5", "d7")  # shapes that half types are tried on: each way to load and store
TYPED = [(*shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype == DTYPES[0] or shape[-1].startswith(HALVES)]


@needs_triton
@pytest.mark.parametrize(("geometry", "images", "height", "width", "inputs", "outputs", "why", "dtype"), TYPED)
def test_dgrad(geometry, images, height, width, inputs, outputs, why, dtype):
    size, channels = Map(images, height, width), sum(inputs)
    rows = images * geometry.output(height) * geometry.output(width)
    g = normal(rows, outputs, seed=5).to(dtype)
    w = kernel(geometry, channels, outputs).to(dtype)
    shape = (conv_dgrad, g, w, geometry, size, size.rows, channels)
    assert worst_excess(*shape) <= 0
    for norm, groups in norms(size, inputs, dtype):
        assert worst_excess(*shape, norm=norm, groups=groups, slack=4) <= 0


def norms(size: Map, inputs: tuple[int, ...], dtype: torch.dtype):
    """The normalisation in front with one gradient and a batch's statistics, and with everything at once."""
    own = inputs[-1]  # the first source is a skip, with a gradient that waits for another
    x = normal(size.rows, own, seed=6).to(dtype)
    vectors = normal(2, own, seed=7)
    statistics = Statistics(normal(1, own, seed=8), normal(1, own, seed=9).abs())
    yield Norm(x, *vectors, statistics, "relu"), 1
    per_image = Statistics(normal(size.images, own, seed=8), normal(size.images, own, seed=9).abs())
    wider = normal(size.rows, 2 * own, seed=3).to(dtype)
    yield Norm(x, None, None, per_image, "leaky", Output(wider[:, :own], "relu")), size.images


SPLITS = [  # geometry, height, width, inputs, tap splits, channel splits, why
    (HALF, 4, 4, (64,), 16, 1, "a tap each"),
    (HALF, 4, 4, (64,), 4, 4, "taps and channels"),
    (HALF, 4, 4, (40,), 2, 2, "channels that a split does not divide"),
    (HALF, 2, 2, (32,), 4, 2, "the four useful taps of e8"),
    (HALF, 4, 4, (33,), 8, 4, "more splits than there are blocks: some add nothing"),
    (DOUBLE, 2, 2, (32, 48), 4, 2, "two sources, by parity"),
    (DOUBLE, 1, 1, (64,), 1, 4, "one useful tap"),
    (SAME, 5, 4, (32,), 16, 1, "stride 1"),
]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("geometry", "height", "width", "inputs", "taps", "channels", "why"), SPLITS)
def test_splits(geometry, height, width, inputs, taps, channels, why, dtype):
    plan = ConvPlan(16, 16, 16, taps, channels, 4, 2)
    shape = (geometry, 3, height, width, inputs, 24, dtype)
    acts = ("relu",) * len(inputs)
    assert forward(*shape, activations=acts, plan=plan) <= 0
    assert forward(*shape, activations=acts, plan=plan, statistics=True) <= 0  # which a split sum cannot have
    assert forward(*shape, activations=acts, plan=plan._replace(flatten=1)) <= 0


@needs_triton
def test_partial_sums_are_left_where_they_are_asked_for():
    size = Map(2, 4, 4)
    sources, w = [Source(normal(size.rows, 32))], kernel(HALF, 32, 24)
    y = normal(8, 24)
    before = y.clone()
    plan = ConvPlan(16, 16, 16, 4, 2, 4, 2)
    found = conv(sources, w, HALF, size, y, partials=True, plan=plan, impl="triton").partials
    assert found is not None and found.shape == (8, 8, 24) and found.dtype == torch.float32
    assert torch.equal(y, before)
    whole, _ = run(conv, "reference", sources, w, HALF, size, 8, 24)
    torch.testing.assert_close(found.sum(0), whole, rtol=1e-5, atol=1e-5)
    one = plan._replace(tap_splits=1, channel_splits=1)
    assert conv(sources, w, HALF, size, y, partials=True, plan=one, impl="triton").partials is None
    torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-5)


SECOND = [  # geometry, size, channels, plan, why
    (HALF, Map(2, 8, 6), 20, None, "odd widths"),
    (Geometry(4, 2, 1, True), Map(1, 4, 4), 16, None, "parities"),
    (HALF, Map(1, 16, 16), 64, ConvPlan(64, 64, 64, 2, 1, 8, 3), "a split sum that has to be whole"),
]


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("geometry", "size", "channels", "plan", "why"), SECOND, ids=[s[-1] for s in SECOND])
def test_a_second_output_is_an_activation_of_the_first(geometry, size, channels, plan, why, impl):
    """Rows of both lie in wider ones, as those of a skip do."""
    x, w = normal(size.rows, 12, seed=1).half(), kernel(geometry, 12, channels).half()
    rows = size.images * geometry.output(size.height) * geometry.output(size.width)
    both = torch.full((rows, 2 * channels + 5), math.nan, dtype=torch.float16, device=DEVICE)
    y, again = both[:, :channels], both[:, channels + 2 : 2 * channels + 2]
    second = Output(again, "relu")
    conv([Source(x)], w, geometry, size, y, activation="leaky", second=second, plan=plan, impl=impl)
    alone = torch.empty(rows, channels, dtype=torch.float16, device=DEVICE)
    conv([Source(x)], w, geometry, size, alone, activation="leaky", plan=plan, impl=impl)
    assert torch.equal(y, alone) and torch.equal(again, alone.relu())
    assert (alone < 0).any() and (again > 0).any()
    assert both.isnan().sum() == 5 * rows


@needs_triton
def test_statistics_are_of_what_is_stored():
    """Values near 1e3 whose half form has steps of 0.5: the statistics of the unrounded sums are others."""
    size = Map(1, 6, 6)
    x = (1000 + 0.2 * normal(size.rows, 16)).half()
    w = torch.eye(16, device=DEVICE).half().view(16, 1, 1, 16).permute(0, 3, 1, 2)
    y, product = run(conv, "triton", [Source(x)], w, Geometry(1, 1, 0), size, 36, 16, statistics=True)
    assert torch.equal(y, x)
    _, mean, m2 = summary(y, product, size)
    var, center = torch.var_mean(x.double(), 0, correction=0)
    torch.testing.assert_close(mean[0].double(), center, rtol=1e-6, atol=0)
    torch.testing.assert_close(m2[0].double() / 36, var, rtol=1e-4, atol=0)


@needs_triton
@pytest.mark.parametrize("geometry", [HALF, DOUBLE, SAME], ids=str)
def test_padding_is_zero_after_the_activation(geometry):
    """A shift of 1e3 that leaked into the padding would be 1e3 times what is right there."""
    size = Map(2, 4, 4)
    x, w = normal(size.rows, 32), kernel(geometry, 32, 16)
    shift = torch.full((2, 32), 1e3, device=DEVICE)
    source = Source(x, "relu", torch.zeros(2, 32, device=DEVICE), shift)
    rows = 2 * geometry.output(4) ** 2
    assert worst_excess(conv, [source], w, geometry, size, rows, 16, groups=2) <= 0


@needs_triton
def test_taps_without_a_pixel_are_not_read():
    size = Map(2, 2, 2)
    w = kernel(HALF, 32, 16).clone()
    y, _ = run(conv, "triton", [Source(normal(8, 32))], w, HALF, size, 2, 16)
    outer = torch.ones(4, 4, dtype=torch.bool, device=DEVICE)
    outer[1:3, 1:3] = False
    w.masked_fill_(outer, math.nan)
    again, _ = run(conv, "triton", [Source(normal(8, 32))], w, HALF, size, 2, 16)
    assert torch.equal(y, again)


@jit
def _nothing_padded(shift, ok):
    return shift.to(tl.float32)


@interpreter
def test_comparison_sees_padding_that_is_not_zero(monkeypatch):
    shape = (HALF, 1, 4, 4, (32,), 16, torch.float32)
    options = {"affine": True, "activations": ("leaky",)}
    assert forward(*shape, **options) <= 0
    monkeypatch.setattr(operands, "padded", _nothing_padded)
    assert forward(*shape, **options) > 0


@interpreter
def test_comparison_sees_swapped_parities(monkeypatch):
    shape = (DOUBLE, 1, 4, 4, (32,), 16, torch.float32)
    right = Geometry._doubling
    monkeypatch.setattr(Geometry, "_doubling", lambda self: right(self)._replace(k0=2, first=0))
    assert forward(*shape) > 0


@interpreter
def test_comparison_sees_a_tap_left_out(monkeypatch):
    shape = (HALF, 1, 4, 4, (32,), 16, torch.float32)
    plan = ConvPlan(16, 16, 16, 4, 1, 4, 2)
    assert forward(*shape, plan=plan) <= 0
    monkeypatch.setattr(Problem, "useful", property(lambda self: 12))
    assert forward(*shape, plan=plan) > 0


@jit
def _one_slope(g, h, ACT):
    return g.to(tl.float32)


@interpreter
def test_comparison_sees_a_missing_derivative(monkeypatch):
    size = Map(2, 4, 4)
    shape = (conv_dgrad, normal(8, 16), kernel(HALF, 24, 16), HALF, size, size.rows, 24)
    *_, (norm, groups) = norms(size, (24,), torch.float32)
    assert worst_excess(*shape, norm=norm, groups=groups) <= 0
    monkeypatch.setattr(module, "times_derivative", _one_slope)
    assert worst_excess(*shape, norm=norm, groups=groups) > 0


@needs_triton
def test_launch_and_bytes():
    size = Map(1, 2, 2)
    x, w = normal(4, 64).half(), kernel(HALF, 64, 32).half()
    with recorded() as tape:
        run(conv, "triton", [Source(x)], w, HALF, size, 1, 32)
    assert [entry.kernel for entry in tape] == ["_conv_kernel"]
    assert tape[0].read == 2 * (4 * 64 + 4 * 64 * 32)  # the input and 4 of 16 taps
    assert tape[0].written == 2 * 32


def test_refusals():
    size, x, w = Map(1, 4, 4), normal(16, 8), kernel(HALF, 8, 6)
    y = normal(4, 6)
    cases = [
        ([Source(x.double())], w.double(), HALF, y.double(), {}, "float64; allowed are float32, float16, bfloat16"),
        ([Source(x[:, :2])] * 3, w, HALF, y, {}, "3 sources; one or two"),
        ([Source(x[:9])], w, HALF, y, {}, r"\(9, 8\) .* 16 rows like the first are needed"),
        ([Source(x)], kernel(HALF, 9, 6), HALF, y, {}, r"a kernel \(6, 9, 4, 4\) .* for 8 channels to 6"),
        ([Source(x)], w.contiguous(), HALF, y, {}, "the kernel has strides .* channels-last is needed"),
        ([Source(x)], w, HALF, y.half(), {}, "the output is .* rows like the input needed"),
        ([Source(x, "none", normal(2, 8), normal(2, 8))], w, HALF, y, {}, r"a scale is \(2, 8\); \[1, 8\] contiguous"),
        ([Source(x)], w, HALF, y, {"groups": 3}, "1 images in 3 groups"),
        (
            [Source(x)],
            w,
            HALF,
            y,
            {"second": Output(y[:2], "relu")},
            r"second output is \(2, 6\) .* the first",
        ),
    ]
    for sources, weight, geometry, out, options, message in cases:
        with pytest.raises(NotSupported, match=message):
            conv(sources, weight, geometry, size, out, impl="triton", **options)
    with pytest.raises(NotSupported, match="3x3 stride 2 padding 1; allowed are 4x4 stride 2"):
        conv([Source(x)], kernel(Geometry(3, 2, 1), 8, 6), Geometry(3, 2, 1), size, normal(4, 6), impl="triton")
    for impl in ("reference", "triton"):
        with pytest.raises(ValueError, match=r"the output has 5 rows; Map\(images=1, height=2, width=2\) needs 4"):
            conv([Source(x)], w, HALF, size, normal(5, 6), impl=impl)

"""bias_act, both directions, against float64 and autograd: shapes of the networks and odd ones."""

from __future__ import annotations

import math

import pytest
import torch

from fastpix2pix.kernels import bias_act as module
from fastpix2pix.kernels._triton import jit, tl
from fastpix2pix.kernels.activations import ACTIVATIONS
from fastpix2pix.kernels.bias_act import bias_act, bias_act_backward
from fastpix2pix.kernels.dispatch import NotSupported, recorded
from fastpix2pix.kernels.norm_act import Output
from fastpix2pix.kernels.rows import launch_plan
from tests.kernels.common import BOTH, DEVICE, DTYPES, interpreter, needs_triton, normal


def run(impl, x, bias, gradients, activations=BOTH) -> list[torch.Tensor]:
    """Outputs, dx and dbias. Everything but x lies in the right half of a wider buffer whose left half stays NaN."""
    rows, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    whole = [torch.full((rows + 1, 2 * channels), math.nan, dtype=x.dtype, device=DEVICE) for _ in range(5)]
    *inner, dx = (w[:-1, channels:] for w in whole)
    outputs = [Output(y, name) for y, name in zip(inner, activations, strict=False)]
    for g, into in zip(gradients, inner[2:], strict=False):
        into.copy_(g)
    upstream = [Output(g, name) for g, name in zip(inner[2:], activations, strict=False)]
    dbias = None if bias is None else torch.full((channels,), math.nan, dtype=wide, device=DEVICE)
    bias_act(x, bias, outputs, impl=impl)
    bias_act_backward(upstream, x, bias, dx, dbias, impl=impl)
    assert all(w[:, :channels].isnan().all() and w[-1].isnan().all() for w in whole)
    return [*(output.rows for output in outputs), dx, *(() if dbias is None else (dbias,))]


def worst_excess(x, bias, activations=BOTH) -> float:
    """> 0 is wrong: |fast - f64| <= 2 |reference - f64| + roundings of fp32, relative to the terms that are summed.

    Gradients are 0 near a kink: which side a rounding leaves it on must not matter. Triton's interpreter cuts bf16 off
    where hardware rounds.
    """
    double = None if bias is None else bias.double()
    kink = (x.double() if double is None else x.double() + double).abs() < 1e-5
    gradients = [normal(*x.shape, seed=5 + i).to(x.dtype).masked_fill_(kink, 0) for i in range(len(activations))]
    found = (
        run("triton", x, bias, gradients, activations),
        run("reference", x, bias, gradients, activations),
        run("reference", x.double(), double, [g.double() for g in gradients], activations),
    )
    sums = sum(g.double().abs() for g in gradients).sum(0).max().item()
    worst = -math.inf
    for fast, same, exact in zip(*found, strict=True):
        assert fast.dtype == same.dtype
        largest = exact.abs().max().item()
        cut = torch.finfo(fast.dtype).eps * largest if fast.dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
        slack = 2**-22 * (sums if fast.ndim == 1 else largest) + cut
        error, allowed = ((v.double() - exact).abs().max().item() for v in (fast, same))
        excess = error - 2 * allowed - slack
        worst = math.inf if math.isnan(excess) else max(worst, excess)
    return worst


SHAPES = [  # rows, channels, why
    (1, 512, "the bottleneck at batch 1"),
    (1, 1, "one number"),
    (4, 5, "channels not a power of two"),
    (900, 1, "the discriminator's logits"),
    (961 * 2, 64, "many tiles that do not divide the rows"),
    (1100, 3, "RGB: two tiles, the second nearly empty"),
    (4300, 33, "more tiles than the sum takes at once, one channel in the second block"),
]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels", "why"), SHAPES)
def test_against_float64(rows, channels, why, dtype):
    x = (normal(rows, channels) * 2).to(dtype)
    assert worst_excess(x, normal(channels, seed=1)) <= 0


@needs_triton
@pytest.mark.parametrize("rows", [30, 300], ids=["one tile", "tiles"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation, rows):
    assert worst_excess(normal(rows, 40), normal(40, seed=1), (activation,)) <= 0
    assert worst_excess(normal(rows, 40), None, (activation,)) <= 0


@needs_triton
@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 300], ids=["one tile", "tiles"])
def test_bias_gradient_is_added_in_its_dtype(rows, kind):
    x, g, start = normal(rows, 40), normal(rows, 40, seed=1), normal(40, seed=2).to(kind)
    into, dx = start.clone(), torch.empty_like(x)
    bias_act_backward([Output(g, "none")], x, None, dx, into, accumulate=True, impl="triton")
    rounding = torch.finfo(kind).eps
    torch.testing.assert_close(
        into.float(), start.float() + g.sum(0), rtol=2 * rounding, atol=300 * 2**-23
    )  # 300 terms
    assert torch.equal(dx, g)


def test_reference_against_autograd():
    x, bias = normal(30, 5).double().requires_grad_(), normal(5, seed=1).double().requires_grad_()
    g1, g2 = normal(30, 5, seed=2).double(), normal(30, 5, seed=3).double()
    z = x + bias
    y1, y2 = torch.nn.functional.leaky_relu(z, 0.2), torch.tanh(z)
    ((y1 * g1).sum() + (y2 * g2).sum()).backward()
    found = run("reference", x.detach(), bias.detach(), [g1, g2], ("leaky", "tanh"))
    for value, expected in zip(found, (y1.detach(), y2.detach(), x.grad, bias.grad), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@needs_triton
def test_two_runs_are_equal():
    x, bias, g = normal(700, 40).half(), normal(40, seed=1), [normal(700, 40, seed=2).half()] * 2
    assert all(torch.equal(a, b) for a, b in zip(*(run("triton", x, bias, g) for _ in range(2)), strict=True))


@needs_triton
def test_launches_and_bytes():
    x, bias = normal(961, 64).half(), normal(64)
    with recorded() as tape:
        run("triton", x, bias, [x, x])
    matrix, vector = 961 * 64 * 2, 64 * 4
    assert [(entry.kernel, entry.grid, entry.read, entry.written) for entry in tape] == [
        ("_bias_act_fwd_kernel", (2, 8, 1), matrix + vector, 2 * matrix),
        ("_bias_act_bwd_kernel", (2, 8, 1), 3 * matrix + vector, matrix + 8 * vector),
        ("_bias_sum_kernel", (2,), 8 * vector, vector),
    ]
    with recorded() as tape:
        run("triton", x[:1], bias, [x[:1]], ["relu"])
    assert [entry.kernel for entry in tape] == ["_bias_act_fwd_kernel", "_bias_act_bwd_kernel"]


@jit
def _first_tile_only(partial, tiles, col, C, BC: tl.constexpr):
    return tl.load(partial + col, mask=col < C, other=0.0)


@interpreter
def test_comparison_sees_tiles_left_out(monkeypatch):
    x, bias = normal(300, 40), normal(40, seed=1)
    assert launch_plan(300, 40, 1).tiles > 1
    assert worst_excess(x, bias) <= 0
    monkeypatch.setattr(module, "sum_tiles", _first_tile_only)
    assert worst_excess(x, bias) > 1e-3


def test_refusals_of_the_kernels():
    x = normal(6, 4)
    y = Output(torch.empty_like(x), "none")
    with pytest.raises(NotSupported, match=r"bias_act: .* x is torch.float64"):
        bias_act(x.double(), None, [y], impl="triton")
    with pytest.raises(NotSupported, match=r"a parameter is \(3,\) .* 4 contiguous values needed"):
        bias_act(x, normal(3), [y], impl="triton")
    with pytest.raises(NotSupported, match="0 outputs; one or two are allowed"):
        bias_act_backward([], x, None, torch.empty_like(x), None, impl="triton")
    with pytest.raises(NotSupported, match="rows like x needed"):
        bias_act_backward([y], x, None, torch.empty_like(x).half(), None, impl="triton")

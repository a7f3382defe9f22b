"""norm_act_backward against float64 and autograd: shapes of the networks and odd ones, two gradients, accumulation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastpix2pix.kernels import norm_act_backward as module
from fastpix2pix.kernels._triton import jit, tl
from fastpix2pix.kernels.dispatch import NotSupported, recorded
from fastpix2pix.kernels.norm_act import Output, Statistics, norm_act
from fastpix2pix.kernels.norm_act_backward import hidden, norm_act_backward
from fastpix2pix.kernels.philox import dropout_mask
from fastpix2pix.kernels.rows import launch_plan
from tests.kernels.common import BOTH, DEVICE, DTYPES, interpreter, needs_triton, noise, normal


class Case:
    """Everything backward is given. Gradients are 0 where an input of the activations is nearly 0: which side of a kink
    a rounding leaves it on must not matter."""

    def __init__(self, rows, channels, *, groups=1, activations=BOTH, dtype=torch.float32, affine=True, **options: Any):
        self.x = (normal(rows * groups, channels) * 2 + normal(channels, seed=1)).to(dtype)
        self.gamma = normal(channels, seed=2) if affine else None
        self.beta = normal(channels, seed=3) if affine else None
        self.activations, self.groups, self.options = activations, groups, {"images": 1, "noise": None} | options
        g = [normal(*self.x.shape, seed=4 + i).to(dtype) for i in range(len(activations))]
        double = [None if v is None else v.double() for v in (self.gamma, self.beta)]
        kink = hidden(self.x.double(), *double, self.statistics(torch.float64), 1, None).abs() < 1e-4
        self.gradients = [v.masked_fill_(kink, 0) for v in g]

    def statistics(self, dtype: torch.dtype) -> Statistics:
        var, mean = torch.var_mean(self.x.double().view(self.groups, -1, self.x.shape[1]), 1, correction=0)
        return Statistics(mean.to(dtype), torch.rsqrt(var + 1e-5).to(dtype))

    def run(self, impl: str, exact: bool = False) -> list[torch.Tensor]:
        """dx, dgamma, dbeta; gradients and dx in the right halves of wider buffers, whose left halves stay NaN."""
        rows, channels = self.x.shape
        kind = torch.float64 if exact else self.x.dtype
        wide = torch.promote_types(kind, torch.float32)
        whole = torch.full((rows, 2 * channels), math.nan, dtype=kind, device=DEVICE)
        inputs = [torch.cat([torch.full_like(g, math.nan), g], 1).to(kind)[:, channels:] for g in self.gradients]
        x, dx = self.x.to(kind), whole[:, channels:]
        gamma, beta = (None if v is None else v.to(wide) for v in (self.gamma, self.beta))
        dgamma, dbeta = (None if gamma is None else torch.full_like(gamma, math.nan) for _ in range(2))
        norm_act_backward(
            [Output(g, name) for g, name in zip(inputs, self.activations, strict=True)],
            *(x, gamma, beta, self.statistics(wide), dx, dgamma, dbeta),
            impl=impl,
            **self.options,
        )
        assert whole[:, :channels].isnan().all()
        return [dx] if dgamma is None or dbeta is None else [dx, dgamma, dbeta]

    def worst_excess(self) -> float:
        """> 0 is wrong: |fast - f64| <= 2 |reference - f64| + roundings of fp32, relative to the terms that are summed.

        In dx they may cancel. Triton's interpreter also cuts bf16 off where hardware rounds.
        """
        worst = -math.inf
        terms = sum(g.double().abs() for g in self.gradients)
        scale = self.statistics(torch.float64).rstd.max() * (1 if self.gamma is None else self.gamma.abs().max())
        found = (self.run("triton"), self.run("reference"), self.run("reference", exact=True))
        for number, (fast, same, exact) in enumerate(zip(*found, strict=True)):
            size = (terms.max() * scale if number == 0 else terms.sum(0).max()).item()
            cut = torch.finfo(fast.dtype).eps if fast.dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
            slack = 2**-22 * size + cut * exact.abs().max().item()
            error, allowed = ((v.double() - exact).abs().max().item() for v in (fast, same))
            excess = error - 2 * allowed - slack
            worst = math.inf if math.isnan(excess) else max(worst, excess)
        return worst


SHAPES = [  # rows per group, channels, groups, images, why
    (4, 512, 1, 1, "d8 at batch 1: one launch"),
    (2, 1, 1, 2, "the fewest rows with a variance, one channel, 1x1 maps"),
    (25, 5, 3, 3, "three groups: sums of all groups take two launches"),
    (16, 33, 2, 4, "joined halves in one launch; one channel in the second block"),
    (961, 64, 2, 2, "c4: joined halves whose tiles do not divide 31 x 31"),
    (1100, 3, 1, 2, "RGB: two tiles, the second nearly empty"),
    (4300, 17, 1, 1, "more tiles than the sum takes at once"),
]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels", "groups", "images", "why"), SHAPES)
def test_against_float64(rows, channels, groups, images, why, dtype):
    assert Case(rows, channels, groups=groups, images=images, dtype=dtype).worst_excess() <= 0
    if rows < 500:
        dropped = Case(rows, channels, groups=groups, images=images, dtype=dtype, noise=noise())
        assert dropped.worst_excess() <= 0


VARIANTS = [  # options, why
    ({"activations": ("tanh",)}, "tanh"),
    ({"activations": ("none",)}, "one plain output"),
    ({"affine": False, "groups": 3}, "instance norm: no sums to share, one launch"),
    ({"noise": noise(per_image=False), "images": 3, "activations": ("relu",)}, "fixed dropout"),
]


@needs_triton
@pytest.mark.parametrize(("options", "why"), VARIANTS)
@pytest.mark.parametrize("rows", [75, 450], ids=["one launch", "two launches"])
def test_variants(options, why, rows):
    assert Case(rows, 40, **options).worst_excess() <= 0


@needs_triton
@pytest.mark.parametrize("rows", [4, 300], ids=["one launch", "two launches"])
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_parameter_gradients_are_added_in_their_dtype(kind, rows):
    case = Case(rows, 40)
    _, *written = case.run("triton")
    start = normal(40, seed=9).to(kind)
    into = [start.clone(), start.clone()]
    outputs = [Output(g, name) for g, name in zip(case.gradients, BOTH, strict=True)]
    dx = torch.empty_like(case.x)
    arguments = (outputs, case.x, case.gamma, case.beta, case.statistics(torch.float32), dx, *into)
    norm_act_backward(*arguments, accumulate=True, impl="triton")
    for total, gradient in zip(into, written, strict=True):
        rounding = torch.finfo(kind).eps
        torch.testing.assert_close(total.float(), start.float() + gradient, rtol=2 * rounding, atol=4 * rounding)


@needs_triton
def test_one_parameter_gradient_alone():
    """A frozen gamma, or a frozen beta, changes nothing else."""
    case = Case(300, 40)
    dx, dgamma, dbeta = case.run("triton")
    for wanted in (0, 1):
        into: list[torch.Tensor | None] = [None, None]
        into[wanted] = torch.full_like(dgamma, math.nan)
        outputs = [Output(g, name) for g, name in zip(case.gradients, BOTH, strict=True)]
        alone = torch.empty_like(case.x)
        statistics = case.statistics(torch.float32)
        norm_act_backward(outputs, case.x, case.gamma, case.beta, statistics, alone, *into, impl="triton")
        assert torch.equal(alone, dx) and torch.equal(into[wanted], (dgamma, dbeta)[wanted])


@pytest.mark.parametrize("images", [1, 3], ids=["batch norm", "instance norm"])
@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropout"])
def test_reference_against_autograd(images, dropped):
    """torch's own norms, dropout by the same mask, both outputs summed, in float64."""
    n, c, h, w = 3, 5, 4, 6
    x, gamma, beta = (normal(*s, seed=7).double().requires_grad_() for s in ((n, c, h, w), (c,), (c,)))
    g1, g2 = (normal(n, c, h, w, seed=seed).double() for seed in (8, 9))

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t.detach().permute(0, 2, 3, 1).reshape(-1, c)

    norm = F.instance_norm if images == 3 else F.batch_norm
    z = norm(x, None, None, gamma, beta, True)
    if dropped:
        z = z * 2 * dropout_mask(noise(), n, h * w, c).view(n, h, w, c).permute(0, 3, 1, 2)
    ((F.leaky_relu(z, 0.2) * g1).sum() + (F.relu(z) * g2).sum()).backward()

    key = noise() if dropped else None
    outs = [Output(torch.empty_like(rows(x)), name) for name in BOTH]
    weights = (gamma.detach(), beta.detach())
    statistics = norm_act(rows(x), *weights, outs, groups=images, images=n, noise=key)
    dx, (dgamma, dbeta) = torch.empty_like(rows(x)), torch.empty(2, c, dtype=x.dtype, device=x.device)
    gradients = [Output(rows(g1), "leaky"), Output(rows(g2), "relu")]
    norm_act_backward(gradients, rows(x), *weights, statistics, dx, dgamma, dbeta, images=n, noise=key)
    for found, expected in ((dx, rows(x.grad)), (dgamma, gamma.grad), (dbeta, beta.grad)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@needs_triton
def test_two_runs_are_equal():
    case = Case(700, 40, dtype=torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(case.run("triton"), case.run("triton"), strict=True))


@needs_triton
def test_launches_and_bytes():
    case = Case(961, 64, groups=2, dtype=torch.float16)
    with recorded() as tape:
        case.run("triton")
    matrix, vector = 961 * 2 * 64 * 2, 64 * 4
    sums = 2 * 2 * 8 * vector  # two sums, two groups of eight tiles
    inputs = 3 * matrix + (2 + 4) * vector  # x and both gradients; gamma, beta, statistics
    assert [(entry.kernel, entry.grid, entry.read, entry.written) for entry in tape] == [
        ("_norm_act_bwd_sums_kernel", (2, 8, 2), inputs, sums),
        ("_norm_act_bwd_kernel", (2, 8, 2), inputs + sums, matrix + 2 * vector),
    ]
    with recorded() as tape:
        Case(4, 64).run("triton")
    assert [entry.kernel for entry in tape] == ["_norm_act_bwd_kernel"]


# what the comparison must notice


@jit
def _no_scale(counters, block, row, col, positions, C, PER_IMAGE: tl.constexpr):
    return 1.0


@jit
def _first_tile_only(partial, tiles, col, C, BC: tl.constexpr):
    return tl.load(partial + col, mask=col < C, other=0.0)


@interpreter
@pytest.mark.parametrize(
    ("part", "mutant", "options"),
    [("dropout_scale", _no_scale, {"noise": noise()}), ("sum_tiles", _first_tile_only, {})],
    ids=["dropout scale skipped", "tiles left out"],
)
def test_comparison_sees(monkeypatch, part, mutant, options):
    case = Case(300, 40, **options)
    assert launch_plan(300, 40, 1).tiles > 1
    assert case.worst_excess() <= 0
    monkeypatch.setattr(module, part, mutant)
    assert case.worst_excess() > 1e-3


def test_refusals_of_the_kernels():
    case = Case(4, 5)
    gradients = [Output(case.gradients[0], "leaky")]
    rest = (case.gamma, case.beta, case.statistics(torch.float32))
    dx = torch.empty_like(case.x)
    cases = [
        ((gradients * 3, case.x, *rest, dx, None, None), "3 outputs; one or two"),
        ((gradients, case.x, *rest, dx.half(), None, None), "torch.float16 with strides .* rows like x needed"),
        ((gradients, case.x, *rest, dx, torch.empty(4), None), r"a parameter is \(4,\) .* 5 contiguous"),
        ((gradients, case.x.double(), *rest, dx, None, None), "x is torch.float64"),
    ]
    for arguments, message in cases:
        with pytest.raises(NotSupported, match=message):
            norm_act_backward(*arguments, impl="triton")

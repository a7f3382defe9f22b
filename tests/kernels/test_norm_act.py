"""norm_act forward against float64 and torch: every shape the networks have, odd ones, hard statistics, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastpix2pix.kernels import norm_act as module
from fastpix2pix.kernels._triton import jit, tl
from fastpix2pix.kernels.dispatch import NotSupported, recorded
from fastpix2pix.kernels.norm_act import Output, Running, norm_act
from fastpix2pix.kernels.rows import Plan, launch_plan
from tests.kernels.common import DEVICE, DTYPES, IMPLEMENTATIONS, guarded, interpreter, needs_triton, noise, normal


def run(impl, x, gamma, beta, activations=("leaky", "relu"), running=True, **options) -> list[torch.Tensor]:
    """Outputs, mean, rstd and running statistics; each output in guard bands that must stay NaN."""
    rows, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    buffers = [guarded(rows, channels, x.dtype) for _ in activations]
    state = Running(
        normal(channels, seed=7).to(wide), normal(channels, seed=8).abs().to(wide), torch.tensor(5).to(x.device)
    )
    outputs = [Output(inner, name) for (inner, _), name in zip(buffers, activations, strict=True)]
    statistics = norm_act(x, gamma, beta, outputs, running=state if running else None, impl=impl, **options)
    found = [inner.clone() for inner, _ in buffers]
    for inner, whole in buffers:
        inner.fill_(math.nan)
        assert whole.isnan().all()
    return [*found, *statistics, *(state[:3] if running else ())]


def worst_excess(x, gamma, beta, **options) -> float:
    """How far the kernels leave the two-error rule: > 0 is wrong. |fast - f64| <= 2 |reference - f64| + a rounding.

    The rounding: of a sum of 1024 numbers in fp32, relative to the largest value; for bf16 one of its own, because
    Triton's interpreter cuts bf16 off where hardware rounds.
    """
    fast, same = (run(impl, x, gamma, beta, **options) for impl in ("triton", "reference"))
    double = [None if v is None else v.double() for v in (gamma, beta)]
    exact = run("reference", x.double(), *double, **options)
    worst = -math.inf
    for f, s, e in zip(fast, same, exact, strict=True):
        assert f.dtype == s.dtype
        rounding = torch.finfo(f.dtype).eps if f.dtype == torch.bfloat16 and DEVICE == "cpu" else 2**-20
        error, allowed = ((v.double() - e).abs().max().item() for v in (f, s))
        excess = error - 2 * allowed - rounding * e.abs().max().item()
        worst = math.inf if math.isnan(excess) else max(worst, excess)
    return worst


SHAPES = [  # rows per group, channels, groups, images, why
    (4, 512, 1, 1, "d8 at batch 1: four values per channel, one launch"),
    (2, 1, 1, 2, "the fewest rows with a variance, one channel, 1x1 maps"),
    (4, 64, 3, 3, "statistics per image on 2x2 maps"),
    (25, 5, 3, 3, "statistics per image on 5x5 maps; three groups' running statistics take two launches"),
    (16, 33, 2, 4, "joined halves in one launch; one channel in the second block"),
    (961, 64, 2, 2, "c4: joined halves whose tiles do not divide 31 x 31"),
    (1100, 3, 1, 2, "RGB: two tiles, the second nearly empty"),
    (2900, 17, 1, 1, "more tiles than the merge takes at once"),
]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels", "groups", "images", "why"), SHAPES)
def test_against_float64(rows, channels, groups, images, why, dtype):
    x = (normal(rows * groups, channels) * 2 + normal(channels, seed=1)).to(dtype)
    gamma, beta = normal(channels, seed=2), normal(channels, seed=3)  # gamma: about half negative
    assert worst_excess(x, gamma, beta, groups=groups, images=images) <= 0
    if rows < 500:
        assert worst_excess(x, gamma, beta, groups=groups, images=images, noise=noise()) <= 0


VARIANTS = [  # options, why
    ({"activations": ("tanh",)}, "tanh"),
    ({"activations": ("none",), "running": False}, "one plain output, no running statistics"),
    ({"gamma": None, "beta": None, "running": False, "groups": 3, "images": 3}, "instance norm"),
    ({"beta": None}, "gamma alone"),
    ({"noise": noise(per_image=False), "images": 3}, "fixed dropout"),
    ({"noise": noise(seed=-5), "images": 3}, "a negative seed"),
    ({"eps": 0.5}, "another eps"),
]


@needs_triton
@pytest.mark.parametrize(("options", "why"), VARIANTS)
@pytest.mark.parametrize("rows", [75, 450], ids=["one launch", "two launches"])
def test_variants(options, why, rows):
    given = {"gamma": normal(40, seed=2), "beta": normal(40, seed=3)} | options
    assert worst_excess(normal(rows, 40) + 1, **given) <= 0


@needs_triton
@pytest.mark.parametrize("rows", [4, 300], ids=["one launch", "two launches"])
def test_statistics_far_from_zero(rows):
    """Mean 1e3, deviation 1: sums of squares would lose the variance."""
    x = normal(rows, 40) + 1e3
    _, mean, rstd = run("triton", x, None, None, ["none"], running=False)
    var, exact = torch.var_mean(x.double(), 0, correction=0)
    torch.testing.assert_close(mean[0].double(), exact, rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd[0].double(), (var + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [4, 300], ids=["one launch", "two launches"])
def test_a_constant_channel_becomes_beta(impl, rows):
    x = torch.full((rows, 5), 3.0, device=DEVICE)
    beta = normal(5)
    y, mean, rstd = run(impl, x, normal(5, seed=1), beta, ["none"], running=False)
    assert torch.equal(y, beta.expand(rows, 5)) and torch.equal(mean, x[:1])
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e-5**-0.5))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [9, 300], ids=["one launch", "two launches"])
def test_running_statistics_follow_the_order_of_the_groups(impl, rows):
    """As torch's BatchNorm2d called once per group; the other order gives other numbers."""
    x = torch.cat([normal(rows, 6), normal(rows, 6, seed=1) * 3 + 5])
    found = run(impl, x, None, None, ["none"], groups=2)[-3:]

    def torch_running(halves):
        norm = torch.nn.BatchNorm1d(6).to(DEVICE)
        norm.running_mean.copy_(normal(6, seed=7))
        norm.running_var.copy_(normal(6, seed=8).abs())
        for half in halves:
            norm(half)
        return norm.running_mean, norm.running_var

    for f, expected, swapped in zip(found, torch_running(x.chunk(2)), torch_running(x.chunk(2)[::-1]), strict=False):
        torch.testing.assert_close(f, expected, rtol=1e-5, atol=1e-6)
        assert (swapped - expected).abs().min() > 1e-3
    assert found[2].item() == 5 + 2


@pytest.mark.parametrize("images", [1, 3], ids=["batch norm", "instance norm"])
def test_reference_against_torch(images):
    n, c, h, w = 3, 5, 4, 6
    x = normal(n, c, h, w).double()
    gamma, beta = normal(c, seed=1).double(), normal(c, seed=2).double()
    norm = F.instance_norm if images == 3 else F.batch_norm
    expected = F.leaky_relu(norm(x, None, None, gamma, beta, True), 0.2)
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)
    y = run("reference", rows, gamma, beta, ["leaky"], running=False, groups=images)[0]
    torch.testing.assert_close(y.view(n, h, w, c).permute(0, 3, 1, 2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_outputs_may_be_the_halves_of_one_buffer(impl):
    x = normal(300, 5)
    joined = torch.empty(300, 10, device=DEVICE)
    norm_act(x, None, None, [Output(joined[:, :5], "leaky"), Output(joined[:, 5:], "relu")], impl=impl)
    left, right = run(impl, x, None, None, running=False)[:2]
    assert torch.equal(joined, torch.cat([left, right], 1))


@needs_triton
def test_two_runs_are_equal():
    x = normal(700, 40).half()
    first, second = (run("triton", x, normal(40, seed=1), None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_row_offsets_pass_32_bits(monkeypatch):
    """The last row of an output with a huge row stride lies beyond 2**31 elements."""
    stride = 2**30
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # touched pages alone are real
    rows = torch.empty(2 * stride + 8, dtype=torch.float16, device=DEVICE).as_strided((3, 8), (stride, 1))
    x = normal(3, 8).half()
    norm_act(x, None, None, [Output(rows, "none")], impl="triton")
    y = torch.empty_like(x)
    norm_act(x, None, None, [Output(y, "none")], impl="triton")
    assert torch.equal(rows, y)


# what the comparison above must notice


@jit
def _no_scale(counters, block, row, col, positions, C, PER_IMAGE: tl.constexpr):
    return 1.0


@interpreter
def test_comparison_sees_a_missing_dropout_scale(monkeypatch):
    monkeypatch.setattr(module, "dropout_scale", _no_scale)
    assert worst_excess(normal(4, 64), None, None, noise=noise()) > 0.1


@interpreter
def test_comparison_sees_a_tile_left_out(monkeypatch):
    def one_tile_less(*shape: int) -> Plan:
        plan = launch_plan(*shape)
        assert plan.tiles > 2
        return plan._replace(grid=(plan.grid[0], plan.tiles - 1, plan.grid[2]))

    x = normal(961, 64)
    assert worst_excess(x, None, None) <= 0
    monkeypatch.setattr(module, "launch_plan", one_tile_less)
    assert worst_excess(x, None, None) == math.inf


@needs_triton
def test_launches_and_bytes():
    x, gamma = normal(961 * 2, 64).half(), normal(64)
    with recorded() as tape:
        run("triton", x, gamma, gamma, groups=2)
    matrix, vector = 961 * 2 * 64 * 2, 64 * 4
    tiles = 2 * 2 * 8  # mean and M2, two groups of eight tiles
    assert [(entry.kernel, entry.grid, entry.read, entry.written) for entry in tape] == [
        ("_norm_act_stats_kernel", (2, 8, 2), matrix, tiles * vector),
        ("_norm_act_fwd_kernel", (2, 8, 2), matrix + (4 + tiles) * vector, 2 * matrix + (4 + 2) * vector),
    ]
    with recorded() as tape:
        run("triton", x[:4], gamma, gamma, ["relu"])
    assert [(entry.kernel, entry.read) for entry in tape] == [("_norm_act_fwd_kernel", 4 * 64 * 2 + 4 * vector)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_refusals_of_the_op(impl):
    x = normal(6, 4)
    out = [Output(torch.empty_like(x), "none")]
    with pytest.raises(ValueError, match=r"6 rows in 6 groups leave 1 value per channel .* at least 2"):
        norm_act(x, None, None, out, groups=6, impl=impl)
    with pytest.raises(ValueError, match="6 rows are not a multiple of groups = 4 and images = 1"):
        norm_act(x, None, None, out, groups=4, impl=impl)
    with pytest.raises(ValueError, match="not a multiple of groups = 1 and images = 5"):
        norm_act(x, None, None, out, images=5, impl=impl)


def test_refusals_of_the_kernels():
    x = normal(6, 4)
    y = Output(torch.empty_like(x), "none")
    cases = [
        (x.double(), None, [y], "x is torch.float64; allowed are float32, float16, bfloat16"),
        (normal(6, 8)[:, :4], None, [y], r"x \(6, 4\) with strides \(8, 1\); contiguous rows"),
        (x, None, [], "0 outputs; one or two are allowed"),
        (x, None, [y] * 3, "3 outputs; one or two are allowed"),
        (x, None, [Output(y.rows.half(), "none")], "an output is .*float16 .* rows like x needed"),
        (x, None, [Output(y.rows[1:], "none")], r"an output is \(5, 4\)"),
        (x, None, [Output(normal(4, 6).T, "none")], r"an output is .* with strides \(1, 6\)"),
        (x, normal(3), [y], r"a parameter is \(3,\) with strides \(1,\); 4 contiguous values needed"),
        (x, normal(8)[::2], [y], r"a parameter is \(4,\) with strides \(2,\)"),
    ]
    for given, gamma, outputs, message in cases:
        with pytest.raises(NotSupported, match=message):
            norm_act(given, gamma, None, outputs, impl="triton")

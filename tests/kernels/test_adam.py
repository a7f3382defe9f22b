"""Adam against torch.optim.Adam and float64, the overflow flag, and the counters."""

import math

import pytest
import torch

from fastpix2pix.kernels._triton import jit, tl, triton
from fastpix2pix.kernels.adam import BLOCK, _one_minus_exp, adam, advance, found_inf_, not_supported_reasons
from fastpix2pix.kernels.dispatch import NotSupported, recorded
from tests.kernels.common import DEVICE, IMPLEMENTATIONS, needs_triton

GUARD = 64


def random_state(n: int, g_dtype=torch.float32, half_dtype=torch.bfloat16, seed=0):
    """p, m, v, g and a NaN half copy, as after some steps of training."""
    r = torch.Generator().manual_seed(seed)
    p, m, v, g = (torch.randn(n, generator=r) for _ in range(4))
    state = [p * 0.02, m * 1e-3, v**2 * 1e-6, (g * 1e-3).to(g_dtype)]
    state.append(None if half_dtype is None else torch.full((n,), math.nan, dtype=half_dtype))
    return [None if t is None else t.to(DEVICE) for t in state]


def scalars(lr=2e-4, step=3, dtype=torch.float32):
    return torch.tensor(lr, dtype=dtype, device=DEVICE), torch.tensor(step, device=DEVICE)


def guarded(x: torch.Tensor) -> torch.Tensor:
    """The middle of a longer array of NaN, so that a write or a read outside shows."""
    whole = torch.full((len(x) + 2 * GUARD,), math.nan, dtype=x.dtype, device=x.device)
    whole[GUARD:-GUARD] = x
    return whole[GUARD:-GUARD]


def assert_guards_hold(x: torch.Tensor) -> None:
    whole = x.as_strided((len(x) + 2 * GUARD,), (1,), x.storage_offset() - GUARD)
    assert whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all()


def assert_two_errors(fast, same, exact, atol) -> None:
    """|fast - float64| <= 2 |reference in the same types - float64| + atol, element by element."""
    excess = (fast.double() - exact).abs() - 2 * (same.double() - exact).abs() - atol
    assert excess.max() <= 0, f"off by {excess.max().item():.2g} more than allowed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_is_torch_adam(dtype):
    r = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(333, generator=r).to(dtype))
    optimizer = torch.optim.Adam([parameter], lr=2e-4, betas=(0.5, 0.999), fused=False, foreach=False)
    p, m, v = parameter.detach().clone(), torch.zeros(333, dtype=dtype), torch.zeros(333, dtype=dtype)
    for number in range(1, 21):
        g = torch.randn(333, generator=r).to(dtype) * 0.01
        parameter.grad = g.clone()
        optimizer.step()
        lr, step = torch.tensor(2e-4, dtype=dtype), torch.tensor(number)
        adam(p, m, v, g, None, lr, step, beta1=0.5, beta2=0.999, impl="reference")
    eps = torch.finfo(dtype).eps
    state = optimizer.state[parameter]
    torch.testing.assert_close(m, state["exp_avg"], rtol=4 * eps, atol=0)
    torch.testing.assert_close(v, state["exp_avg_sq"], rtol=4 * eps, atol=0)
    torch.testing.assert_close(p, parameter.detach(), rtol=4 * eps, atol=20 * 2e-4 * 4 * eps)


SHAPES = [
    (1, torch.float32, torch.bfloat16, None, "one number"),
    (5, torch.bfloat16, torch.bfloat16, None, "less than a vector, bf16 gradient"),
    (BLOCK, torch.float16, torch.float16, 1024.0, "exactly one block, loss scale"),
    (BLOCK + 1, torch.float16, torch.float16, 3.0, "one more than a block, a scale that is no power of two"),
    (3 * BLOCK - 7, torch.float32, None, None, "no half copy"),
    (4 * BLOCK + 64, torch.bfloat16, torch.bfloat16, None, "a padded arena"),
]


def run_adam(impl, state, scale=None, found=None, step=3, lr=2e-4):
    lr, step = scalars(lr, step)
    tensor = {
        k: None if x is None else torch.tensor(x, device=DEVICE) for k, x in (("scale", scale), ("found_inf", found))
    }
    adam(*state, lr, step, beta1=0.5, beta2=0.999, impl=impl, **tensor)


def exact_adam(state, scale=None, step=3, lr=2e-4):
    """The same in float64, from the formula of the paper."""
    p, m, v, g = (t.double() for t in state[:4])
    g = g if scale is None else g / scale
    m, v = 0.5 * m + 0.5 * g, 0.999 * v + (1 - 0.999) * g * g
    return p - lr * (m / (1 - 0.5**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8), m, v


@needs_triton
@pytest.mark.parametrize(("n", "g_dtype", "half_dtype", "scale", "reason"), SHAPES, ids=[row[-1] for row in SHAPES])
def test_triton_against_float64(n, g_dtype, half_dtype, scale, reason):
    for step in (1, 2, 1000, 100_000):
        state = random_state(n, g_dtype, half_dtype, seed=step)
        exact = exact_adam(state, scale, step)
        same = [None if t is None else t.clone() for t in state]
        fast = [None if t is None else guarded(t) for t in state]
        run_adam("reference", same, scale, step=step)
        run_adam("triton", fast, scale, step=step)
        for name, f, s, e in zip("pmv", fast, same, exact, strict=False):
            ulp = torch.finfo(torch.float32).eps * e.abs().max().item()
            assert_two_errors(f, s, e, atol={"p": ulp + 2e-4 * 1e-6, "m": ulp, "v": ulp}[name])
        for x in (x for x in fast if x is not None):
            assert_guards_hold(x)
        if half_dtype is not None:  # one ulp: the interpreter truncates where a GPU rounds
            ulp = torch.finfo(half_dtype).eps * fast[0].abs() + torch.finfo(half_dtype).smallest_normal
            assert ((fast[4].float() - fast[0]).abs() <= ulp).all()


@needs_triton
@pytest.mark.parametrize("wrong", [{"scale": None}, {"step": 4}, {"lr": 2.001e-4}])
def test_comparison_notices(wrong):
    state = random_state(2000, torch.float16)
    right = {"scale": 1024.0, "step": 3, "lr": 2e-4}
    fast, same, exact = [t.clone() for t in state], [t.clone() for t in state], exact_adam(state, **right)
    run_adam("reference", same, **right)
    run_adam("triton", fast, **{**right, **wrong})
    with pytest.raises(AssertionError, match="more than allowed"):
        assert_two_errors(fast[0], same[0], exact[0], atol=torch.finfo(torch.float32).eps * 0.1 + 2e-4 * 1e-6)


if triton is not None:

    @jit
    def probe_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + offsets, _one_minus_exp(tl.load(x_ptr + offsets, offsets < n, other=0.0)), offsets < n)


@needs_triton
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999, 0.9999])
def test_bias_correction_is_accurate_for_100_000_steps(beta):
    step = torch.arange(1, 100_001, device=DEVICE)
    exact = -torch.expm1(step.double() * math.log(beta))
    x = step.float() * torch.tensor(math.log(beta), device=DEVICE)  # as the kernel has it
    ours = torch.full_like(x, math.nan)
    probe_kernel[(25,)](x, ours, len(x), BLOCK=4096)
    error = ((ours.double() - exact) / exact).abs().max()
    assert error < 4e-7
    if beta > 0.99:  # the plain formula would not do
        assert (((1 - x.exp()).double() - exact) / exact).abs().max() > 1e-6


ROWS = [
    ((2, 2, 6), (16, 7, 1), "short rows, odd distances"),
    ((3, 2, BLOCK + 5), (4 * BLOCK, 2 * BLOCK, 1), "rows of two blocks, in a layout of kernels"),
    ((1, 1, 5), (1, 1, 1), "one row, distances that mean nothing"),
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "strides", "reason"), ROWS, ids=[row[-1] for row in ROWS])
def test_rows_apart_are_as_if_together(shape, strides, reason, impl):
    together = random_state(math.prod(shape), torch.float16, torch.float16)
    apart = []
    for t in together:
        whole = torch.full((GUARD + shape[0] * strides[0] + GUARD,), math.nan, dtype=t.dtype, device=DEVICE)
        apart.append(whole.as_strided(shape, strides, GUARD).copy_(t.view(shape)))
    run_adam(impl, together, scale=8.0, found=0.0)
    run_adam(impl, apart, scale=8.0, found=0.0)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a.view(shape), b)
        whole = b.as_strided((b.untyped_storage().nbytes() // b.itemsize,), (1,), 0)
        assert whole.isnan().sum() == len(whole) - a.numel()  # nothing between the rows was written


@needs_triton
def test_bytes_are_those_of_the_rows():
    state = [t.as_strided((4, 2, 8), (64, 16, 1)) for t in random_state(256, torch.bfloat16)]
    with recorded() as tape:
        run_adam("triton", state)
    ((read, written),) = [(launch.read, launch.written) for launch in tape]
    assert (read, written) == (64 * 14, 64 * 14)  # p, m, v, g; p, m, v, half


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.5, 0.0), (0.0, 0.0)])
def test_betas_of_zero(impl, betas):
    p, m, v, g, half = random_state(10)
    before = p.clone()
    lr, step = scalars(step=1)
    adam(p, m, v, g, half, lr, step, beta1=betas[0], beta2=betas[1], impl=impl)
    assert p.isfinite().all() and (p != before).all()
    assert betas[0] or torch.equal(m, g)
    assert betas[1] or torch.allclose(v, g * g)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("n", [7, BLOCK + 3])
def test_overflow_changes_nothing(impl, n):
    state = random_state(n, torch.float16)
    state[4].fill_(2.0)
    state[3][n // 2] = math.inf
    before = [t.clone() for t in state]
    run_adam(impl, state, scale=1024.0, found=1.0)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    state[3][n // 2] = 0.0
    run_adam(impl, state, scale=1024.0, found=0.0)
    assert (state[1] != before[1]).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "value", "found"),
    [
        (torch.float32, torch.finfo(torch.float32).max, 0),
        (torch.float32, math.inf, 1),
        (torch.float16, 65504.0, 0),
        (torch.float16, -math.inf, 1),
        (torch.bfloat16, -3e38, 0),
        (torch.bfloat16, math.nan, 1),
    ],
)
def test_found_inf(impl, dtype, value, found):
    n = 2 * BLOCK + 5
    for position in (0, BLOCK - 1, BLOCK, n - 1):
        g = torch.zeros(n, dtype=dtype, device=DEVICE)
        g[position] = value
        flag = torch.zeros((), device=DEVICE)
        found_inf_(guarded(g), flag, impl=impl)  # the guards are NaN: only g may count
        assert flag == found


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_found_inf_of_many_programs_and_stays_set(impl):
    flag = torch.zeros((), device=DEVICE)
    found_inf_(torch.full((5 * BLOCK,), math.nan, device=DEVICE), flag, impl=impl)
    assert flag == 1
    found_inf_(torch.zeros(5, device=DEVICE), flag, impl=impl)
    assert flag == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("images", "found", "steps"), [(1, None, 1), (16, 0.0, 1), (10, 1.0, 0)])
def test_advance(impl, images, found, steps):
    counters = torch.tensor([2**62, 2**32 - 1, 2**33], device=DEVICE)
    adam_step = torch.tensor(41, device=DEVICE)
    flag = None if found is None else torch.tensor(found, device=DEVICE)
    advance(counters, adam_step, images, flag, impl=impl)
    assert counters.tolist() == [2**62, 2**32, 2**33 + images]
    assert adam_step == 41 + steps


def test_refusals_name_every_reason():
    p, m, v, g, half = random_state(8)
    assert not_supported_reasons(p, m, v, g, half) == []
    reasons = not_supported_reasons(p, m[:7], v.half(), g.repeat(2)[::2], half)
    assert [r.split()[0] for r in reasons] == ["m", "g", "v"]
    lr, step = scalars()
    with pytest.raises(NotSupported, match=r"m \(7,\) is not shaped like p; v is torch.float16"):
        adam(p, m[:7], v.half(), g, half, lr, step, beta1=0.5, beta2=0.999, impl="triton")
    assert not_supported_reasons(*(t.view(2, 2, 2) for t in (p, m, v, g, half))) == []
    assert not_supported_reasons(*(t.view(2, 4) for t in (p, m, v, g, half))) == [
        "p (2, 4) is neither [n] nor [A, B, n]"
    ]
    columns = [t.view(2, 2, 2).mT for t in (p, m, v, g)]
    assert not_supported_reasons(*columns, None)[0] == "p has strides (4, 1, 2); (4, 1, 1) are needed"
    with pytest.raises(NotSupported, match="g is not contiguous"):
        found_inf_(g[::2], torch.zeros((), device=DEVICE), impl="triton")
    with pytest.raises(NotSupported, match="counters with strides"):
        advance(torch.zeros(6, dtype=torch.int64, device=DEVICE)[::2], step, 1, impl="triton")

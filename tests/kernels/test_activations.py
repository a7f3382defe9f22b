"""The table against autograd, and its kernel rows against the table, at kinks and extremes too."""

from __future__ import annotations

import pytest
import torch

from fastpix2pix.kernels._triton import jit, tl
from fastpix2pix.kernels.activations import ACTIVATIONS, activate, times_derivative
from tests.kernels.common import DEVICE, needs_triton

EXTREMES = [0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e38, -1e38, float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_against_autograd(name):
    h = torch.linspace(-4, 4, 100, dtype=torch.float64, requires_grad=True)
    ACTIVATIONS[name].forward(h).sum().backward()
    derivative = ACTIVATIONS[name].derivative(h.detach())
    torch.testing.assert_close(derivative, h.grad, rtol=1e-12, atol=1e-12)
    if name != "tanh":
        assert set(derivative[h < 0].tolist()) == {ACTIVATIONS[name].slope}


def test_ids_are_distinct():
    assert sorted(row.id for row in ACTIVATIONS.values()) == list(range(len(ACTIVATIONS)))


@jit
def _activation_kernel(h, g, y, d, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(h + i, mask=i < n, other=0.0)
    tl.store(y + i, activate(v, ACT), mask=i < n)
    tl.store(d + i, times_derivative(tl.load(g + i, mask=i < n, other=0.0), v, ACT), mask=i < n)


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kernels_follow_the_table(name):
    """Equal where it is only a choice; tanh is within a few roundings of 1. A NaN stays a NaN."""
    row = ACTIVATIONS[name]
    h = torch.cat([torch.tensor(EXTREMES), torch.randn(80, generator=torch.Generator().manual_seed(1)) * 3]).to(DEVICE)
    g = torch.linspace(-2, 2, len(h), device=DEVICE)
    y, d = torch.full((2, len(h)), 777.0, device=DEVICE).unbind()
    _activation_kernel[(1,)](h, g, y, d, len(h), ACT=row.id, BLOCK=128)
    exact = name != "tanh"
    atol = 0 if exact else 5e-7
    torch.testing.assert_close(y, row.forward(h), rtol=0, atol=atol, equal_nan=True)
    torch.testing.assert_close(d, g * row.derivative(h), rtol=0, atol=2 * atol, equal_nan=True)
    assert y[len(EXTREMES) - 1].isnan()

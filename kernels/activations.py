"""The activations as rows of a table: name, id in the kernels, slope for negative values, torch function."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import jit, tl


class Activation(NamedTuple):
    """One row."""

    id: int  # what the kernels switch on
    slope: float  # derivative for negative input, of the piecewise linear ones
    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]  # of the input


def _leaky_derivative(h: Tensor) -> Tensor:
    return torch.where(h > 0, torch.ones_like(h), 0.2)  # two scalars would round 0.2 to fp32, whatever h is


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(0, 1.0, lambda h: h, torch.ones_like),
    "leaky": Activation(1, 0.2, lambda h: F.leaky_relu(h, 0.2), _leaky_derivative),
    "relu": Activation(2, 0.0, F.relu, lambda h: (h > 0).to(h.dtype)),
    "tanh": Activation(3, 1.0, torch.tanh, lambda h: 1 - torch.tanh(h) ** 2),
}


@jit
def _tanh(h):
    return 2.0 / (1.0 + tl.exp(-2.0 * h)) - 1.0  # exp overflows to inf, and 2 / inf - 1 is the right -1


@jit
def activate(
    h,  # fp32 block
    ACT: tl.constexpr,  # id of ACTIVATIONS
):
    """The activation inside a kernel. A NaN stays one, as in torch: a diverged run must not look healthy."""
    if ACT == 1:
        h = tl.maximum(h, 0.2 * h)  # of NaN and NaN it is NaN
    elif ACT == 2:
        h = tl.where(h <= 0, 0.0, h)
    elif ACT == 3:
        h = _tanh(h)
    return h


@jit
def times_derivative(
    g,  # fp32 block: gradient of the activation's output
    h,  # fp32 block: its input
    ACT: tl.constexpr,  # id of ACTIVATIONS
):
    """The gradient of the activation's input inside a kernel."""
    if ACT == 1:
        g = tl.where(h > 0, g, 0.2 * g)
    elif ACT == 2:
        g = tl.where(h > 0, g, 0.0)
    elif ACT == 3:
        t = _tanh(h)
        g = g * (1.0 - t * t)
    return g

"""What the products of a convolution have in common: every output pixel gathers a few taps of an input map.

A forward convolution, a transposed one and the input gradients of both are the same sum with other numbers. Per
dimension, with parity p in 0..parities-1:

    out[q * parities + p] = sum over t < taps of  in[q * step + first + p + t] @ w[k0 - p + kstep * t]

and the input is zero outside its map. Kernels are channels-last in memory: [d0, taps, taps, d1].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import jit, tl
from .activations import ACTIVATIONS


class Gather(NamedTuple):
    """The numbers of one such sum, equal in both dimensions."""

    kernel: int  # taps a side of the kernel
    taps: int  # taps a side that an output pixel gathers
    step: int
    first: int
    k0: int
    kstep: int
    parities: int  # 1, or 2 where neighbouring output pixels gather different taps
    inner_first: bool  # the kernel's first dimension is summed over, else its second

    def channels(self, w: tuple[int, ...]) -> tuple[int, int]:
        """(summed over, produced) of a kernel [d0, d1, k, k]."""
        return (w[0], w[1]) if self.inner_first else (w[1], w[0])

    def strides(self, w: tuple[int, ...]) -> tuple[int, int, int]:
        """(per tap, per channel summed over, per channel produced), in elements.

        From the shape: the strides of a tensor with a dimension of 1 do not tell its memory format.
        """
        _, d1, side, _ = w
        outer = side * side * d1
        return (d1, outer, 1) if self.inner_first else (d1, 1, outer)

    def useful_taps(self, size: int, outputs: int) -> list[range]:
        """Per parity, the taps that meet the input for some of `outputs` values of q, on a map of `size` pixels."""
        found = []
        for parity in range(self.parities):
            first = self.first + parity
            low = max(0, -(first + (outputs - 1) * self.step))
            found.append(range(low, max(low, min(self.taps, size - first))))
        return found


class Geometry(NamedTuple):
    """A convolution layer, as torch describes it."""

    kernel: int
    stride: int
    padding: int
    transposed: bool = False

    def not_supported_reasons(self) -> list[str]:
        """Why it is not a Gather in both directions."""
        if self.transposed or self.stride == 2:
            known = (self.kernel, self.stride, self.padding) == (4, 2, 1)
        else:
            known = self.stride == 1 and self.padding < self.kernel
        kind = "transposed " if self.transposed else ""
        what = f"{kind}{self.kernel}x{self.kernel} stride {self.stride} padding {self.padding}"
        return [] if known else [f"{what}; allowed are 4x4 stride 2 padding 1, and stride 1 if not transposed"]

    def forward(self) -> Gather:
        """The layer's output from its input."""
        return self._halving() if not self.transposed else self._doubling()

    def dgrad(self) -> Gather:
        """The gradient of its input from that of its output."""
        if self.transposed:
            return self._halving()
        if self.stride == 2:
            return self._doubling()
        k, p = self.kernel, self.padding
        return Gather(k, k, 1, p - k + 1, k - 1, -1, 1, True)

    def output(self, size: int) -> int:
        """Pixels a side of the output."""
        return 2 * size if self.transposed else (size + 2 * self.padding - self.kernel) // self.stride + 1

    def _halving(self) -> Gather:
        return Gather(self.kernel, self.kernel, self.stride, -self.padding, 0, 1, 1, False)

    def _doubling(self) -> Gather:
        return Gather(self.kernel, 2, 1, -1, 3, -2, 2, True)


class Map(NamedTuple):
    """Images of a tensor of rows [images * height * width, C]."""

    images: int
    height: int
    width: int

    @property
    def rows(self) -> int:
        return self.images * self.height * self.width


class Source(NamedTuple):
    """What a product reads: activation(scale * rows + shift), computed while loading.

    Two sources side by side are the concatenation of their channels.
    """

    rows: Tensor  # [M, C], row stride >= C
    activation: str = "none"  # a name of ACTIVATIONS
    scale: Tensor | None = None  # [groups, C] fp32, with shift
    shift: Tensor | None = None

    def value(self) -> Tensor:
        """The specification: [M, C] in the rows' dtype, computed in at least fp32."""
        if self.scale is None and self.activation == "none":
            return self.rows
        h = self.rows.to(torch.promote_types(self.rows.dtype, torch.float32))
        if self.scale is not None:
            assert self.shift is not None
            groups, channels = self.scale.shape
            h = (h.reshape(groups, -1, channels) * self.scale[:, None] + self.shift[:, None]).view(-1, channels)
        return ACTIVATIONS[self.activation].forward(h).to(self.rows.dtype)


@jit
def dot(
    a,  # [m, k] half or fp32
    b,  # [k, n]
    acc,  # [m, n] fp32
    UPCAST: tl.constexpr,
):
    """acc + a @ b. The interpreter's products of bf16 are wrong: there, and only there, operands are widened."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")

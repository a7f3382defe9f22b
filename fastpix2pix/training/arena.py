"""Flat arenas: all parameters of a network, their moments and gradients, and the half copies convolutions read.

Two segments per network, because their gradients differ in dtype: `weights` (the 4x4 and 3x3 kernels; gradients in the
compute dtype, as the convolutions write them) and `vectors` (gamma, beta, biases; gradients in fp32). Each tensor is
padded to 256 bytes and seen through a view; kernels are channels-last views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGN = 64  # elements: 256 bytes of fp32, 128 of half


@dataclass(frozen=True)
class Segment:
    """Flat arrays of equal length, or the same part of each."""

    p: Tensor  # [n] fp32 master parameters
    m: Tensor  # [n] fp32 first moment
    v: Tensor  # [n] fp32 second moment
    g: Tensor  # [n] gradient
    half: Tensor | None  # [n] half copy of p; None in fp32

    def part(self, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Segment:
        """A part of each array, by numbers from its beginning."""
        p, m, v, g = (t.as_strided(shape, strides, offset) for t in (self.p, self.m, self.v, self.g))
        return Segment(p, m, v, g, None if self.half is None else self.half.as_strided(shape, strides, offset))


class Arena:
    """Owns a network's parameters: the module's own become views of `p`, so that it goes on working as it is.

    By name, in the parameter's shape: `compute` (what a pass reads: half kernels, fp32 vectors), `gradients` (what it
    writes), `moments` (first and second).
    """

    def __init__(self, net: nn.Module, compute_dtype: torch.dtype) -> None:
        self.net = net
        named = dict(net.named_parameters())
        half = None if compute_dtype == torch.float32 else compute_dtype
        self.weights = _segment([p for p in named.values() if p.ndim == 4], half, compute_dtype)
        self.vectors = _segment([p for p in named.values() if p.ndim != 4], None, torch.float32)
        self.compute: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.addresses: dict[str, int] = {}
        at = {"weights": 0, "vectors": 0}
        for name, parameter in named.items():
            kind = "weights" if parameter.ndim == 4 else "vectors"
            segment: Segment = getattr(self, kind)
            shape, offset = parameter.shape, at[kind]
            at[kind] += _padded(parameter.numel())
            master = _view(segment.p, shape, offset)
            with torch.no_grad():
                master.copy_(parameter)
                parameter.data = master
            self.compute[name] = master if segment.half is None else _view(segment.half, shape, offset)
            self.gradients[name] = _view(segment.g, shape, offset)
            self.moments[name] = _view(segment.m, shape, offset), _view(segment.v, shape, offset)
            self.addresses[name] = parameter.data_ptr()
        self.refresh()

    @property
    def segments(self) -> tuple[Segment, Segment]:
        """Both, in the order they are updated."""
        return self.weights, self.vectors

    def without_border(self, kernels: Sequence[str]) -> list[Segment]:
        """The segments less the outer 12 of the 16 taps of the 4x4 kernels named, which follow the arena's order.

        A kernel's middle taps are two runs of 2 I numbers for every O: one part [O, 2, 2 I] per kernel.
        """
        parts: list[Segment] = []
        start = 0
        for name in kernels:
            kernel = self.gradients[name]
            outer, inner, *_ = kernel.shape
            offset = int(kernel.storage_offset())
            if offset > start:
                parts.append(self.weights.part(start, (offset - start,), (1,)))
            parts.append(self.weights.part(offset + 5 * inner, (outer, 2, 2 * inner), (16 * inner, 4 * inner, 1)))
            start = offset + _padded(kernel.numel())
        parts.append(self.weights.part(start, (len(self.weights.p) - start,), (1,)))
        return [*parts, self.vectors]

    def border_is_at_rest(self, kernels: Sequence[str]) -> bool:
        """Whether both moments of those 12 taps are 0. Reads the device, once."""
        moments = [moment for name in kernels for moment in self.moments[name]]
        moving = [moment.count_nonzero() - moment[..., 1:3, 1:3].count_nonzero() for moment in moments]
        return not moving or not torch.stack(moving).any().item()

    def refresh(self) -> None:
        """Write the half copies anew, after something else than the optimiser changed the parameters in place."""
        for segment in self.segments:
            if segment.half is not None:
                segment.half.copy_(segment.p)

    def check_addresses(self) -> None:
        """Raise where a parameter of the network no longer lies in the arena (`.to()`, `assign=True`, a swap)."""
        moved = [name for name, p in self.net.named_parameters() if p.data_ptr() != self.addresses[name]]
        if moved:
            raise RuntimeError(
                f"{len(moved)} parameters have left the arena ({', '.join(moved[:3])} ...): load weights in place"
            )


def _segment(parameters: list[nn.Parameter], half: torch.dtype | None, gradient: torch.dtype) -> Segment:
    count = sum(_padded(p.numel()) for p in parameters)
    device = parameters[0].device if parameters else torch.device("cpu")

    def zeros(dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    wide = torch.float32
    return Segment(zeros(wide), zeros(wide), zeros(wide), zeros(gradient), None if half is None else zeros(half))


def _padded(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def _view(
    flat: Tensor,  # [n]
    shape: torch.Size,  # (O, I, kh, kw), or (C,)
    offset: int,
) -> Tensor:
    """A tensor of that shape inside the flat array; kernels lie channels-last: O, kh, kw, I."""
    if len(shape) != 4:
        return flat[offset : offset + shape.numel()].view(shape)
    _, inner, height, width = shape
    return flat.as_strided(shape, (inner * height * width, 1, width * inner, inner), flat.storage_offset() + offset)


Parameters = Mapping[str, Tensor]  # state name -> tensor, as in Arena.compute and Arena.gradients

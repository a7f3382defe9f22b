"""Flat arenas: all parameters of a network, their moments and gradients, and the half copies convolutions read.

Two segments per network, because their gradients differ in dtype: `weights` (the 4x4 and 3x3 kernels; gradients in the
compute dtype, as the convolutions write them) and `vectors` (gamma, beta, biases; gradients in fp32). Each tensor is
padded to 256 bytes and seen through a view; kernels are channels-last views. A kernel's gradient may also stay where
the library makes it (`update_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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

        def cut(t: Tensor) -> Tensor:
            return t.as_strided(shape, strides, int(t.storage_offset()) + offset)

        half = None if self.half is None else cut(self.half)
        return Segment(cut(self.p), cut(self.m), cut(self.v), cut(self.g), half)


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
        self.kernels: dict[str, Segment] = {}  # each one's numbers alone, in the arena's order
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
            if kind == "weights":
                self.kernels[name] = segment.part(offset, (parameter.numel(),), (1,))
            self.addresses[name] = parameter.data_ptr()
        self.refresh()

    @property
    def segments(self) -> tuple[Segment, Segment]:
        """Both, in the order they are updated."""
        return self.weights, self.vectors

    def updates(self, idle: Collection[str] = (), taken: Collection[str] = ()) -> list[Segment]:
        """What one update goes over: all of the arena, in as few parts as there can be, but for kernels by name.

        idle: 4x4 kernels of which only the middle taps are updated; taken: kernels that are updated on their own.
        """
        parts: list[Segment] = []
        start = end = 0
        for name, kernel in self.kernels.items():
            after = end + _padded(len(kernel.p))
            if name in idle or name in taken:
                if end > start:
                    parts.append(self.weights.part(start, (end - start,), (1,)))
                if name not in taken:
                    parts.append(self._middle(name, kernel))
                start = after
            end = after
        if end > start:
            parts.append(self.weights.part(start, (end - start,), (1,)))
        return [*parts, self.vectors]

    def update_of(self, name: str, gradient: Tensor, idle: Collection[str] = ()) -> Segment:
        """What the update of one kernel goes over where its gradient lies elsewhere, channels-last."""
        kernel = self.kernels[name]
        kernel = replace(kernel, g=gradient.as_strided(kernel.p.shape, (1,)))
        return self._middle(name, kernel) if name in idle else kernel

    def _middle(self, name: str, kernel: Segment) -> Segment:
        """The 4 of 16 taps of a 4x4 kernel: two runs of 2 I numbers for every O, [O, 2, 2 I]."""
        outer, inner, *_ = self.compute[name].shape
        return kernel.part(5 * inner, (outer, 2, 2 * inner), (16 * inner, 4 * inner, 1))

    def border_is_at_rest(self, kernels: Sequence[str]) -> bool:
        """Whether both moments of these kernels' outer 12 taps are 0. Reads the device, once."""
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


class Gradients(NamedTuple):
    """Where a backward pass leaves the gradients of the parameters."""

    arrays: Parameters  # written, by name
    accumulate: bool = False  # added to instead
    # given a kernel's name and gradient (channels-last) where the library made it, in place of a copy into `arrays`;
    # nothing in the pass reads that kernel afterwards
    take: Callable[[str, Tensor], None] | None = None

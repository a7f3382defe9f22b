"""Flat arenas: all parameters of a network, their moments and gradients, and the half copies convolutions read.

Two segments per network, because their gradients differ in dtype: `weights` (the 4x4 and 3x3 kernels; gradients in the
compute dtype, as the convolutions write them) and `vectors` (gamma, beta, biases; gradients in fp32). Each tensor is
padded to 256 bytes and seen through a view; kernels are channels-last views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGN = 64  # elements: 256 bytes of fp32, 128 of half


@dataclass(frozen=True)
class Segment:
    """Flat arrays of equal length."""

    p: Tensor  # [n] fp32 master parameters
    m: Tensor  # [n] fp32 first moment
    v: Tensor  # [n] fp32 second moment
    g: Tensor  # [n] gradient
    half: Tensor | None  # [n] half copy of p; None in fp32


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

"""Pictures too large for one pass: translated in overlapping squares, blended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import Fitted
from ..errors import InputError
from .engine import Engine

OVERLAP = 4  # a quarter of the side


class Tiles:
    """Squares of `side` pixels that overlap by a quarter, weighted by their distance from the edge.

    Only for a generator with running statistics: with each picture's own, a tile would have others than the whole.
    """

    def __init__(self, translate: Callable[[Tensor], Tensor], side: int) -> None:
        self._translate, self._side = translate, side

    def __call__(
        self,
        pictures: Tensor,  # [N, C, H, W] float32 in [-1, 1]
    ) -> Tensor:  # [N, C', H, W] on the CPU
        height, width = pictures.shape[-2:]
        tall, wide = min(self._side, height), min(self._side, width)
        weight = _ramp(tall)[:, None] * _ramp(wide)
        blended, weights = None, torch.zeros(height, width)
        for top in _starts(height, tall):
            for left in _starts(width, wide):
                here = (..., slice(top, top + tall), slice(left, left + wide))
                output = self._translate(pictures[here].contiguous(memory_format=torch.channels_last)).cpu()
                if blended is None:
                    blended = output.new_zeros(len(output), output.shape[1], height, width)
                blended[here] += output * weight
                weights[here] += weight
        assert blended is not None
        return blended / weights


class TiledEngine:
    """An engine whose pictures are translated in tiles; one noise for all tiles of a picture."""

    def __init__(self, engine: Engine, side: int) -> None:
        self._engine, self._side = engine, side

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def translate(
        self,
        batch: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1]
        first: int = 0,  # running number of the first image
    ) -> Tensor:  # [N, out_channels, H, W] float32, on the CPU
        def translate(tiles: Tensor) -> Tensor:
            return self._engine.translate(tiles.to(self._engine.device), first)

        return Tiles(translate, self._side)(batch)


def check_tiles(engine: Engine, options: Fitted) -> None:
    """Refuse fit = tile where tiles would not add up to the whole, or are of no size that the model takes."""
    if options.fit != "tile":
        return
    if engine.modes.norm_stats != "running":
        raise InputError(
            "fit = tile: a tile has other image statistics than the whole; use norm_stats = running, or fit = pad"
        )
    if options.tile % engine.multiple:
        raise InputError(f"tile = {options.tile}: this model takes multiples of {engine.multiple} pixels")


def _starts(length: int, side: int) -> list[int]:
    """Where tiles begin: evenly spaced, so that neighbours overlap by a quarter or more."""
    step = side - side // OVERLAP
    count = 1 + -(-(length - side) // step)
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def _ramp(side: int) -> Tensor:
    """Weight by the distance from the nearer end, 1 in the middle half."""
    distance = torch.minimum(torch.arange(side), torch.arange(side - 1, -1, -1)) + 1.0
    return (distance / (side // OVERLAP + 1)).clamp(max=1.0)

"""Images to calibrate quantisation on, and to compare a build with the generator on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import Build, Direction, Generator
from ..data.images import to_unit
from ..data.pairs import Pair, find_pairs, read_pair
from ..data.synthetic import facade
from ..errors import InputError

T = TypeVar("T")
_SEED = 0  # of painted facades
_GATE_FIRST = 1_000_000  # index of the first facade of the gate: none of those calibrated on


@dataclass(frozen=True)
class Samples:
    """Images of both uses; no image serves both, as far as there are enough."""

    calibration: tuple[Tensor, ...]  # [1, C, H, W] fp32 in [-1, 1], of the usual size
    gate: tuple[tuple[str, Tensor], ...]  # (name, [C, H, W] uint8)
    source: str  # where they come from, for the report


def samples(
    build: Build,
    config: Generator,
    direction: Direction,
    sizes: Sequence[tuple[int, int]],  # (height, width): one, or smallest, usual and largest
    calibrate: bool,  # whether calibration images are needed
) -> Samples:
    """Inputs for a generator, from the pairs at build.calibration, else painted facades.

    Of a data folder, evenly spread and resized: its validation pairs for the gate (its training pairs where it has
    none), its training pairs for calibration. Of three sizes the first gate image has the smallest, the second the
    largest and all others the usual one. Raises InputError for a bad data folder.
    """
    usual = sizes[len(sizes) // 2]
    gate_sizes = [sizes[0], sizes[-1]] if len(sizes) == 3 else []
    count = build.calibration_images if calibrate else 0

    def gate_size(number: int) -> tuple[int, int]:
        return gate_sizes[number] if number < len(gate_sizes) else usual

    if build.calibration is None:
        chosen = [(f"facade {i}", i) for i in range(_GATE_FIRST, _GATE_FIRST + build.gate_images)]
        gate = [(name, _painted(i, direction, config.in_channels, *gate_size(n))) for n, (name, i) in enumerate(chosen)]
        calibration = [_painted(i, direction, config.in_channels, *usual) for i in range(count)]
        source = "painted facades"
    else:
        root = Path(build.calibration)
        train = find_pairs(root, "train")
        try:
            held_out = find_pairs(root, "val")
        except InputError:  # no such split
            held_out = train

        def read(pair: Pair, size: tuple[int, int]) -> np.ndarray:
            image = read_pair(pair, direction, config.in_channels, config.out_channels)[0]
            return _fitted(image, *size)

        gate = [(pair.name, read(pair, gate_size(n))) for n, pair in enumerate(_spread(held_out, build.gate_images))]
        calibration = [read(pair, usual) for pair in _spread(train, count)]
        source = str(root)
    return Samples(
        tuple(to_unit(_chw(image))[None] for image in calibration),
        tuple((name, _chw(image)) for name, image in gate),
        source,
    )


def _painted(index: int, direction: Direction, channels: int, height: int, width: int) -> np.ndarray:
    """The input half of a painted facade, uint8 [height, width, channels]; more than 3 channels go on in the other."""
    label, picture = facade(_SEED, index, max(height, width))
    both = (label, picture) if direction == "AtoB" else (picture, label)
    stacked = np.concatenate(both * -(-channels // 6), axis=-1)[..., :channels]
    return _fitted(stacked, height, width)


def _fitted(
    image: np.ndarray,  # [H, W, C] uint8
    height: int,
    width: int,
) -> np.ndarray:  # [height, width, C] uint8
    """Pillow's bicubic, every channel by itself, as validation images are resized."""
    if image.shape[:2] == (height, width):
        return image
    planes = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])]
    return np.stack([np.asarray(p.resize((width, height), Image.Resampling.BICUBIC)) for p in planes], axis=-1)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Up to `count` items, evenly spread over all."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

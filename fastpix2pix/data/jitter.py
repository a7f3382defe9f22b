"""Order and jitter of training: the specification that every loader follows.

Random numbers are raw 64-bit outputs of Philox, keyed by the seed and counted by (index, epoch): numpy guarantees the
stream of a bit generator for ever, and not what Generator's methods make of it. Nothing has a state: an item's
position in the endless training order says everything, so a loader resumes at any position with any number of workers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import InputError

_DRAW, _ORDER = 0, 1  # the two uses of a seed have streams of their own


class Jitter(NamedTuple):
    """What happens to both images of a pair."""

    y: int  # top of the crop, pixels
    x: int  # left of the crop, pixels
    flip: bool  # mirrored left-right, after the crop


def _raw(seed: int, use: int, epoch: int, index: int, count: int) -> np.ndarray:
    """count raw outputs, uint64. The first counter word is Philox' own and starts at 0."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed = {seed}: allowed are 0 to 2**64 - 1")
    counter = np.array([0, index, epoch, use], np.uint64)
    return np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter).random_raw(count)


def draw(seed: int, epoch: int, index: int, load: int, crop: int, flip: bool) -> Jitter:
    """Offsets 0 to load - crop, inclusive and uniform, and a flip with probability 0.5 (never where flip is False).

    Pure; y, x and flip come from the first, second and third raw output, whether or not they matter.
    """
    y, x, side = (int(r) for r in _raw(seed, _DRAW, epoch, index, 3))
    room = load - crop + 1
    return Jitter((y * room) >> 64, (x * room) >> 64, flip and bool(side >> 63))


@lru_cache(maxsize=4)  # workers ask item by item
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of 0 .. n-1, int64 [n], read-only: the stable order of n raw outputs."""
    permutation = np.argsort(_raw(seed, _ORDER, epoch, 0, n), kind="stable").astype(np.int64)
    permutation.setflags(write=False)
    return permutation


def position(p: int, n: int) -> tuple[int, int]:
    """(epoch, rank in that epoch's order) of the p-th item ever seen, p from 0, of n pairs.

    Training sees the epochs' orders one after another without a gap, so no batch is partial, and the loader's whole
    state is the number of items seen.
    """
    return divmod(p, n)


def item(seed: int, p: int, n: int) -> tuple[int, int]:
    """(epoch, index of the pair) at position p."""
    epoch, rank = position(p, n)
    return epoch, int(order(seed, epoch, n)[rank])


def resize(
    image: np.ndarray,  # [H, W, C] uint8, C = 1, 3 or 4
    size: int | tuple[int, int],  # both sides, or height and width
) -> np.ndarray:
    """Pillow's bicubic (with antialiasing) to [*size, C]; an image of that size already is returned as it is.

    Every channel is resized by itself, the fourth like the others.
    """
    height, width, channels = image.shape
    tall, wide = (size, size) if isinstance(size, int) else size
    if (height, width) == (tall, wide):
        return image
    # CMYK stands for any four channels: as RGBA, Pillow would weight the colours by the alpha.
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    picture = Image.frombytes(mode, (width, height), np.ascontiguousarray(image).tobytes())
    return np.asarray(picture.resize((wide, tall), Image.Resampling.BICUBIC)).reshape(tall, wide, channels)


def apply(
    image: np.ndarray,  # [H, W, C] uint8
    jitter: Jitter,
    load: int,
    crop: int,
) -> np.ndarray:
    """Resize to load x load, crop at the jitter's offsets, mirror: uint8 [crop, crop, C].

    A|B files are split first: each half is resized by itself, and both get the same jitter.
    """
    part = resize(image, load)[jitter.y : jitter.y + crop, jitter.x : jitter.x + crop]
    return part[:, ::-1] if jitter.flip else part


def whole(
    image: np.ndarray,  # [H, W, C] uint8
    size: int,
) -> np.ndarray:
    """The transform of validation and test: the whole image resized to [size, size, C]."""
    return resize(image, size)

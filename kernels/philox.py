"""Counter-based random bits (Philox 4x32-10, Salmon et al. 2011), and the dropout masks made of them.

A mask element depends on its key alone, never on a state: (seed, block, step, image, position). So a step that is
repeated after a resume, split into other batches or run by another implementation drops the same elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import jit, tl

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class Noise(NamedTuple):
    """The key of one dropout layer for one batch."""

    counters: Tensor  # [3] int64 on the device: seed, step, running number of the batch's first image
    block: int  # number of the up-block
    per_image: bool = True  # False: one mask for every image (noise = fixed)


def philox(
    seed: Tensor,  # [] int64
    c0: Tensor,  # int64 counters in [0, 2**32), broadcast against each other
    c1: Tensor,
    c2: Tensor,
    c3: Tensor,
) -> Tensor:  # int64 in [0, 2**32): the first of the four output words
    """What `triton.language.philox(seed, c0, c1, c2, c3)[0]` computes, in int64."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps at 64 bits: the low and high words stay right
        c0, c1, c2, c3 = ((b >> 32) ^ c1 ^ k0) & _WORD, b & _WORD, ((a >> 32) ^ c3 ^ k1) & _WORD, a & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0


def dropout_mask(
    noise: Noise,
    images: int,
    positions: int,  # h * w of one image
    channels: int,
) -> Tensor:  # [images * positions, channels] bool, True where kept (probability 0.5)
    """Keep where the top bit of philox(seed; position * channels + channel, image, step, block) is 0.

    `image` is counters[2] + i, or 0 for every image where `per_image` is False.
    """
    seed, step, first = noise.counters.unbind()
    element = torch.arange(positions * channels, device=seed.device)
    image = torch.arange(images, device=seed.device)[:, None]
    image = (first + image) & _WORD if noise.per_image else image * 0
    word = philox(seed, element, image, (step & _WORD).view(1), torch.full_like(element[:1], noise.block))
    return (word < 1 << 31).view(images * positions, channels)


@jit
def dropout_scale(
    counters,  # [3] int64, as in Noise
    block,  # int, as in Noise
    row,  # [BM] int32, numbers of rows of [images * positions, C]
    col,  # [BC] int32, numbers of channels
    positions,  # int, rows of one image
    C,  # int, channels
    PER_IMAGE: tl.constexpr,
):  # [BM, BC] fp32
    """2 where `dropout_mask` keeps, else 0, inside a kernel."""
    element = (row % positions)[:, None] * C + col[None, :]
    image = (row // positions).to(tl.int64)
    image = tl.load(counters + 2) + image if PER_IMAGE else image * 0
    step = tl.load(counters + 1).to(tl.uint32)
    word = tl.philox(tl.load(counters), element.to(tl.uint32), image.to(tl.uint32)[:, None], step, block)[0]
    return tl.where((word >> 31) == 0, 2.0, 0.0)

"""The random stream: known answers, both implementations bit for bit, and what a mask may depend on."""

from __future__ import annotations

import pytest
import torch

from fastpix2pix.kernels._triton import jit, tl
from fastpix2pix.kernels.philox import Noise, dropout_mask, dropout_scale, philox
from tests.kernels.common import DEVICE, needs_triton


def tensor(value) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=DEVICE)


def noise(seed=3, step=1, first=0, block=0, per_image=True) -> Noise:
    return Noise(tensor([seed, step, first]), block, per_image)


KNOWN = [  # key, counters, first word: the known-answer vectors of the paper's own library, Random123
    (0, (0, 0, 0, 0), 0x6627E8D5),
    (-1, (0xFFFFFFFF,) * 4, 0x408F276D),
    (0x299F31D0_A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
]


@pytest.mark.parametrize(("seed", "counters", "word"), KNOWN)
def test_known_answers(seed, counters, word):
    assert philox(tensor(seed), *(tensor(c) for c in counters)).item() == word


def test_pinned_masks():
    """A changed stream would change every run that is resumed: these never change."""
    small = dropout_mask(noise(seed=7, step=5, first=2**32 - 1, block=2), 2, 2, 8).int().tolist()
    assert ["".join(map(str, row)) for row in small] == ["01110000", "11001011", "00100011", "10100011"]
    assert dropout_mask(noise(), 2, 4, 512).sum().item() == 2031


@jit
def _scale_kernel(
    counters, out, block, positions, rows, C, PER_IMAGE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    scale = dropout_scale(counters, block, row, col, positions, C, PER_IMAGE)
    tl.store(out + row[:, None] * C + col[None, :], scale, mask=(row < rows)[:, None] & (col < C)[None, :])


MASKS = [  # noise, images, positions, channels, why
    (noise(), 1, 4, 512, "d8 at batch 1"),
    (noise(seed=2**40 + 12345), 3, 25, 5, "a seed of more than 32 bits, odd shapes"),
    (noise(seed=-2), 2, 16, 64, "a negative seed"),
    (noise(seed=2**63 - 1, step=2**33 + 9), 2, 3, 33, "a step of more than 32 bits"),
    (noise(first=2**32 - 2), 4, 4, 8, "the image counter wraps"),
    (noise(block=2, first=77), 3, 1, 1, "one element per image"),
    (noise(block=1, per_image=False, first=5), 3, 4, 40, "a fixed mask"),
]


@needs_triton
@pytest.mark.parametrize(("key", "images", "positions", "channels", "why"), MASKS)
def test_kernels_drop_the_same_elements(key, images, positions, channels, why):
    rows = images * positions
    scale = torch.full((rows, channels), float("nan"), device=DEVICE)
    _scale_kernel[(-(-channels // 32), -(-rows // 16))](
        key.counters, scale, key.block, positions, rows, channels, PER_IMAGE=key.per_image, BM=16, BC=32
    )
    assert torch.equal(scale, 2.0 * dropout_mask(key, images, positions, channels))


def test_mask_does_not_depend_on_how_images_are_batched():
    whole = dropout_mask(noise(first=10), 4, 9, 16)
    halves = [dropout_mask(noise(first=first), 2, 9, 16) for first in (10, 12)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(*halves)


def test_fixed_mask_is_every_images_mask():
    fixed = dropout_mask(noise(first=10, per_image=False), 3, 9, 16).view(3, -1)
    assert torch.equal(fixed[:1].expand(3, -1), fixed)
    assert torch.equal(fixed[0], dropout_mask(noise(first=0), 1, 9, 16).flatten())
    assert torch.equal(fixed, dropout_mask(noise(first=99, per_image=False), 3, 9, 16).view(3, -1))


OTHER_KEYS = [{"seed": 4}, {"seed": 3 + 2**32}, {"step": 2}, {"first": 1}, {"block": 1}]


@pytest.mark.parametrize("change", OTHER_KEYS, ids=str)
def test_every_part_of_the_key_changes_the_mask(change):
    """Two independent masks of 65536 elements agree in half of them, within 6 standard deviations."""
    a, b = (dropout_mask(noise(**key), 1, 64, 1024) for key in ({}, change))
    assert abs((a == b).float().mean().item() - 0.5) < 6 * 0.5 / 256


def test_half_is_kept_everywhere():
    """Of all, per image, per channel and per position: 6 standard deviations."""
    kept = dropout_mask(noise(), 16, 64, 256).float().view(16, 64, 256)
    for dims in ((0, 1, 2), (1, 2), (0, 1), (0, 2)):
        rate = kept.mean(dims)
        samples = kept.numel() / rate.numel()
        assert (rate - 0.5).abs().max().item() < 6 * 0.5 / samples**0.5

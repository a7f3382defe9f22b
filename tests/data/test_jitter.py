"""The specification against its definition and against Pillow, and its stream frozen."""

import numpy as np
import pytest
from PIL import Image

from fastpix2pix.data.jitter import Jitter, apply, draw, item, order, position, whole
from fastpix2pix.errors import InputError

RNG = np.random.default_rng(0)

FROZEN = {  # (seed, epoch, index) at load 286, crop 256: no version of numpy may change what a run sees
    (0, 0, 0): (0, 7, False),
    (0, 0, 1): (6, 6, True),
    (0, 1, 0): (19, 1, False),
    (1, 0, 0): (9, 26, False),
    (7, 199, 399): (8, 18, False),
    (2**64 - 1, 3, 2**40): (15, 11, True),
}


def philox(key: int, counter: int) -> list[int]:
    """Philox4x64-10 in plain integers (Salmon et al., SC 2011): one block of four outputs."""
    mask = 2**64 - 1
    a, b, c, d = ((counter >> shift) & mask for shift in (0, 64, 128, 192))
    for r in range(10):
        k0, k1 = (key + r * 0x9E3779B97F4A7C15) & mask, (r * 0xBB67AE8584CAA73B) & mask
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (right >> 64) ^ b ^ k0, right & mask, (left >> 64) ^ d ^ k1, left & mask
    return [a, b, c, d]


@pytest.mark.parametrize("key", FROZEN)
def test_draw_is_plain_philox(key):
    seed, epoch, index = key
    y, x, flip, _ = philox(seed, 1 + (index << 64) + (epoch << 128))  # numpy counts up before its first block
    assert draw(*key, 286, 256, True) == (y * 31 >> 64, x * 31 >> 64, flip >= 2**63)


def test_draws_are_frozen():
    assert {key: tuple(draw(*key, 286, 256, True)) for key in FROZEN} == FROZEN


def test_orders_are_frozen():
    assert order(0, 0, 8).tolist() == [7, 4, 2, 6, 5, 0, 1, 3]
    assert order(0, 1, 8).tolist() == [7, 6, 0, 4, 1, 3, 5, 2]
    assert order(7, 0, 8).tolist() == [2, 5, 7, 1, 3, 4, 0, 6]


def test_draw_covers_its_range_evenly():
    drawn = [draw(3, epoch, index, 286, 256, True) for epoch in range(8) for index in range(500)]
    y, x, flip = (np.array(column) for column in zip(*drawn, strict=True))
    for offsets in (y, x):
        counts = np.bincount(offsets, minlength=31)
        assert len(counts) == 31
        assert counts.min() >= 85  # expected 129, standard deviation 11
        assert counts.max() <= 175
    assert abs(flip.mean() - 0.5) < 0.03  # standard deviation 0.008
    assert abs(np.corrcoef(np.stack((y, x, flip)))[np.triu_indices(3, 1)]).max() < 0.06


def test_draw_is_pure_and_each_argument_matters():
    base = [draw(3, 1, k, 1000, 1, True) for k in range(4)]
    assert base == [draw(3, 1, k, 1000, 1, True) for k in range(4)]
    assert base != [draw(4, 1, k, 1000, 1, True) for k in range(4)]
    assert base != [draw(3, 2, k, 1000, 1, True) for k in range(4)]
    assert len(set(base)) == 4
    assert [j[:2] for j in base] == [draw(3, 1, k, 1000, 1, False)[:2] for k in range(4)]
    assert not any(draw(3, 1, k, 1000, 1, False).flip for k in range(20))
    assert {draw(3, 0, k, 256, 256, True)[:2] for k in range(20)} == {(0, 0)}
    for seed in (-1, 2**64):
        with pytest.raises(InputError, match=rf"seed = {seed}: allowed are 0 to 2\*\*64 - 1"):
            draw(seed, 0, 0, 286, 256, True)


@pytest.mark.parametrize("n", [1, 2, 7, 400])
def test_order_is_a_permutation_per_epoch(n):
    orders = [order(5, epoch, n) for epoch in range(3)]
    for one in orders:
        assert one.dtype == np.int64
        assert sorted(one) == list(range(n))
    if n == 400:
        assert not (orders[0] == orders[1]).all()
        assert abs(np.corrcoef(orders[0], np.arange(n))[0, 1]) < 0.15
    with pytest.raises(ValueError, match="read-only"):
        orders[0][0] = 1


def test_position_is_the_endless_concatenation():
    n = 5
    seen = [item(9, p, n) for p in range(3 * n)]
    assert seen == [(epoch, index) for epoch in range(3) for index in order(9, epoch, n)]
    assert position(2 * n - 1, n) == (1, n - 1)
    assert position(2 * n, n) == (2, 0)


def reference(image: Image.Image, jitter: Jitter, load: int, crop: int) -> np.ndarray:
    """JZ's way, through Pillow alone."""
    image = image.resize((load, load), Image.BICUBIC).crop((jitter.x, jitter.y, jitter.x + crop, jitter.y + crop))
    return np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if jitter.flip else image)


@pytest.mark.parametrize("size", [(256, 256), (31, 67), (500, 333), (286, 286)])
@pytest.mark.parametrize(
    "jitter", [Jitter(0, 0, False), Jitter(30, 0, False), Jitter(0, 30, True), Jitter(13, 7, True)]
)
def test_apply_equals_pillow(size, jitter):
    colour = RNG.integers(0, 256, (*size, 3), np.uint8)
    np.testing.assert_array_equal(apply(colour, jitter, 286, 256), reference(Image.fromarray(colour), jitter, 286, 256))
    gray = reference(Image.fromarray(colour[:, :, 1]), jitter, 286, 256)
    np.testing.assert_array_equal(apply(colour[:, :, 1:2], jitter, 286, 256), gray[:, :, None])


def test_four_channels_are_four_planes():
    """The colour under a transparent pixel is data: alpha weights nothing."""
    image = RNG.integers(0, 256, (40, 50, 4), np.uint8)
    image[:20, :, 3] = 0
    planes = [apply(image[:, :, k : k + 1], Jitter(2, 3, True), 36, 32) for k in range(4)]
    np.testing.assert_array_equal(apply(image, Jitter(2, 3, True), 36, 32), np.concatenate(planes, axis=2))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_equal_sizes_resize_nothing(channels):
    image = RNG.integers(0, 256, (64, 64, channels), np.uint8)
    np.testing.assert_array_equal(apply(image, Jitter(0, 0, False), 64, 64), image)
    np.testing.assert_array_equal(apply(image, Jitter(5, 9, True), 64, 50), image[5:55, 9:59][:, ::-1])
    np.testing.assert_array_equal(whole(image, 64), image)


def test_whole():
    image = RNG.integers(0, 256, (100, 60, 3), np.uint8)
    np.testing.assert_array_equal(whole(image, 48), np.asarray(Image.fromarray(image).resize((48, 48), Image.BICUBIC)))

"""The image pool: what it returns, how often, and that only (seed, step, item) decides."""

import torch

from fastpix2pix.training.pool import ImagePool


def numbered(step: int, batch: int = 1) -> torch.Tensor:
    return torch.stack([torch.full((1, 2, 2), float(10 * step + i)) for i in range(batch)])


def test_size_zero_hands_the_batch_through():
    batch = numbered(1)
    assert ImagePool(0, 0).query(batch, 0) is batch


def test_full_pool_swaps_half_of_the_time_and_returns_only_what_it_was_given():
    pool = ImagePool(50, seed=3)
    returned = [pool.query(numbered(step), step).flatten()[0].item() for step in range(1000)]
    assert returned[:50] == [10.0 * s for s in range(50)]  # while it fills, everything passes
    old = [value != 10.0 * step for step, value in enumerate(returned)][50:]
    assert 0.45 < sum(old) / len(old) < 0.55
    assert set(returned) <= {10.0 * s for s in range(1000)}
    later = returned[50:]
    assert len(set(later)) == len(later)  # an image swapped out is gone
    assert len(pool.images) == 50


def test_decisions_need_no_history():
    whole, resumed = ImagePool(4, seed=1), ImagePool(4, seed=1)
    before = [whole.query(numbered(s, 3), s) for s in range(20)]
    resumed.images = [image.clone() for image in whole.images]
    assert before
    for step in range(20, 40):
        assert torch.equal(whole.query(numbered(step, 3), step), resumed.query(numbered(step, 3), step))


def test_stored_images_are_copies():
    pool, batch = ImagePool(2, 0), numbered(1)
    pool.query(batch, 0)
    batch.zero_()
    assert pool.images[0].flatten()[0] == 10

"""The image pool: earlier translations shown to the discriminator again (Shrivastava et al., arXiv 1612.07828)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_HALF = 1 << 63


class ImagePool:
    """Keeps up to `size` single images; `size = 0` hands every batch through unchanged.

    The decisions come from a counter-based generator keyed by (seed, step, item, rank), so the only state is the
    images.
    """

    def __init__(self, size: int, seed: int, rank: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.rank = rank  # of the process: each has a pool of its own
        self.images: list[Tensor] = []

    def query(
        self,
        batch: Tensor,  # [N, C, H, W] what the discriminator would see, detached
        step: int,
    ) -> Tensor:  # [N, C, H, W]
        """Each image or, once the pool is full and with probability 0.5, a stored one that it replaces."""
        if self.size == 0:
            return batch
        shown = [self._swap(image, step, item) for item, image in enumerate(batch)]
        return torch.stack(shown).contiguous(memory_format=torch.channels_last)

    def _swap(self, image: Tensor, step: int, item: int) -> Tensor:
        if len(self.images) < self.size:
            self.images.append(image.clone())
            return image
        coin, slot = np.random.Philox(key=[self.seed, 1], counter=[0, item, step, self.rank]).random_raw(2)
        if coin < _HALF:
            return image
        chosen = int(slot) % self.size
        stored, self.images[chosen] = self.images[chosen], image.clone()
        return stored

"""Dropout masks of an exported generator, for the inputs by which a graph without random numbers takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Form, Generator, Modes
from ..model.layers import CACHED_MASKS, noise_mask
from ..model.unet import dropout_blocks, up_channels


def mask_inputs(config: Generator, modes: Modes, form: Form) -> dict[str, int]:
    """{name of the input: number of the up-block}; none where there is no noise, or it is baked into the graph."""
    baked = modes.noise == "fixed" and form.height is not None
    if modes.noise == "off" or baked:
        return {}
    return {f"mask_{block}": block for block in dropout_blocks(config) if block < config.depth - 1}


def mask_shape(
    config: Generator,
    block: int,  # number of the up-block
    height: int,  # of the image, pixels
    width: int,
) -> tuple[int, int, int]:  # (C, h, w)
    """What a mask of an up-block covers: one number for every element that the block puts out."""
    below = config.depth - 1 - block  # halvings between the image and the block's output
    return up_channels(config)[block][1], height >> below, width >> below


class Masks:
    """The masks of a generator, made on the CPU; those of noise = fixed are kept."""

    def __init__(self, config: Generator, modes: Modes, form: Form) -> None:
        self.names = mask_inputs(config, modes, form)
        self._config, self._modes = config, modes
        self._fixed: dict[tuple[int, int, int], Tensor] = {}

    def __call__(
        self,
        name: str,  # of the input
        images: int,
        height: int,  # of the images, pixels
        width: int,
        first: int,  # running number of the first image
    ) -> Tensor:  # [1 (fixed) or images (random), C, h, w] uint8, 0 or 2, contiguous
        """The mask of one input: what the generator in PyTorch multiplies with."""
        block, seed = self.names[name], self._modes.seed
        shape = mask_shape(self._config, block, height, width)
        if self._modes.noise == "random":
            return torch.cat([noise_mask(shape, seed, block, first + i).contiguous() for i in range(images)])
        key = (block, height, width)
        if key not in self._fixed:
            while len(self._fixed) >= CACHED_MASKS * len(self.names):
                del self._fixed[next(iter(self._fixed))]
            self._fixed[key] = noise_mask(shape, seed, block).contiguous()
        return self._fixed[key]

"""The discriminator: PatchGAN of any depth, and the PixelGAN (arXiv 1611.07004, appendix 6.1.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Discriminator
from ..errors import InputError
from .layers import Block, channels, init_weights


def output_size(n_layers: int, size: int) -> int:
    """Logits along a side of `size` pixels; refused where not one patch fits."""
    out = size if n_layers == 0 else (size >> n_layers) - 2
    if out < 1:
        raise InputError(
            f"image side of {size} pixels: a discriminator with n_layers = {n_layers} needs at least "
            f"{1 if n_layers == 0 else 3 << n_layers}; use a larger image or fewer layers"
        )
    return out


class PatchGAN(nn.Module):
    """[N, C, H, W] (condition and image concatenated) -> logits [N, 1, h, w]; probability = sigmoid."""

    def __init__(self, config: Discriminator) -> None:
        super().__init__()
        self.config = config
        n, ndf = config.n_layers, config.ndf
        bias = config.norm == "instance"
        if n == 0:
            plan = [(ndf, 1, True), (2 * ndf, 1, bias), (1, 1, bias)]
        else:
            strided = [(channels(ndf, level), 2, bias or level == 0) for level in range(n)]
            plan = [*strided, (channels(ndf, n), 1, bias), (1, 1, True)]
        kernel, padding = (1, 0) if n == 0 else (4, 1)

        self.blocks = nn.ModuleList()
        features = config.in_channels
        for number, (out, stride, with_bias) in enumerate(plan):
            inner = 0 < number < len(plan) - 1
            conv = nn.Conv2d(features, out, kernel, stride, padding, bias=with_bias)
            self.blocks.append(Block(conv, config.norm if inner else "none"))
            features = out
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self,
        x: Tensor,  # [N, C, H, W] float in [-1, 1]
    ) -> Tensor:  # [N, 1, h, w] logits
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise InputError(
                f"input {'x'.join(map(str, x.shape))}: the discriminator takes [N, {self.config.in_channels}, H, W]"
            )
        for side in x.shape[2:]:
            output_size(self.config.n_layers, side)
        h = self.blocks[0](x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks[1:]:
            h = block(F.leaky_relu(h, 0.2))
        return h

    def extra_repr(self) -> str:
        return str(self.config)


def build_discriminator(config: Discriminator) -> PatchGAN:
    """The discriminator a config describes, in training mode, with pix2pix's initial weights from the global RNG."""
    return init_weights(PatchGAN(config))

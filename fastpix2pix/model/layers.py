"""The pieces both networks are made of: conv blocks, normalisation, dropout and their initialisation."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import Modes, Norm
from ..kernels.philox import Noise, dropout_mask

EPS = 1e-5
# leaves normalisation to the module: batch statistics in training, else stored
MODULE_RULE = Modes(norm_stats="running")
CACHED_MASKS = 8  # fixed masks kept per dropout layer; a stream needs one, a folder of mixed sizes a few

Net = TypeVar("Net", bound=nn.Module)


def channels(base: int, level: int) -> int:
    """Feature channels of a level: doubled per level up to 8 x base."""
    return base * min(2**level, 8)


def image_norm(
    x: Tensor,  # [N, C, H, W] any float type and memory format
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float = EPS,
) -> Tensor:  # [N, C, H, W] dtype and memory format of x
    """Normalise every image by its own statistics: train-mode BatchNorm at batch 1, for any batch.

    Biased variance; at least fp32 inside. F.instance_norm computes the same but returns NCHW for channels-last input;
    torch.var_mean over (2, 3) of channels-last tensors is seven times slower on a CPU than the two means here.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean((2, 3), keepdim=True)
    scale = torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + eps)
    if weight is not None:
        scale = scale * weight[:, None, None]
    y = centred * scale if bias is None else torch.addcmul(bias[:, None, None], centred, scale)
    return y.to(x.dtype)


class InstanceNorm(nn.Module):
    """Affine-free instance normalisation without running statistics."""

    def forward(
        self,
        x: Tensor,  # [N, C, H, W] float
    ) -> Tensor:
        return image_norm(x, None, None)


def make_norm(norm: Norm, features: int) -> nn.Module:
    """The module of a normalisation by name; BatchNorm2d itself, so that it converts to SyncBatchNorm."""
    if norm == "batch":
        return nn.BatchNorm2d(features, eps=EPS, momentum=0.1)
    return InstanceNorm() if norm == "instance" else nn.Identity()


def noise_mask(
    shape: tuple[int, ...],  # (C, h, w)
    seed: int,
    block: int,
    image: int | None = None,  # running number of the image; None: the mask of noise = fixed
) -> Tensor:  # [1, C, h, w] uint8, 0 or 2, channels-last, on the CPU
    """A dropout mask that depends on its arguments alone: the same on every device and in every implementation."""
    channels, height, width = shape
    # in training, the second counter is the step; here it keeps fixed and random masks apart
    counters = torch.tensor([seed, 0 if image is None else 1, image or 0])
    kept = dropout_mask(Noise(counters, block), 1, height * width, channels)
    return (2 * kept.to(torch.uint8)).view(1, height, width, channels).permute(0, 3, 1, 2)


class Dropout(nn.Module):
    """Dropout 0.5: from the global RNG in training, and as `modes.noise` says at test time."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self.fixed: dict[tuple, Tensor] = {}  # masks of noise="fixed"; not part of the state

    def forward(
        self,
        x: Tensor,  # [N, C, H, W] float
        modes: Modes,
        first: int = 0,  # running number of the batch's first image
    ) -> Tensor:
        if self.training:
            return F.dropout(x, 0.5)
        if modes.noise == "off":
            return x
        return x * (self._fixed(x, modes.seed) if modes.noise == "fixed" else self._random(x, modes.seed, first))

    def _fixed(self, x: Tensor, seed: int) -> Tensor:
        key = (seed, *x.shape[1:], x.device, x.dtype)
        if key not in self.fixed:
            while len(self.fixed) >= CACHED_MASKS:
                del self.fixed[next(iter(self.fixed))]
            with torch.inference_mode(False):  # an inference tensor could not be used with gradients later
                mask = noise_mask(x.shape[1:], seed, self.block)
                self.fixed[key] = mask.to(x.device, x.dtype, memory_format=torch.channels_last)
        return self.fixed[key]

    def _random(self, x: Tensor, seed: int, first: int) -> Tensor:
        masks = [noise_mask(x.shape[1:], seed, self.block, first + i) for i in range(len(x))]
        return torch.cat(masks).to(x.device, x.dtype, memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        return f"0.5, block={self.block}"


class ResizeConv(nn.Conv2d):
    """Nearest 2 x enlargement and a 3x3 convolution: an up-block without checkerboard patterns."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 3, 1, 1, bias=bias)

    def forward(
        self,
        x: Tensor,  # [N, C, H, W] float
    ) -> Tensor:  # [N, out, 2H, 2W]
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def in_format_of(weight: Tensor, x: Tensor) -> Tensor:
    """x in the weight's memory format; of a weight that is in both, 1x1 or of one channel, x keeps its own."""
    if not weight.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    return x if weight.is_contiguous() else x.contiguous(memory_format=torch.channels_last)


class Block(nn.Module):
    """Convolution (in its weight's memory format), normalisation and, where `dropout` is its number, dropout."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, norm: Norm = "none", dropout: int | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = make_norm(norm, conv.out_channels)
        self.dropout = None if dropout is None else Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # [N, C, H, W] float
        modes: Modes = MODULE_RULE,
        first: int = 0,
    ) -> Tensor:
        x = self.conv(in_format_of(self.conv.weight, x))
        if modes.norm_stats == "image" and isinstance(self.norm, _BatchNorm):
            x = image_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        else:
            x = self.norm(x)
        return x if self.dropout is None else self.dropout(x, modes, first)


@torch.no_grad()
def init_weights(net: Net, generator: torch.Generator | None = None) -> Net:
    """pix2pix's initialisation, in place: conv weights N(0, 0.02), gamma N(1, 0.02), biases and beta 0.

    Drawn on the CPU (from `generator`, else the global RNG), so that it is the same on every device. Returns net.
    """

    def normal(parameter: Tensor, mean: float) -> None:
        drawn = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
        parameter.copy_(drawn.normal_(mean, 0.02, generator=generator))

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            normal(module.weight, 0.0)
        elif isinstance(module, _BatchNorm):  # SyncBatchNorm too
            normal(module.weight, 1.0)
            module.reset_running_stats()
        else:
            continue
        if module.bias is not None:
            module.bias.zero_()
    return net

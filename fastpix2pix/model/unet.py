"""The generator: U-Net, or the encoder-decoder without skips (arXiv 1611.07004, appendix 6.1.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Generator, Modes
from ..errors import InputError
from .layers import MODULE_RULE, Block, ResizeConv, channels, init_weights


def check_modes(config: Generator, modes: Modes) -> None:
    """Refuse running statistics for a generator that has none."""
    if config.norm == "instance" and modes.norm_stats == "running":
        raise InputError(
            "norm_stats = running: a generator with instance norm has no running statistics; use norm_stats = image"
        )


def dropout_blocks(config: Generator) -> range:
    """Numbers of the up-blocks with dropout, counted from the innermost."""
    layouts = {"paper": range(3), "junyanz": range(1, config.depth - 4), "none": range(0)}
    return layouts[config.dropout]


def up_channels(config: Generator) -> list[tuple[int, int]]:
    """(input, output) channels of every up-block, from the innermost; the input includes the skip."""
    pairs = []
    for block in range(config.depth):
        level = config.depth - 1 - block
        inner = channels(config.ngf, level)
        skip = inner if block and config.kind == "unet" else 0
        pairs.append((inner + skip, channels(config.ngf, level - 1) if level else config.out_channels))
    return pairs


class Unet(nn.Module):
    """image [N, in, H, W] in [-1, 1] -> image [N, out, H, W] in [-1, 1]; H and W multiples of 2**depth.

    Levels are numbered from the outside (`down.0` sees the image), up-blocks from the inside (`up.0` sees the
    bottleneck). Convolution biases are junyanz's, so that weights are interchangeable.
    """

    def __init__(self, config: Generator, modes: Modes | None = None) -> None:
        super().__init__()
        self.config = config
        self.modes = modes or Modes()  # used in eval mode where forward is given none
        bias = config.norm == "instance"
        last = config.depth - 1
        drop = dropout_blocks(config)

        self.down = nn.ModuleList()
        features = config.in_channels
        for level in range(config.depth):
            conv = nn.Conv2d(features, channels(config.ngf, level), 4, 2, 1, bias=bias)
            # The bottleneck is 1x1 where the image is 2**depth pixels: its own statistics would make it zero.
            self.down.append(Block(conv, config.norm if 0 < level < last else "none"))
            features = conv.out_channels

        self.up = nn.ModuleList()
        for block, (wide, features) in enumerate(up_channels(config)):
            with_bias = bias or block == last
            up: nn.Conv2d | nn.ConvTranspose2d = (
                ResizeConv(wide, features, with_bias)
                if config.up == "resize"
                else nn.ConvTranspose2d(wide, features, 4, 2, 1, bias=with_bias)
            )
            norm = config.norm if block < last else "none"
            self.up.append(Block(up, norm, block if block in drop and block < last else None))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self,
        x: Tensor,  # [N, in, H, W] float in [-1, 1]
        modes: Modes | None = None,  # eval mode only; default self.modes
        first: int = 0,  # running number of the batch's first image, for noise="random"
    ) -> Tensor:  # [N, out, H, W] float in [-1, 1], channels-last
        """Translate a batch. In training mode: batch statistics and dropout, whatever the modes."""
        self._check_input(x)
        modes = MODULE_RULE if self.training else modes or self.modes
        if not self.training:
            check_modes(self.config, modes)
        h = x.contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for block in self.down:
            h = block(F.leaky_relu(h, 0.2) if skips else h, modes)
            skips.append(h)
        h = F.relu(skips.pop())
        for number, block in enumerate(self.up):
            h = block(h, modes, first)
            if number + 1 < len(self.up):
                # In place is safe: neither the concatenation nor a norm needs its output again.
                skip = skips.pop()
                h = F.relu_(torch.cat((skip, h), 1)) if self.config.kind == "unet" else F.relu(h)
        return torch.tanh(h)

    def _check_input(self, x: Tensor) -> None:
        wanted, multiple = self.config.in_channels, self.config.multiple
        if x.ndim != 4 or x.shape[1] != wanted or not x.is_floating_point():
            raise InputError(
                f"input {'x'.join(map(str, x.shape))} {x.dtype}: the generator takes [N, {wanted}, H, W] floats "
                "in [-1, 1]"
            )
        height, width = x.shape[2:]
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise InputError(
                f"input of {height}x{width} pixels: a generator of depth {self.config.depth} takes heights and widths "
                f"that are multiples of {multiple}; pad the image"
            )

    def extra_repr(self) -> str:
        return f"{self.config}, {self.modes}"


def build_generator(config: Generator) -> Unet:
    """The generator a config describes, in training mode, with pix2pix's initial weights from the global RNG."""
    return init_weights(Unet(config))


def macs(config: Generator, height: int, width: int) -> int:
    """Multiply-accumulates of the convolutions for one image of height x width pixels (6.05e9 at 256x256)."""
    total, features = 0, config.in_channels
    for level in range(config.depth):
        pixels = (height >> level + 1) * (width >> level + 1)
        total += pixels * 16 * features * channels(config.ngf, level)
        features = channels(config.ngf, level)
    for block, (wide, narrow) in enumerate(up_channels(config)):
        level = config.depth - block  # of the input; a 4x4 stride 2 transposed conv spends 16 products per input pixel
        pixels = (height >> level) * (width >> level)
        total += pixels * (4 * 9 if config.up == "resize" else 16) * wide * narrow
    return total


def parameter_count(net: nn.Module) -> int:
    """Trainable numbers (54,413,955 for unet_256; 2,768,705 for the 70x70 PatchGAN)."""
    return sum(p.numel() for p in net.parameters())

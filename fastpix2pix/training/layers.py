"""The convolutions of both networks with their shapes, read off the networks themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import Train
from ..model import PatchGAN, Unet
from ..model.layers import Block
from .convolution import Node, node_of

Shape = tuple[int, int, int, int]


class Layer(NamedTuple):
    """One block of a network at one batch size."""

    name: str  # generator.down.3
    node: Node
    w: Shape  # of the kernel
    x: Shape  # [N, C, H, W] input of the convolution
    y: Shape  # [N, K, h, w] its output
    norm: bool
    bias: bool
    drop: int | None  # number of the dropout block

    @property
    def rows(self) -> tuple[int, int]:
        """[M, K] of the output."""
        n, k, h, w = self.y
        return n * h * w, k

    @property
    def flops(self) -> int:
        """Of each of the three products: two per weight and pixel of the convolution's small or only side."""
        n, _, h, w = self.x if self.node.kind == "transposed" else self.y
        return 2 * n * h * w * self.w[0] * self.w[1] * self.w[2] * self.w[3]

    @property
    def numbers(self) -> int:
        """Elements of input, kernel and output: each of the three products reads two and writes one."""
        return sum(torch.Size(shape).numel() for shape in (self.x, self.w, self.y))


def generator_layers(config: Train, batch: int) -> list[Layer]:
    """All convolutions of the generator, outermost down-block first."""
    with torch.device("meta"):
        net = Unet(config.generator).train()
    size = config.data.crop_size
    return _layers(net, "generator", _blocks(net.down, net.up), (batch, config.generator.in_channels, size, size))


def discriminator_layers(config: Train, batch: int) -> list[Layer]:
    """All convolutions of the discriminator."""
    with torch.device("meta"):
        net = PatchGAN(config.discriminator()).train()
    size = config.data.crop_size
    return _layers(net, "discriminator", _blocks(net.blocks), (batch, config.discriminator().in_channels, size, size))


def _blocks(*lists: nn.ModuleList) -> list[Block]:
    return [block for blocks in lists for block in blocks if isinstance(block, Block)]


def _layers(net: nn.Module, prefix: str, blocks: list[Block], shape: Shape) -> list[Layer]:
    """Shapes as a forward pass on no device sees them."""
    names = {block: name for name, block in net.named_modules()}
    found: dict[Block, Layer] = {}

    def hook(block: Block) -> Callable:
        def record(conv: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            node = node_of(conv, f"{names[block]}.conv.weight")
            norm = not isinstance(block.norm, nn.Identity)
            drop = None if block.dropout is None else block.dropout.block
            w, bias = block.conv.weight, block.conv.bias is not None
            name = f"{prefix}.{names[block]}"
            found[block] = Layer(name, node, _shape(w), _shape(inputs[0]), _shape(y), norm, bias, drop)

        return record

    for block in blocks:
        block.conv.register_forward_hook(hook(block))
    with torch.no_grad():
        net(torch.empty(shape, device="meta"))
    return [found[block] for block in blocks]


def _shape(t: Tensor) -> Shape:
    n, c, h, w = t.shape
    return n, c, h, w

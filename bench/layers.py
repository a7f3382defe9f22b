"""The convolutions of both networks with their shapes, read off the networks themselves, and cuDNN's time for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpix2pix.config import Train
from fastpix2pix.model import PatchGAN, Unet
from fastpix2pix.model.layers import Block
from fastpix2pix.training.convolution import Aten, Node, node_of

from .devices import Setting
from .report import Report, Values
from .timing import device_ms

PART = "layers"
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


def run(report: Report, at: Setting) -> None:
    """The device's ceilings, then forward, dgrad and wgrad of every layer."""
    ceilings: Values = {}
    report.run(PART, "ceilings", lambda: _ceilings(at, ceilings))
    for batch in at.batches:
        config = at.config(batch)
        for layer in [*generator_layers(config, batch), *discriminator_layers(config, batch)]:
            report.run(PART, f"batch {batch} {layer.name}", partial(_times, layer, at, ceilings))


def _ceilings(at: Setting, into: Values) -> Values:
    """Matmul and copy speed of this device, and the cost of a node of a graph; written `into` as well."""
    side, wide = at.sides
    a, b = (torch.randn(side, side, device=at.device).bfloat16() for _ in range(2))
    matmul = device_ms([lambda: torch.mm(a, b)] * 4, at.device, at.sample_s)
    source = torch.randn(wide, wide, device=at.device)
    target = torch.empty_like(source)
    copy = device_ms([lambda: target.copy_(source)] * 4, at.device, at.sample_s)
    one = torch.zeros(1, device=at.device)
    node = device_ms([lambda: one.add_(1)] * 1000, at.device, at.sample_s) if at.device.type == "cuda" else None
    into["matmul_tflops"] = round(2 * side**3 / matmul.median / 1e9, 3)
    into["copy_tb_s"] = round(2 * source.nbytes / copy.median / 1e9, 4)
    into["graph_node_us"] = None if node is None else round(node.median * 1e3, 3)
    return {**into, "matmul": f"bf16 {side} cubed", "copy": f"{source.nbytes} bytes, read and written"}


def _times(layer: Layer, at: Setting, ceilings: Values) -> Values:
    """bf16 channels-last, by the library torch uses; memory rotates through more than twice the L2 cache."""
    bytes_ = 2 * layer.numbers
    cache = torch.cuda.get_device_properties(at.device).L2_cache_size if at.device.type == "cuda" else 0
    copies = max(2, min(32, 2 * cache // bytes_ + 1))

    def random(shape: Shape) -> Tensor:
        return torch.randn(shape, device=at.device).bfloat16().contiguous(memory_format=torch.channels_last)

    sets = [(random(layer.x), random(layer.w) * 0.02, random(layer.y)) for _ in range(copies)]
    aten, node = Aten(), layer.node
    products = {
        "forward": lambda x, w, dy: aten.forward(x, w, node),
        "dgrad": lambda x, w, dy: aten.backward(dy, x, w, node, None, True, False),
        "wgrad": lambda x, w, dy: _wgrad(dy, x, w, node),
    }
    found: Values = {"x": layer.x, "w": layer.w, "y": layer.y, "copies": copies}
    for name, product in products.items():
        calls = [partial(product, *arrays) for arrays in sets]
        timing = device_ms(calls, at.device, min(at.sample_s, 0.02))
        found[name] = {"us": round(timing.median * 1e3, 3), "quartiles_us": [q * 1e3 for q in timing.quartiles]}
        if ceilings:
            found[name]["of_matmul"] = round(layer.flops / timing.median / 1e9 / ceilings["matmul_tflops"], 4)
            found[name]["of_copy"] = round(bytes_ / timing.median / 1e9 / ceilings["copy_tb_s"], 4)
    return found


def _wgrad(dy: Tensor, x: Tensor, w: Tensor, node: Node) -> Tensor:
    """The kernel's gradient alone, without Aten's copy into an arena."""
    stride, padding = [node.stride] * 2, [node.padding] * 2
    transposed, only = node.kind == "transposed", [False, True, False]
    return torch.ops.aten.convolution_backward(dy, x, w, None, stride, padding, [1, 1], transposed, [0, 0], 1, only)[1]

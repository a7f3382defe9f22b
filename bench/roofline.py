"""What a device allows: its peaks, the operations and bytes of every layer, and the least time they can take.

python -m bench.roofline --devices A100,H200 --batches 1,16,64           the paper's networks at 256x256
python -m bench.roofline --size 512 --depth 9 --ngf 32 --layers           another architecture, layer by layer

Operations are those of the matrix product behind a convolution, with the taps that meet padding (`useful` leaves them
out). Bytes are those of a step in which everything between two convolutions is fused into them: each product reads its
inputs and the kernel's live taps once, and writes its result once. A floor is a bound, not a prediction.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastpix2pix.config import Train, train_config
from fastpix2pix.training.layers import Layer, discriminator_layers, generator_layers


class Device(NamedTuple):
    """Peaks of one device."""

    name: str
    tflops: float  # dense products in the compute type (half precision on a GPU), sums in fp32
    tb_s: float  # device memory
    processors: int  # streaming multiprocessors, or cores
    source: str


NODE_US = 2.0  # a dependent kernel inside a CUDA graph: an assumption until measured

DEVICES = {
    "A100": Device("A100", 312, 2.0, 108, "NVIDIA A100 data sheet, 80 GB SXM"),
    "H100": Device("H100", 990, 3.35, 132, "NVIDIA H100 data sheet, SXM"),
    "H200": Device("H200", 990, 4.8, 132, "NVIDIA H200 data sheet, SXM"),
    "RTX 4090": Device("RTX 4090", 165, 1.008, 128, "NVIDIA Ada GPU architecture paper"),
    "RTX 5090": Device("RTX 5090", 209.5, 1.792, 170, "NVIDIA RTX Blackwell GPU architecture paper"),
    "L4": Device("L4", 121, 0.3, 58, "NVIDIA L4 data sheet"),
    "Orin": Device("AGX Orin", 42.6, 0.2048, 16, "NVIDIA Jetson AGX Orin series technical brief, 64 GB"),
}


def compute_us(flops: float, device: Device) -> float:
    """Time of the operations at the peak."""
    return flops / device.tflops / 1e6


def memory_us(bytes_: float, device: Device) -> float:
    """Time of the bytes at the peak."""
    return bytes_ / device.tb_s / 1e6


def floor_us(flops: float, bytes_: float, device: Device) -> float:
    """The longer of the two: no implementation is faster."""
    return max(compute_us(flops, device), memory_us(bytes_, device))


def named_device(name: str) -> Device | None:
    """The row of DEVICES that "NVIDIA H100 80GB HBM3" belongs to; None for cards whose peaks are others."""
    if re.search(r"\b(Laptop|PCIe|NVL|D)\b", name):
        return None
    return next((device for key, device in DEVICES.items() if re.search(rf"\b{key}\b", name)), None)


class Width(NamedTuple):
    """Bytes of a number, by what it is."""

    compute: int  # activations, and kernels as the products read them
    copied: int  # of the kernel's half-precision copy, which Adam writes; 0 where there is none


HALF, FULL = Width(2, 2), Width(4, 0)


class Cost(NamedTuple):
    """Of one product of one layer, `times` times."""

    layer: str  # generator.down.3
    product: str  # forward, dgrad or wgrad
    times: int
    flops: float
    useful: float  # of flops, those whose tap meets a pixel
    activations: float  # bytes of feature maps
    weights: float  # bytes of the kernel, or of its gradient

    @property
    def bytes(self) -> float:
        return self.activations + self.weights

    def floor_us(self, device: Device, least: float = 0.0) -> float:
        """Of all the times; `least` microseconds each, such as NODE_US."""
        return self.times * max(floor_us(self.flops, self.bytes, device), least)


def taps(size: int, out: int, kernel: int, stride: int, padding: int) -> list[int]:
    """For each tap of one axis, the outputs at which it meets a pixel of `size`."""
    return [sum(0 <= o * stride - padding + k < size for o in range(out)) for k in range(kernel)]


def _axes(layer: Layer) -> list[list[int]]:
    """`taps` of both axes; a transposed convolution's are those of the convolution that it turns round."""
    node, sizes = layer.node, zip(layer.x[2:], layer.y[2:], strict=True)
    if node.kind == "transposed":
        return [taps(y, x, node.kernel, node.stride, node.padding) for x, y in sizes]
    grow = 2 if node.kind == "resize" else 1
    return [taps(grow * x, y, node.kernel, node.stride, node.padding) for x, y in sizes]


def live_weights(layer: Layer) -> int:
    """Numbers of the kernel whose tap meets a pixel: the others have gradient 0 and need not be read."""
    rows, columns = (sum(count > 0 for count in axis) for axis in _axes(layer))
    return rows * columns * layer.w[0] * layer.w[1]


def layer_costs(layer: Layer, width: Width = HALF, *, first: bool = False) -> dict[str, Cost]:
    """The three products. `first`: the layer sees images, so nothing has been activated on its way in.

    forward reads the input and writes the raw output. dgrad reads the gradient, the raw output where it is normalised,
    and the raw input (its activation's sign), and writes the input's gradient. wgrad reads the gradient, the raw output
    where it is normalised, and the input, and writes the kernel's gradient in fp32.
    """
    n, ci, hi, wi = layer.x
    _, co, ho, wo = layer.y
    a, live = width.compute, live_weights(layer)
    x, y = n * ci * hi * wi * a, n * co * ho * wo * a
    seen = y * (2 if layer.norm else 1)
    rows, columns = (sum(axis) for axis in _axes(layer))
    useful = 2.0 * n * rows * columns * layer.w[0] * layer.w[1]
    # of a convolution the gradient's product runs over the input's pixels: more than the output's at stride 1
    grown = hi * wi / (layer.node.stride**2 * ho * wo) if layer.node.kind == "conv" else 1.0

    def cost(product: str, flops: float, activations: float, weights: float) -> Cost:
        return Cost(layer.name, product, 1, flops, useful, activations, weights)

    return {
        "forward": cost("forward", layer.flops, x + y, live * a),
        "dgrad": cost("dgrad", layer.flops * grown, seen + x * (1 if first else 2), live * a),
        "wgrad": cost("wgrad", layer.flops, seen + x, live * 4),
    }


@dataclass(frozen=True)
class Work:
    """All that one training step or one translation has to do."""

    products: tuple[Cost, ...]
    other_bytes: float = 0.0  # of feature maps, beside the products: gradients of skips, added up
    optimiser_bytes: float = 0.0  # moments, master weights, gradients and half copies

    @property
    def flops(self) -> float:
        return sum(cost.times * cost.flops for cost in self.products)

    @property
    def activation_bytes(self) -> float:
        return sum(cost.times * cost.activations for cost in self.products) + self.other_bytes

    @property
    def weight_bytes(self) -> float:
        """Kernels read; gradients count with the optimiser."""
        return sum(cost.times * cost.weights for cost in self.products if cost.product != "wgrad")

    @property
    def update_bytes(self) -> float:
        """Gradients written, and all that Adam reads and writes."""
        gradients = {c.layer: c.weights for c in self.products if c.product == "wgrad"}
        return sum(gradients.values()) + self.optimiser_bytes

    @property
    def bytes(self) -> float:
        return self.activation_bytes + self.weight_bytes + self.update_bytes

    def floor_ms(self, device: Device, least: float = 0.0) -> float:
        """Product by product, the longer of compute and memory (and `least` microseconds); the optimiser by memory."""
        us = sum(cost.floor_us(device, least) for cost in self.products)
        return (us + memory_us(self.optimiser_bytes, device)) / 1e3


def inference_work(config: Train, batch: int, width: Width = HALF) -> Work:
    """One translation of a batch, with normalisation folded or fused."""
    layers = generator_layers(config, batch)
    return Work(tuple(layer_costs(layer, width)["forward"] for layer in layers))


def training_work(config: Train, batch: int, width: Width = HALF) -> Work:
    """One step: D on translated and real images with its update, G through the updated D with its update."""
    generator = generator_layers(config, batch)
    products = [*_passes(generator, width, forward=1, inner=1, wgrad=1)]
    live = _live_parameters(generator)
    if config.adversarial:
        discriminator = discriminator_layers(config, batch)
        products += _passes(discriminator, width, forward=3, inner=2, wgrad=2)
        products += [_cost(discriminator, i, width)["dgrad"] for i in range(len(discriminator))]  # G's, to the image
        live += _live_parameters(discriminator)
    skips = sum(_numbers(layer.y) for layer in generator[: config.generator.depth - 1]) * width.compute
    if config.generator.kind != "unet":
        skips = 0
    adam = 4 * 4 + 4 * 3 + width.copied  # reads p, g, m, v; writes p, m, v and the copy
    return Work(tuple(products), skips, adam * live)


def _passes(layers: Sequence[Layer], width: Width, *, forward: int, inner: int, wgrad: int) -> Iterator[Cost]:
    """The products of a network's passes; the gradient of the first layer's input is nobody's."""
    for number in range(len(layers)):
        costs = _cost(layers, number, width)
        yield costs["forward"]._replace(times=forward)
        if number:
            yield costs["dgrad"]._replace(times=inner)
        yield costs["wgrad"]._replace(times=wgrad)


def _cost(layers: Sequence[Layer], number: int, width: Width) -> dict[str, Cost]:
    return layer_costs(layers[number], width, first=number == 0)


def _live_parameters(layers: Iterable[Layer]) -> int:
    """Numbers that Adam has to update."""
    return sum(live_weights(layer) + layer.y[1] * (2 * layer.norm + layer.bias) for layer in layers)


def _numbers(shape: Sequence[int]) -> int:
    n, c, h, w = shape
    return n * c * h * w


def work_table(config: Train, batches: Sequence[int], devices: Sequence[Device], width: Width = HALF) -> str:
    """Markdown: operations, bytes and floors of a step and of a translation."""
    head = "| what | batch | GFLOP | feature maps MB | kernels MB | update MB |"
    lines = [head + "".join(f" {d.name} ms |" for d in devices), "|---|" + "--:|" * (5 + len(devices))]
    for what, work_of in (("training step", training_work), ("translation", inference_work)):
        for batch in batches:
            work = work_of(config, batch, width)
            megabytes = (work.activation_bytes, work.weight_bytes, work.update_bytes)
            cells = [f"{work.flops / 1e9:,.1f}", *(f"{b / 1e6:,.0f}" for b in megabytes)]
            cells += [f"{work.floor_ms(d):,.3f} / {work.floor_ms(d, NODE_US):,.3f}" for d in devices]
            lines.append(f"| {what} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layer_table(config: Train, batch: int, devices: Sequence[Device], width: Width = HALF) -> str:
    """Markdown: the three products of every layer; M: memory sets the floor, C: compute does."""
    head = "| layer | product | GFLOP | useful % | MB | FLOP/byte |"
    lines = [head + "".join(f" {d.name} us |" for d in devices), "|---|---|" + "--:|" * (4 + len(devices))]
    networks = [generator_layers(config, batch)]
    if config.adversarial:
        networks.append(discriminator_layers(config, batch))
    for layers in networks:
        for number in range(len(layers)):
            for cost in _cost(layers, number, width).values():
                share = 100 * cost.useful / cost.flops
                cells = [f"{cost.flops / 1e9:.3f}", f"{share:.0f}", f"{cost.bytes / 1e6:.2f}"]
                cells.append(f"{cost.flops / cost.bytes:.0f}")
                for d in devices:
                    bound = "C" if compute_us(cost.flops, d) > memory_us(cost.bytes, d) else "M"
                    cells.append(f"{cost.floor_us(d):.2f} {bound}")
                lines.append(f"| {cost.layer} | {cost.product} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--devices", default="A100,H100,H200", help=f"some of {', '.join(DEVICES)}")
    parser.add_argument("--batches", default="1,16,64", help="images per step")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--depth", type=int, default=8, help="levels of the generator")
    parser.add_argument("--ngf", type=int, default=64, help="feature channels of its first level")
    parser.add_argument("--ndf", type=int, default=64, help="of the discriminator's first layer")
    parser.add_argument(
        "--fp32", action="store_true", help="4 bytes per number; the peaks stay those of half precision"
    )
    parser.add_argument("--layers", action="store_true", help="every layer too, at the first batch size")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.devices.split(",")]
    if unknown := [name for name in names if name not in DEVICES]:
        parser.error(f"--devices {', '.join(unknown)}: allowed are {', '.join(DEVICES)}")
    devices, batches = [DEVICES[name] for name in names], [int(b) for b in options.batches.split(",")]
    config = train_config(crop_size=options.size, depth=options.depth, ngf=options.ngf, ndf=options.ndf)
    width = FULL if options.fp32 else HALF
    print("Floors: product by product / with 2 us for each at least.\n")
    print(work_table(config, batches, devices, width))
    if options.layers:
        print(f"\nBatch {batches[0]}:\n\n{layer_table(config, batches[0], devices, width)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

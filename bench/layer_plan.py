"""What the project's own convolutions would do layer by layer: kernel, tiles, splits, bytes, predicted time and floor.

python -m bench.layer_plan                              unet_256 and the 70x70 discriminator at batch 1
python -m bench.layer_plan --batch 64 --device H200     for one device of bench/roofline.py, or several: A100,H200

No GPU is needed: launches are recorded, not started, with the static plans. Bytes are those of the kernels' own
formulas, partial sums of a split included. The prediction assumes the device's peaks (bench/roofline.py) and that a
program keeps one multiprocessor busy: the longer of bytes and operations, the latter stretched by the share of the last
wave's multiprocessors that stand idle, and 2 us for each launch behind the first. What a kernel reaches of the peaks
is what a measurement has to tell. The floor is of the bare product (both maps and the live taps once, in half
precision): nobody computes it faster.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # lets the Triton side be chosen on a CPU; nothing is run

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpix2pix.config import Train, train_config
from fastpix2pix.files import write_text
from fastpix2pix.kernels.conv import conv, conv_dgrad
from fastpix2pix.kernels.conv_plan import ConvPlan
from fastpix2pix.kernels.conv_wgrad import conv_wgrad
from fastpix2pix.kernels.dispatch import Launch, recorded
from fastpix2pix.kernels.geometry import Source
from fastpix2pix.kernels.wgrad_plan import WgradPlan
from fastpix2pix.training.layers import Layer, discriminator_layers, generator_layers
from fastpix2pix.training.plans import map_of, plans_of

from .roofline import DEVICES, NODE_US, Cost, Device, compute_us, layer_costs, memory_us


class Row(NamedTuple):
    """One product of one layer."""

    layer: str
    product: str  # forward, dgrad or wgrad
    plan: ConvPlan | WgradPlan
    launches: tuple[Launch, ...]
    floor: Cost

    @property
    def programs(self) -> int:
        """Of the product itself."""
        return int(torch.Size(self.launches[0].grid).numel())

    @property
    def bytes(self) -> int:
        return sum(launch.read + launch.written for launch in self.launches)

    def predicted_us(self, device: Device) -> float:
        waves = -(-self.programs // device.processors)
        idle = waves * device.processors / self.programs
        product = max(compute_us(self.floor.flops, device) * idle, memory_us(self.bytes, device))
        return product + NODE_US * (len(self.launches) - 1)


def rows(config: Train, batch: int, device: Device) -> Iterator[Row]:
    """Every product of a training step, the discriminator's on translated and real images joined."""
    networks = (generator_layers(config, batch), 1), (discriminator_layers(config, 2 * batch), 2)
    with FakeTensorMode():
        for layers, groups in networks:
            for number, layer in enumerate(layers):
                if layer.node.kind != "resize":  # whose products are the library's
                    yield from _products(layer, groups, device, first=number == 0)


def _products(layer: Layer, groups: int, device: Device, *, first: bool) -> Iterator[Row]:
    plans, costs = plans_of(layer, groups, device.processors), layer_costs(layer, first=first)
    bare = {
        name: cost._replace(activations=costs["forward"].activations, weights=costs["forward"].weights)
        for name, cost in costs.items()
    }
    assert plans.forward is not None and plans.dgrad is not None and plans.wgrad is not None
    geometry, size, (m, k) = layer.node.geometry, map_of(layer.x), layer.rows
    d0, d1, side, _ = layer.w
    w = torch.empty(d0, side, side, d1, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    x, y = _rows(size.rows, layer.x[1]), _rows(m, k)
    sources = _halves(x) if layer.node.kind == "transposed" and layer.x[1] > layer.w[1] else [Source(x)]
    with recorded(run=False) as tape:
        fused = layer.norm and plans.forward.splits == 1
        conv(sources, w, geometry, size, y, groups=groups, statistics=fused, plan=plans.forward, impl="triton")
    yield Row(layer.name, "forward", plans.forward, tuple(tape), bare["forward"])
    if not first or layer.name.startswith("discriminator"):
        with recorded(run=False) as tape:
            conv_dgrad(y, w, geometry, size, x, groups=groups, plan=plans.dgrad, impl="triton")
        yield Row(layer.name, "dgrad", plans.dgrad, tuple(tape), bare["dgrad"])
    with recorded(run=False) as tape:
        conv_wgrad(sources, y, torch.empty_like(w), geometry, size, plan=plans.wgrad, impl="triton")
    yield Row(layer.name, "wgrad", plans.wgrad, tuple(tape), bare["wgrad"])


def _rows(m: int, c: int) -> Tensor:
    return torch.empty(m, c, dtype=torch.bfloat16)


def _halves(x: Tensor) -> list[Source]:
    """A skip and the block before, as two maps."""
    skip, before = x.chunk(2, 1)
    return [Source(torch.empty_like(half, memory_format=torch.contiguous_format)) for half in (skip, before)]


def table(config: Train, batch: int, device: Device) -> str:
    """Markdown: a row per product."""
    numbers = "programs", "launches", "MB", "floor MB", "us", "floor us"
    lines = [f"| layer | product | tile | splits | warps, stages | {' | '.join(numbers)} |"]
    lines.append("|---|---|---|--:|---|" + "--:|" * len(numbers))
    total = [0.0] * 4
    for row in rows(config, batch, device):
        plan = row.plan
        found = [row.bytes / 1e6, row.floor.bytes / 1e6, row.predicted_us(device), row.floor.floor_us(device)]
        total = [a + b for a, b in zip(total, found, strict=True)]
        tile = "x".join(map(str, plan[:3]))
        cells = [row.layer, row.product, tile, str(plan.splits), f"{plan.warps}, {plan.stages}", str(row.programs)]
        lines.append(f"| {' | '.join([*cells, str(len(row.launches)), *_numbers(found)])} |")
    lines.append(f"| all | | | | | | | {' | '.join(_numbers(total))} |")
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> list[str]:
    megabytes, floor, us, floor_us = values
    return [f"{megabytes:.2f}", f"{floor:.2f}", f"{us:.1f}", f"{floor_us:.1f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write them with their explanation."""
    summary, *rest = (__doc__ or "").strip().split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench.layer_plan", description=summary)
    parser.add_argument("--batch", default="1", help="images of a step; several with commas")
    parser.add_argument("--device", default="A100,H200", help=f"some of {','.join(DEVICES)}")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--write", type=Path, help="file for the tables")
    options = parser.parse_args(arguments)
    try:
        devices = [DEVICES[name] for name in options.device.split(",")]
        batches = [int(number) for number in options.batch.split(",")]
    except KeyError as error:
        parser.error(f"device {error}: allowed are {', '.join(DEVICES)}")
    except ValueError:
        parser.error(f"batch {options.batch}: whole numbers with commas are taken")
    parts = []
    for batch in batches:
        config = train_config(batch=batch, crop_size=options.size, step="explicit", device="cpu")
        parts += [f"## {device.name}, batch {batch}\n\n{table(config, batch, device)}\n" for device in devices]
    text = "\n".join(parts)
    print(text)
    if options.write:
        command = f"python -m bench.layer_plan --batch {options.batch} --write {options.write}"
        made = f"Made by `{command}`; nothing is measured."
        tile = "A tile is rows x channels x channels summed at a time; of wgrad channels x channels x rows at a time."
        note = f"# The plan of every layer\n\n{made}\n\n{summary}\n\n{rest[-1]}\n\n{tile}"
        write_text(options.write, f"{note}\n\n{text}")


if __name__ == "__main__":
    main()

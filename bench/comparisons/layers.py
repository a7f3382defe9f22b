"""Every convolution of the generator, forward, as the networks here run it (channels-last) against plain NCHW."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpix2pix.training.convolution import aten_forward
from fastpix2pix.training.layers import Layer, generator_layers

from ..comparison import Comparison, require_close
from ..devices import Setting
from ..roofline import FULL, HALF, Device, layer_costs
from ..timing import Run, rotating

OURS, PLAIN = "channels-last", "nchw"
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.02}


def comparisons(at: Setting) -> Iterator[Comparison]:
    """At the smallest batch, outermost down-block first; memory rotates through four sets."""
    batch = at.batches[0]
    for layer in generator_layers(at.config(batch), batch):
        yield _comparison(layer, at)


def _comparison(layer: Layer, at: Setting) -> Comparison:
    half = at.device.type == "cuda"
    dtype, width = (torch.bfloat16, HALF) if half else (torch.float32, FULL)

    def arrays(seed: int, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
        draws = torch.Generator(at.device).manual_seed(seed)
        x, w = (torch.randn(s, generator=draws, device=at.device).to(dtype) for s in (layer.x, layer.w))
        return x.contiguous(memory_format=memory_format), (w * 0.02).contiguous(memory_format=memory_format)

    def run_in(memory_format: torch.memory_format) -> Run:
        seeds = iter(range(100))

        def make() -> Run:
            x, w = arrays(next(seeds), memory_format)
            return lambda: aten_forward(x, w, layer.node)

        return rotating(make, 4)

    def ours() -> Run:
        first, second = (
            aten_forward(*arrays(0, memory_format), layer.node)
            for memory_format in (torch.channels_last, torch.contiguous_format)
        )
        require_close(layer.name, first, second, CLOSE[dtype])
        return run_in(torch.channels_last)

    def floor_ms(device: Device) -> float:
        return layer_costs(layer, width)["forward"].floor_us(device) / 1e3

    ways = {OURS: ours, PLAIN: lambda: run_in(torch.contiguous_format)}
    name = f"{layer.name} batch {layer.x[0]}"
    return Comparison("layers", name, ways, OURS, PLAIN, images=layer.x[0], floor_ms=floor_ms)

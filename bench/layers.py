"""The library's time for each convolution of both networks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastpix2pix.training.convolution import aten_backward, aten_forward
from fastpix2pix.training.layers import Layer, Shape, discriminator_layers, generator_layers

from .devices import Setting
from .report import Report, Values
from .timing import device_ms

PART = "layers"


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
    node = layer.node
    products = {
        "forward": lambda x, w, dy: aten_forward(x, w, node),
        "dgrad": lambda x, w, dy: aten_backward(dy, x, w, node, True, False),
        "wgrad": lambda x, w, dy: aten_backward(dy, x, w, node, False, True),
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

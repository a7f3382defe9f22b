"""Which products of a run the project's own kernels compute, by which plan."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import Train
from ..kernels.conv_plan import Problem, conv_plan
from ..kernels.geometry import Map
from ..kernels.wgrad_plan import wgrad_plan
from .convolution import Plans
from .layers import Layer, discriminator_layers, generator_layers


def layers_of(config: Train) -> Iterator[tuple[Layer, int]]:
    """Every layer at every batch size that a step has, with its groups of statistics."""
    for layer in generator_layers(config, config.batch):
        yield layer, 1
    if config.adversarial:
        for groups in (2, 1):  # joined, and the generator's pass through it
            for layer in discriminator_layers(config, groups * config.batch):
                yield layer, groups


def static_plans(config: Train, processors: int) -> dict[tuple[str, int], Plans]:
    """The kernels' static plans for every product they can compute (a resize block is ATen's) on a GPU of so many
    multiprocessors."""
    plans = {}
    for layer, groups in layers_of(config):
        if layer.node.kind != "resize" and not layer.node.geometry.not_supported_reasons():
            plans[layer.node.weight, layer.x[0]] = plans_of(layer, groups, processors)
    return plans


def plans_of(layer: Layer, groups: int, processors: int) -> Plans:
    """The static plans of one layer's products."""
    forward, dgrad = problems(layer, groups)
    wgrad = wgrad_plan(layer.node.geometry, map_of(layer.x), layer.w, processors)
    return Plans(conv_plan(forward), conv_plan(dgrad), wgrad)


def problems(layer: Layer, groups: int = 1) -> tuple[Problem, Problem]:
    """Forward and dgrad of a layer, with one plain source."""
    geometry, x, y = layer.node.geometry, map_of(layer.x), map_of(layer.y)
    forward = Problem(geometry.forward(), x, y, groups, (layer.x[1],), layer.y[1], True)
    return forward, Problem(geometry.dgrad(), y, x, groups, (layer.y[1],), layer.x[1], True)


def map_of(shape: tuple[int, int, int, int]) -> Map:
    """Of a tensor [N, C, H, W]."""
    n, _, h, w = shape
    return Map(n, h, w)

"""Every convolution of a step where it stands: with the inputs that a real pass leaves, for candidates to be tried on.

Two passes are run, one with the library's convolutions and one with the project's own, so that each candidate meets its
input in both forms: activated, and raw with what its readers apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Train
from ..kernels.conv_plan import LAZY_ROWS, TILE_ROWS, ConvPlan, conv_candidates
from ..kernels.dispatch import processors
from ..kernels.norm_act import Output
from ..kernels.wgrad_plan import WgradPlan, wgrad_candidates
from ..model import PatchGAN, Unet
from ..tuning.numerics import dgrad_error, forward_error, wgrad_error
from .arena import Arena, Gradients, Parameters
from .convolution import Plans
from .discriminator_pass import discriminator_forward
from .explicit_step import updates_at_once
from .generator_pass import Saved, generator_forward
from .plan_choice import Key, Readers
from .plans import layers_of, map_of, problems, static_plans
from .stages import (
    How,
    Stage,
    activate,
    activate_backward,
    convolve,
    convolve_backward,
    defer,
    norm_of,
    product_groups,
)
from .state import COMPUTE

Run = Callable[[], object]


class Candidates(NamedTuple):
    """The plans of one node, the static choice first; all empty where the kernels cannot compute it."""

    forward: tuple[ConvPlan, ...] = ()
    dgrad: tuple[ConvPlan, ...] = ()
    wgrad: tuple[WgradPlan, ...] = ()


@dataclass
class Site:
    """One node of one pass."""

    key: Key
    plain: Stage  # as the pass with the library's convolutions left it
    own: Stage  # as the pass with own products did
    front: Stage | None  # whose output it reads, by the way that gradients go back; None: the input image
    second: bool  # its output is read by an up-block too
    behind_second: bool  # likewise the output of `front`
    activation: str  # of its output
    front_activation: str
    learns: bool  # its kernel's gradient is taken
    goes_on: bool  # its input's gradient is taken
    params: Parameters
    gradients: Gradients
    impl: str
    candidates: Candidates

    def stage(self, own: bool) -> Stage:
        return self.own if own else self.plain

    def forms(self) -> tuple[bool, ...]:
        """The forms in which its input comes: activated, and as own products read it where that is another."""
        a, b = self.plain.x.sources, self.own.x.sources
        differs = len(a) != len(b) or any(source.scale is not None or source.activation != "none" for source in b)
        return (False, True) if differs else (False,)

    def may_stay_raw(self) -> bool:
        """Whether its output can be left to its readers, where it is not a split sum."""
        stage = self.own
        biased = not stage.normalises and f"{stage.name}.conv.bias" in self.params
        large = stage.size.rows // stage.groups >= LAZY_ROWS
        return bool(self.candidates.forward) and large and stage.noise is None and not biased

    # ---- what is timed
    def forward_run(self, plan: ConvPlan | None, own: bool, raw: bool) -> Run:
        """The product and what follows it."""
        how, stage = How({self.key: Plans(forward=plan)}, self.impl), self.stage(own)

        def product() -> Stage:
            found = convolve(stage.block, stage.name, self.params, stage.x, how, stage.groups)
            found.noise = stage.noise
            return found

        if raw:
            return lambda: defer(product(), self.params, self.activation, how)
        outputs = [Output(torch.empty_like(stage.raw), self.activation)]
        if self.second:
            m, c = stage.raw.shape
            outputs.append(Output(stage.raw.new_empty(m, 2 * c)[:, :c], "relu"))
        return lambda: activate(product(), self.params, outputs, how)

    def dgrad_run(self, plan: ConvPlan | None) -> Run:
        """The product and the backward pass of what stands in front."""
        stage, g = replace(self.plain, plans=Plans(dgrad=plan)), self.gradient()
        how = How({self.key: stage.plans}, self.impl)
        other = self._other()

        def run() -> None:
            norm = None if self.front is None else norm_of(self.front, self.params, self.front_activation, other)
            below, sums = convolve_backward(stage, self.params, None, g, how, norm=norm)
            if self.front is not None:
                c = self.front.raw.shape[1]
                outputs = [Output(below[:, -c:], self.front_activation), *([] if other is None else [other])]
                activate_backward(self.front, self.params, self.gradients, outputs, how, sums=sums)

        return run

    def wgrad_run(self, plan: WgradPlan | None, own: bool) -> Run:
        """The product, to where the step wants it: into the arena, or the library's just made."""
        stage, g = replace(self.stage(own), plans=Plans(wgrad=plan)), self.gradient()
        how = How({self.key: stage.plans}, self.impl)
        return lambda: convolve_backward(stage, self.params, self.gradients, g, how, need_dx=False)

    # ---- what is checked
    def forward_error(self, plan: ConvPlan, own: bool) -> str:
        stage = self.stage(own)
        w, geometry = self.params[stage.node.weight], stage.node.geometry
        fused = stage.normalises and stage.size.rows // stage.groups >= TILE_ROWS
        groups = product_groups(stage.x, stage.groups, fused)
        return forward_error(stage.x.sources, w, geometry, stage.x.size, groups, fused, plan, self.impl)

    def dgrad_error(self, plan: ConvPlan) -> str:
        stage = self.plain
        norm = None
        if self.front is not None:
            norm = norm_of(self.front, self.params, self.front_activation, self._other())
        groups = 1 if norm is None else len(norm.statistics.mean)
        if stage.x.size.rows // groups < TILE_ROWS:
            norm, groups = None, 1
        w, geometry = self.params[stage.node.weight], stage.node.geometry
        return dgrad_error(self.gradient(), w, geometry, stage.x.size, norm, groups, plan, self.impl)

    def wgrad_error(self, plan: WgradPlan, own: bool) -> str:
        stage = self.stage(own)
        dw, geometry = self.gradients.arrays[stage.node.weight], stage.node.geometry
        return wgrad_error(stage.x.sources, self.gradient(), dw, geometry, stage.x.size, plan, self.impl)

    def gradient(self) -> Tensor:
        """[M, K] of the raw output; the same at every call."""
        draws = torch.Generator(self.plain.raw.device).manual_seed(3)
        g = torch.randn(self.plain.raw.shape, generator=draws, device=self.plain.raw.device)
        return (1e-2 * g).to(self.plain.raw.dtype)

    def _other(self) -> Output | None:
        """The gradient of the front's second output."""
        if self.front is None or not self.behind_second:
            return None
        return Output(torch.full_like(self.front.raw, 1e-3), "relu")


class Common(NamedTuple):
    """What all sites of a network share."""

    params: Parameters
    gradients: Gradients
    impl: str
    candidates: dict[Key, Candidates]


class Sites(NamedTuple):
    """All nodes of a step, with who reads whose output."""

    sites: list[Site]
    readers: Readers


def sites_of(config: Train, device: torch.device, precision: str, impl: str) -> Sites:
    """Networks of their own are built and run once in each form; nothing of a training state is touched."""
    dtype = COMPUTE[precision]
    size, batch = config.data.crop_size, config.batch
    draws = torch.Generator().manual_seed(config.seed)
    plans = static_plans(config, processors(device))
    candidates = candidates_of(config, processors(device))
    ways = How(impl="reference"), How(plans, "reference")  # no kernel of ours has been checked on this device yet

    def images(count: int, channels: int) -> Tensor:
        x = torch.rand(count, channels, size, size, generator=draws).mul_(2).sub_(1).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def common(arena: Arena) -> Common:
        take = (lambda weight, gradient: None) if updates_at_once(precision, processes=1) else None
        return Common(arena.compute, Gradients(arena.gradients, take=take), impl, candidates)

    net = Unet(config.generator).to(device).train()
    arena = Arena(net, dtype)
    x = images(batch, config.generator.in_channels)
    counters = torch.tensor([config.seed, 0, 0], device=device)
    plain, own = (generator_forward(net, arena.compute, x, counters, how)[1] for how in ways)
    found = _generator_sites(net, plain, own, common(arena))
    readers = _generator_readers(net, batch)
    if config.adversarial:
        judge = PatchGAN(config.discriminator()).to(device).train()
        arena = Arena(judge, dtype)
        for groups in (2, 1):
            seen = images(groups * batch, config.discriminator().in_channels)
            first, second = (discriminator_forward(judge, arena.compute, seen, groups, how)[1] for how in ways)
            found += _discriminator_sites(groups, first, second, common(arena))
            keys = [(f"blocks.{n}.conv.weight", len(seen)) for n in range(len(judge.blocks))]
            readers |= {key: [reader] for key, reader in pairwise(keys)}
    return Sites(found, readers)


def candidates_of(config: Train, processors: int) -> dict[Key, Candidates]:
    """What may be tried of every node at every batch size that a step has."""
    found = {}
    for layer, groups in layers_of(config):
        if layer.node.kind != "resize" and not layer.node.geometry.not_supported_reasons():
            forward, dgrad = problems(layer, groups)
            wgrad = wgrad_candidates(layer.node.geometry, map_of(layer.x), layer.w, processors)
            found[layer.node.weight, layer.x[0]] = Candidates(
                tuple(conv_candidates(forward)), tuple(conv_candidates(dgrad)), tuple(wgrad)
            )
    return found


def _generator_sites(net: Unet, plain: Saved, own: Saved, common: Common) -> list[Site]:
    last, skips = net.config.depth - 1, net.config.kind == "unet"
    found = []
    for level, stages in enumerate(zip(plain.down, own.down, strict=True)):
        front = plain.down[level - 1] if level else None
        activations = "leaky" if level < last else "relu", "leaky"
        second, behind_second = skips and level < last, skips and level > 0
        found.append(_site(stages, front, activations, common, second, behind_second, goes_on=level > 0))
    for number, stages in enumerate(zip(plain.up, own.up, strict=True)):
        front = plain.up[number - 1] if number else plain.down[last]
        found.append(_site(stages, front, ("relu" if number < last else "tanh", "relu"), common))
    return found


def _discriminator_sites(groups: int, plain: Sequence[Stage], own: Sequence[Stage], common: Common) -> list[Site]:
    """groups = 2: joined, where it learns; 1: the generator's gradient goes through it."""
    found = []
    for number, stages in enumerate(zip(plain, own, strict=True)):
        front = plain[number - 1] if number else None
        activations = "none" if number == len(plain) - 1 else "leaky", "leaky"
        learns = groups == 2
        found.append(_site(stages, front, activations, common, learns=learns, goes_on=number > 0 or not learns))
    return found


def _site(
    stages: tuple[Stage, Stage],
    front: Stage | None,
    activations: tuple[str, str],
    common: Common,
    second: bool = False,
    behind_second: bool = False,
    learns: bool = True,
    goes_on: bool = True,
) -> Site:
    key = stages[0].node.weight, stages[0].x.size.images
    params, gradients, impl, candidates = common
    return Site(
        key, *stages, front, second, behind_second, *activations, learns, goes_on,
        params, gradients, impl, candidates.get(key, Candidates()),
    )  # fmt: skip


def _generator_readers(net: Unet, batch: int) -> dict[Key, list[Key]]:
    last = net.config.depth - 1
    chain = [f"down.{i}" for i in range(last + 1)] + [f"up.{i}" for i in range(last + 1)]
    readers: dict[Key, list[Key]] = {}
    for number, name in enumerate(chain[:-1]):
        readers[f"{name}.conv.weight", batch] = [(f"{chain[number + 1]}.conv.weight", batch)]
        if net.config.kind == "unet" and number < last:
            readers[f"{name}.conv.weight", batch].append((f"up.{last - number}.conv.weight", batch))
    return readers

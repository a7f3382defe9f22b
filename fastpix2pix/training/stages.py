"""One block of a network inside an explicit pass: convolve, then normalise, drop and activate; and back.

Between two blocks a feature map is either activated, or raw with what its readers apply while loading. The latter saves
writing and reading it once more, and needs readers that can: the project's own products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.bias_act import bias_act, bias_act_backward
from ..kernels.conv import Norm, Product, conv, conv_dgrad
from ..kernels.conv_plan import LAZY_ROWS, TILE_ROWS
from ..kernels.conv_wgrad import conv_wgrad
from ..kernels.finalise import finalise
from ..kernels.geometry import Map, Source
from ..kernels.norm_act import Output, Running, Statistics, norm_act, norm_act_backward
from ..kernels.philox import Noise
from ..kernels.rows import Sums
from .arena import Gradients, Parameters
from .convolution import Node, Plans, aten_backward, aten_forward, image, node_of, rows


@dataclass(frozen=True)
class How:
    """Who computes: each node's products, and the implementation of the kernels."""

    plans: Mapping[tuple[str, int], Plans] = field(default_factory=dict)  # by weight name and images; default ATen
    impl: str = "auto"

    def of(self, weight: str, images: int) -> Plans:
        return self.plans.get((weight, images), Plans())


class Feature(NamedTuple):
    """A feature map as a block reads it."""

    sources: tuple[Source, ...]  # side by side
    size: Map

    def tensor(self) -> Tensor:
        """[N, C, H, W]; only of one activated source."""
        (source,) = self.sources
        assert source.scale is None and source.activation == "none", "raw rows for a reader that cannot activate them"
        return image(source.rows, *self.size)

    @classmethod
    def of(cls, x: Tensor) -> Feature:
        """[N, C, H, W] channels-last."""
        n, _, h, w = x.shape
        return cls((Source(rows(x)),), Map(n, h, w))


@dataclass
class Stage:
    """One block as forward left it."""

    name: str  # state name of the block
    block: nn.Module  # model.layers.Block
    node: Node
    plans: Plans
    x: Feature  # what its convolution read
    raw: Tensor  # [M, K] what it wrote
    size: Map  # of that
    groups: int  # of images with statistics of their own
    product: Product  # what the convolution left for the normalisation
    statistics: Statistics | None = None
    noise: Noise | None = None

    @property
    def normalises(self) -> bool:
        return not isinstance(self.block.norm, nn.Identity)


def convolve(
    block: nn.Module,
    name: str,
    params: Parameters,
    x: Feature,
    how: How,
    groups: int = 1,  # of a batch norm: 2 where translated and real images are joined; an instance norm has its own
) -> Stage:
    """The block's convolution, without its bias."""
    node = node_of(block.conv, f"{name}.conv.weight")  # type: ignore[arg-type]
    images, w = x.size.images, params[node.weight]
    plans = how.of(node.weight, images)
    if not isinstance(block.norm, nn.BatchNorm2d | nn.Identity):
        groups = images
    if plans.forward is None:
        y = aten_forward(x.tensor(), w, node)
        return Stage(name, block, node, plans, x, rows(y), Map(images, *y.shape[2:]), groups, Product())
    geometry = node.geometry
    size = Map(images, geometry.output(x.size.height), geometry.output(x.size.width))
    channels = geometry.forward().channels(tuple(w.shape))[1]
    raw = x.sources[0].rows.new_empty(size.rows, channels)
    fused = not isinstance(block.norm, nn.Identity) and size.rows // groups >= TILE_ROWS
    product = conv(
        x.sources,
        w,
        geometry,
        x.size,
        raw,
        groups=product_groups(x, groups, fused),
        statistics=fused and plans.forward.splits == 1,
        partials=True,
        plan=plans.forward,
        impl=how.impl,
    )
    return Stage(name, block, node, plans, x, raw, size, groups, product)


def product_groups(x: Feature, groups: int, fused: bool) -> int:
    """Groups of images that a product tells apart: those of the scales it applies, else of the statistics it takes.

    (The last block of a generator takes none, and may read what an instance norm left.)
    """
    scales = {len(source.scale) for source in x.sources if source.scale is not None}
    return scales.pop() if scales else groups if fused else 1


def convolve_backward(
    stage: Stage,
    params: Parameters,
    gradients: Gradients | None,  # where the kernel's goes; None: it is not wanted
    g: Tensor,  # [M, K] gradient of stage.raw
    how: How,
    *,
    need_dx: bool = True,
    norm: Norm | None = None,  # the normalisation in front: its sums are taken where that saves a pass
) -> tuple[Tensor, Sums | None]:  # rows of the input's gradient; empty where it is not needed
    """dgrad and wgrad of the block's convolution."""
    node, plans, w = stage.node, stage.plans, params[stage.node.weight]
    from_library = gradients if plans.wgrad is None else None
    if gradients is not None and plans.wgrad is not None:
        conv_wgrad(
            stage.x.sources,
            g,
            gradients.arrays[node.weight],
            node.geometry,
            stage.x.size,
            accumulate=gradients.accumulate,
            plan=plans.wgrad,
            impl=how.impl,
        )
    dx, sums = g.new_empty(0), None
    if need_dx and plans.dgrad is not None:
        dx = g.new_empty(stage.x.size.rows, sum(source.rows.shape[1] for source in stage.x.sources))
        groups = 1 if norm is None else len(norm.statistics.mean)
        fused = norm is not None and plans.dgrad.splits == 1 and len(dx) // groups >= TILE_ROWS
        sums = conv_dgrad(
            g,
            w,
            node.geometry,
            stage.x.size,
            dx,
            norm=norm if fused else None,
            groups=groups if fused else 1,
            plan=plans.dgrad,
            impl=how.impl,
        ).sums
        need_dx = False
    if need_dx or from_library is not None:
        dy = image(g, *stage.size)
        x = _like_input(stage, g) if from_library is None else stage.x.tensor()
        found, dw = aten_backward(dy, x, w, node, need_dx, from_library is not None)
        dx = dx if found is None else rows(found)
        if from_library is not None and dw is not None:
            _leave(from_library, node.weight, dw)
    return dx, sums


def _leave(gradients: Gradients, weight: str, dw: Tensor) -> None:
    """Pass the library's gradient of a kernel on, or copy it to where it is wanted."""
    if gradients.take is not None:
        gradients.take(weight, dw.contiguous(memory_format=torch.channels_last))
        return
    into = gradients.arrays[weight]
    into.copy_(into + dw if gradients.accumulate else dw)


def _like_input(stage: Stage, g: Tensor) -> Tensor:
    """[N, C, H, W] memory that is not read: a dgrad asks only for the shape and, in cuDNN's case, the memory format of
    the input: from any other it would copy g to that and back."""
    n, h, w = stage.x.size
    return image(g.new_empty(n * h * w, sum(source.rows.shape[1] for source in stage.x.sources)), n, h, w)


def activate(stage: Stage, params: Parameters, outputs: Sequence[Output], how: How) -> None:
    """Normalise, drop and activate, or add the bias and activate. A bias in front of a norm changes nothing."""
    tiles, partials = stage.product.tiles, stage.product.partials
    stage.product = Product()
    if not stage.normalises:
        bias = params.get(f"{stage.name}.conv.bias")
        bias_act(stage.raw, bias, outputs, partials=partials, impl=how.impl)
        return
    stage.statistics = norm_act(
        stage.raw,
        params.get(f"{stage.name}.norm.weight"),
        params.get(f"{stage.name}.norm.bias"),
        outputs,
        groups=stage.groups,
        images=stage.size.images,
        noise=stage.noise,
        running=_running(stage.block),
        tiles=tiles,
        partials=partials,
        impl=how.impl,
    )


def may_defer(stage: Stage, params: Parameters) -> bool:
    """Whether readers could apply the rest while loading: dropout is not drawn there, and small maps do not pay."""
    if stage.noise is not None or stage.product.partials is not None or stage.size.rows // stage.groups < LAZY_ROWS:
        return False
    return stage.product.tiles is not None if stage.normalises else f"{stage.name}.conv.bias" not in params


def defer(stage: Stage, params: Parameters, activation: str, how: How) -> Source:
    """The raw output with what its readers apply."""
    if not stage.normalises:
        return Source(stage.raw, activation)
    assert stage.product.tiles is not None
    found = finalise(
        stage.product.tiles,
        params.get(f"{stage.name}.norm.weight"),
        params.get(f"{stage.name}.norm.bias"),
        rows=len(stage.raw) // stage.groups,
        running=_running(stage.block),
        impl=how.impl,
    )
    stage.product = Product()
    stage.statistics = found.statistics
    return Source(stage.raw, activation, found.scale, found.shift)


def _running(block: nn.Module) -> Running | None:
    norm = block.norm
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    return Running(norm.running_mean, norm.running_var, norm.num_batches_tracked)


def norm_of(stage: Stage, params: Parameters, activation: str, other: Output | None = None) -> Norm | None:
    """The stage's normalisation as a gradient from behind `activation` meets it; None where it has none, or drops."""
    if stage.statistics is None or stage.noise is not None:
        return None
    gamma, beta = (params.get(f"{stage.name}.norm.{name}") for name in ("weight", "bias"))
    return Norm(stage.raw, gamma, beta, stage.statistics, activation, other)


def activate_backward(
    stage: Stage,
    params: Parameters,
    gradients: Gradients | None,
    outputs: Sequence[Output],  # gradients of the activated outputs
    how: How,
    *,
    sums: Sums | None = None,  # of them, where they have been taken
) -> Tensor:  # [M, K] gradient of stage.raw
    """Through activation, dropout and normalisation; writes the gradients of gamma, beta or the bias."""
    dx = torch.empty_like(stage.raw)
    found, accumulate, _ = gradients or Gradients({})
    if stage.statistics is None:
        bias = f"{stage.name}.conv.bias"
        dbias = found.get(bias)
        bias_act_backward(outputs, stage.raw, params.get(bias), dx, dbias, accumulate=accumulate, impl=how.impl)
        return dx
    norm_act_backward(
        outputs,
        stage.raw,
        params.get(f"{stage.name}.norm.weight"),
        params.get(f"{stage.name}.norm.bias"),
        stage.statistics,
        dx,
        found.get(f"{stage.name}.norm.weight"),
        found.get(f"{stage.name}.norm.bias"),
        images=stage.size.images,
        noise=stage.noise,
        sums=sums,
        accumulate=accumulate,
        impl=how.impl,
    )
    return dx

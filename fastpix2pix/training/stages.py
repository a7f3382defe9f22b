"""One block of a network inside an explicit pass: convolve, then normalise, drop and activate; and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..kernels.bias_act import bias_act, bias_act_backward
from ..kernels.norm_act import Output, Running, Statistics, norm_act, norm_act_backward
from ..kernels.philox import Noise
from .arena import Parameters
from .convolution import Aten, Convolution, Node, image, node_of, rows

_ATEN = Aten()


@dataclass(frozen=True)
class How:
    """Who computes: the convolution of each node, and the implementation of the kernels."""

    convolutions: dict[str, Convolution] = field(default_factory=dict)  # by weight name; default Aten
    impl: str = "auto"

    def convolution(self, node: Node) -> Convolution:
        return self.convolutions.get(node.weight, _ATEN)


@dataclass
class Stage:
    """One block as forward left it."""

    name: str  # state name of the block
    block: nn.Module  # model.layers.Block
    node: Node
    x: Tensor  # [N, C, H, W] what its convolution read
    raw: Tensor  # [M, K] what it wrote: rows of [N, K, h, w]
    h: int
    w: int
    statistics: Statistics | None = None
    noise: Noise | None = None


def convolve(block: nn.Module, name: str, params: Parameters, x: Tensor, how: How) -> Stage:
    """The block's convolution, without its bias. x: [N, C, H, W] channels-last."""
    node = node_of(block.conv, f"{name}.conv.weight")  # type: ignore[arg-type]
    y = how.convolution(node).forward(x, params[node.weight], node)
    return Stage(name, block, node, x, rows(y), *y.shape[2:])


def convolve_backward(
    stage: Stage,
    params: Parameters,
    gradients: Parameters | None,  # the kernel's gradient is written there; None: it is not wanted
    g: Tensor,  # [M, K] gradient of stage.raw
    how: How,
    *,
    need_dx: bool = True,
    accumulate: bool = False,
) -> Tensor:  # rows of the input's gradient; empty where it is not needed
    """dgrad and wgrad of the block's convolution."""
    node = stage.node
    dy = image(g, len(stage.x), stage.h, stage.w)
    dw = None if gradients is None else gradients[node.weight]
    dx = how.convolution(node).backward(dy, stage.x, params[node.weight], node, dw, need_dx, accumulate)
    return g.new_empty(0) if dx is None else rows(dx)


def activate(stage: Stage, params: Parameters, outputs: Sequence[Output], groups: int, how: How) -> None:
    """Normalise, drop and activate, or add the bias and activate.

    `groups`: statistics groups of a batch norm, 2 where translated and real images are joined. An instance norm has one
    per image; a bias in front of a norm changes nothing and is left out.
    """
    norm, images = stage.block.norm, len(stage.x)
    if isinstance(norm, nn.Identity):
        bias_act(stage.raw, params.get(f"{stage.name}.conv.bias"), outputs, impl=how.impl)
        return
    running = None
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
        running = Running(norm.running_mean, norm.running_var, norm.num_batches_tracked)
    stage.statistics = norm_act(
        stage.raw,
        params.get(f"{stage.name}.norm.weight"),
        params.get(f"{stage.name}.norm.bias"),
        outputs,
        groups=images if running is None else groups,
        images=images,
        noise=stage.noise,
        running=running,
        impl=how.impl,
    )


def activate_backward(
    stage: Stage,
    params: Parameters,
    gradients: Parameters | None,
    outputs: Sequence[Output],  # gradients of the activated outputs
    how: How,
    *,
    accumulate: bool = False,
) -> Tensor:  # [M, K] gradient of stage.raw
    """Through activation, dropout and normalisation; writes the gradients of gamma, beta or the bias."""
    dx = torch.empty_like(stage.raw)
    found: Parameters = {} if gradients is None else gradients
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
        images=len(stage.x),
        noise=stage.noise,
        accumulate=accumulate,
        impl=how.impl,
    )
    return dx

"""The convolutions of the explicit passes: nodes, who computes them, and ATen's way (cuDNN, on a CPU oneDNN).

Activations travel as rows [N * H * W, C] (kernels/norm_act.py); ATen sees them as channels-last [N, C, H, W].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.conv_plan import ConvPlan
from ..kernels.conv_wgrad import WgradPlan
from ..kernels.geometry import Geometry
from ..model.layers import ResizeConv


class Node(NamedTuple):
    """One convolution of a network."""

    weight: str  # state name of its kernel
    kind: str  # conv, transposed, or resize (nearest 2x, then a 3x3 conv)
    kernel: int
    stride: int
    padding: int

    @property
    def geometry(self) -> Geometry:
        """Of the product itself: without the enlargement of a resize."""
        return Geometry(self.kernel, self.stride, self.padding, self.kind == "transposed")


class Plans(NamedTuple):
    """Who computes a node's three products: the project's kernels by a plan, or ATen (None)."""

    forward: ConvPlan | None = None
    dgrad: ConvPlan | None = None
    wgrad: WgradPlan | None = None

    @property
    def reads_sources(self) -> bool:
        """Whether nothing needs the input as one activated tensor."""
        return self.forward is not None and self.wgrad is not None


def aten_forward(
    x: Tensor,  # [N, C, H, W] channels-last
    w: Tensor,  # kernel, channels-last, dtype of x
    node: Node,
) -> Tensor:  # [N, K, H', W']
    """The node's output."""
    if node.kind == "resize":
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return torch.ops.aten.convolution(x, w, None, *_arguments(node))


def aten_backward(
    dy: Tensor,  # [N, K, H', W'] channels-last
    x: Tensor,  # [N, C, H, W]
    w: Tensor,
    node: Node,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the kernel, where they are needed; None else.

    cuDNN makes a channels-last gradient of a channels-last kernel, oneDNN does not.
    """
    seen = F.interpolate(x, scale_factor=2.0, mode="nearest") if node.kind == "resize" else x
    wanted = [need_dx, need_dw, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(dy, seen, w, None, *_arguments(node), wanted)
    if need_dx and node.kind == "resize":
        dx = 4 * F.avg_pool2d(dx, 2)
    return dx if need_dx else None, dw if need_dw else None


def _arguments(node: Node) -> tuple:
    transposed = node.kind == "transposed"
    return [node.stride] * 2, [node.padding] * 2, [1, 1], transposed, [0, 0], 1


def node_of(conv: nn.Module, weight: str) -> Node:
    """The node of a Conv2d, ResizeConv or ConvTranspose2d."""
    assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
    kind = "transposed" if isinstance(conv, nn.ConvTranspose2d) else "conv"
    kind = "resize" if isinstance(conv, ResizeConv) else kind
    return Node(weight, kind, conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))


def rows(
    x: Tensor,  # [N, C, H, W]
) -> Tensor:  # [N * H * W, C], the same memory
    """A channels-last tensor as rows; another is copied. (Strides of 1x1 maps and of one channel say nothing.)"""
    n, c, h, w = x.shape
    return x.contiguous(memory_format=torch.channels_last).as_strided((n * h * w, c), (c, 1))


def image(
    x: Tensor,  # [N * H * W, C] contiguous rows
    n: int,
    h: int,
    w: int,
) -> Tensor:  # [N, C, H, W], the same memory
    """Rows as a channels-last tensor."""
    c = x.shape[1]
    return x.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))

"""The convolutions of the explicit passes, one implementation per node; here cuDNN's (oneDNN's on a CPU), through ATen.

Activations travel as rows [N * H * W, C] (kernels/norm_act.py); a convolution sees them as channels-last [N, C, H, W].
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.layers import ResizeConv


class Node(NamedTuple):
    """One convolution of a network."""

    weight: str  # state name of its kernel
    kind: str  # conv, transposed, or resize (nearest 2x, then a 3x3 conv)
    stride: int
    padding: int


class Convolution(Protocol):
    """How a node's three products are computed."""

    def forward(
        self,
        x: Tensor,  # [N, C, H, W] channels-last
        w: Tensor,  # kernel, channels-last, dtype of x
        node: Node,
    ) -> Tensor: ...

    def backward(
        self,
        dy: Tensor,  # [N, K, H', W'] channels-last
        x: Tensor,  # [N, C, H, W]
        w: Tensor,
        node: Node,
        dw: Tensor | None,  # written where given: gradient of the kernel
        need_dx: bool,
        accumulate: bool,  # add to dw
    ) -> Tensor | None: ...


class Aten:
    """`aten.convolution` and `convolution_backward`: whatever library torch has for the device."""

    def forward(self, x: Tensor, w: Tensor, node: Node) -> Tensor:
        if node.kind == "resize":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return torch.ops.aten.convolution(x, w, None, *_geometry(node))

    def backward(
        self, dy: Tensor, x: Tensor, w: Tensor, node: Node, dw: Tensor | None, need_dx: bool, accumulate: bool
    ) -> Tensor | None:
        seen = F.interpolate(x, scale_factor=2.0, mode="nearest") if node.kind == "resize" else x
        wanted = [need_dx, dw is not None, False]
        dx, new_dw, _ = torch.ops.aten.convolution_backward(dy, seen, w, None, *_geometry(node), wanted)
        if dw is not None:
            dw.copy_(dw + new_dw if accumulate else new_dw)
        if need_dx and node.kind == "resize":
            dx = 4 * F.avg_pool2d(dx, 2)
        return dx if need_dx else None


def _geometry(node: Node) -> tuple:
    transposed = node.kind == "transposed"
    return [node.stride] * 2, [node.padding] * 2, [1, 1], transposed, [0, 0], 1


def node_of(conv: nn.Module, weight: str) -> Node:
    """The node of a Conv2d, ResizeConv or ConvTranspose2d."""
    assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
    kind = "transposed" if isinstance(conv, nn.ConvTranspose2d) else "conv"
    return Node(weight, "resize" if isinstance(conv, ResizeConv) else kind, conv.stride[0], int(conv.padding[0]))


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

"""The discriminator's training pass, forward and backward written out.

Translated and real images may go through joined, one behind the other in the batch: every group has statistics of its
own, and the running statistics are updated group by group, as two passes would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.geometry import Source
from ..kernels.norm_act import Output
from ..model import PatchGAN
from .arena import Gradients, Parameters
from .convolution import image
from .stages import (
    Feature,
    How,
    Stage,
    activate,
    activate_backward,
    convolve,
    convolve_backward,
    defer,
    may_defer,
    norm_of,
)

Saved = list[Stage]  # the blocks in the order of forward


def discriminator_forward(
    net: PatchGAN,
    params: Parameters,  # kernels in the compute dtype, vectors fp32
    x: Tensor,  # [groups * N, C, H, W] compute dtype, channels-last
    groups: int,
    how: How,
) -> tuple[Tensor, Saved]:
    """(logits [groups * N * h * w], what backward needs). Updates the running statistics of `net`, group by group."""
    saved: Saved = []
    a, last = Feature.of(x), len(net.blocks) - 1
    for number, block in enumerate(net.blocks):
        stage = convolve(block, f"blocks.{number}", params, a, how, groups)
        reader = how.of(f"blocks.{number + 1}.conv.weight", len(x))
        if number < last and reader.reads_sources and may_defer(stage, params):
            source = defer(stage, params, "leaky", how)
        else:
            source = Source(torch.empty_like(stage.raw))
            activate(stage, params, [Output(source.rows, "none" if number == last else "leaky")], how)
        saved.append(stage)
        a = Feature((source,), stage.size)
    return source.rows.view(-1), saved


def discriminator_backward(
    params: Parameters,
    gradients: Gradients | None,  # None: only the input's is wanted
    saved: Saved,
    d_logits: Tensor,  # [groups * N * h * w] compute dtype
    how: How,
    *,
    need_dx: bool = False,
) -> Tensor:  # [groups * N, C, H, W] gradient of the input; empty where it is not needed
    """Gradients of the parameters, of the input, or of both."""
    below, activation, sums = d_logits.view(-1, 1), "none", None
    for number in range(len(saved) - 1, -1, -1):
        stage = saved[number]
        outputs = [Output(below, activation)]
        g = activate_backward(stage, params, gradients, outputs, how, sums=sums)
        activation = "leaky"
        norm = norm_of(saved[number - 1], params, activation) if number else None
        wanted = number > 0 or need_dx
        below, sums = convolve_backward(stage, params, gradients, g, how, need_dx=wanted, norm=norm)
    return image(below, *saved[0].x.size) if need_dx else below

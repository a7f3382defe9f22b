"""The discriminator's training pass, forward and backward written out.

Translated and real images may go through joined, one behind the other in the batch: every group has statistics of its
own, and the running statistics are updated group by group, as two passes would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.norm_act import Output
from ..model import PatchGAN
from .arena import Parameters
from .convolution import image
from .stages import How, Stage, activate, activate_backward, convolve, convolve_backward

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
    a = x
    for number, block in enumerate(net.blocks):
        stage = convolve(block, f"blocks.{number}", params, a, how)
        out = torch.empty_like(stage.raw)
        last = number == len(net.blocks) - 1
        activate(stage, params, [Output(out, "none" if last else "leaky")], groups, how)
        saved.append(stage)
        a = image(out, len(x), stage.h, stage.w)
    return out.view(-1), saved


def discriminator_backward(
    params: Parameters,
    gradients: Parameters | None,  # written, by name; None: only the input's gradient is wanted
    saved: Saved,
    d_logits: Tensor,  # [groups * N * h * w] compute dtype
    how: How,
    *,
    need_dx: bool = False,
    accumulate: bool = False,
) -> Tensor:  # [groups * N, C, H, W] gradient of the input; empty where it is not needed
    """Gradients of the parameters, of the input, or of both."""
    below, activation = d_logits.view(-1, 1), "none"
    for number in range(len(saved) - 1, -1, -1):
        stage = saved[number]
        outputs = [Output(below, activation)]
        g = activate_backward(stage, params, gradients, outputs, how, accumulate=accumulate)
        below = convolve_backward(
            stage, params, gradients, g, how, need_dx=number > 0 or need_dx, accumulate=accumulate
        )
        activation = "leaky"
    if not need_dx:
        return below
    n, _, h, w = saved[0].x.shape
    return image(below, n, h, w)

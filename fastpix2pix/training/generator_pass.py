"""The generator's training pass, forward and backward written out: what a CUDA graph captures.

Same function as `Unet.forward` in training mode, but dropout masks come from counters (kernels/philox.py). Each
normalisation writes its one or two activated outputs where they are needed: leaky(z) for the next convolution, relu(z)
into its half of the concatenation that the matching up-block reads, so nothing is concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import Train
from ..kernels.bias_act import bias_act
from ..kernels.norm_act import Output
from ..kernels.philox import Noise
from ..model import Unet
from .arena import Parameters
from .convolution import image
from .stages import How, Stage, activate, activate_backward, convolve, convolve_backward


@dataclass
class Saved:
    """What backward needs: the blocks in the order of forward."""

    down: list[Stage] = field(default_factory=list)
    up: list[Stage] = field(default_factory=list)


def idle_border(config: Train) -> list[str]:
    """State names of the 4x4 kernels whose outer 12 taps never meet a pixel of a training image.

    Crops of 2**depth pixels leave 2x2 to the innermost down-block: with padding 1 its single output sees them through
    the middle taps, and the others see padding. A transposed up-block makes 2x2 out of one pixel by the same taps.
    (The 3x3 kernel of a resize block uses all of its own.)
    """
    generator = config.generator
    if config.data.crop_size != generator.multiple:
        return []
    found = [f"down.{generator.depth - 1}.conv.weight"]
    return [*found, "up.0.conv.weight"] if generator.up == "transposed" else found


def generator_forward(
    net: Unet,
    params: Parameters,  # kernels in the compute dtype, vectors fp32
    x: Tensor,  # [N, in, H, W] compute dtype, channels-last
    counters: Tensor,  # [3] int64 on the device: seed, step, first image
    how: How,
) -> tuple[Tensor, Saved]:
    """(image [N, out, H, W] in the compute dtype, what backward needs). Updates the running statistics of `net`."""
    skips = net.config.kind == "unet"
    last = net.config.depth - 1
    saved = Saved()
    joined: list[Tensor] = []  # per level, outermost first: rows [M, 2C], the skip left, the up-block's output right
    a = x
    for level in range(last + 1):
        stage = convolve(net.down[level], f"down.{level}", params, a, how)
        onward = torch.empty_like(stage.raw)
        outputs = [Output(onward, "leaky" if level < last else "relu")]
        if skips and level < last:
            m, c = stage.raw.shape
            joined.append(stage.raw.new_empty(m, 2 * c))
            outputs.append(Output(joined[-1][:, :c], "relu"))
        activate(stage, params, outputs, 1, how)
        saved.down.append(stage)
        a = image(onward, len(x), stage.h, stage.w)
    for number in range(last):
        block = net.up[number]
        stage = convolve(block, f"up.{number}", params, a, how)
        if block.dropout is not None:
            stage.noise = Noise(counters, block.dropout.block)  # type: ignore[union-attr, arg-type]
        onward = joined.pop() if skips else torch.empty_like(stage.raw)
        activate(stage, params, [Output(onward[:, -stage.raw.shape[1] :], "relu")], 1, how)
        saved.up.append(stage)
        a = image(onward, len(x), stage.h, stage.w)
    stage = convolve(net.up[last], f"up.{last}", params, a, how)
    y = torch.empty_like(stage.raw)
    bias_act(stage.raw, params.get(f"up.{last}.conv.bias"), [Output(y, "tanh")], impl=how.impl)
    saved.up.append(stage)
    return image(y, len(x), stage.h, stage.w), saved


def generator_backward(
    net: Unet,
    params: Parameters,
    gradients: Parameters,  # written, by name; biases in front of a normalisation are left alone: theirs is exactly 0
    saved: Saved,
    d_raw: Tensor,  # [N * H * W, out] gradient of the last convolution's output, that is through tanh and bias
    how: How,
    *,
    accumulate: bool = False,  # add to the gradients
) -> None:
    """Every parameter's gradient."""
    last = net.config.depth - 1
    bias = gradients[f"up.{last}.conv.bias"]
    total = d_raw.sum(0, dtype=bias.dtype)
    bias.copy_(bias + total if accumulate else total)
    skips: list[Tensor] = []  # gradients of the skips, outermost first
    g = d_raw
    for number in range(last, -1, -1):
        below = convolve_backward(saved.up[number], params, gradients, g, how, accumulate=accumulate)
        into = saved.up[number - 1] if number else saved.down[last]
        c = into.raw.shape[1]
        if below.shape[1] > c:
            skips.append(below[:, :c])
        g = activate_backward(into, params, gradients, [Output(below[:, -c:], "relu")], how, accumulate=accumulate)
    for level in range(last, -1, -1):
        below = convolve_backward(
            saved.down[level], params, gradients, g, how, need_dx=level > 0, accumulate=accumulate
        )
        if level:
            outputs = [Output(below, "leaky")]
            if skips:
                outputs.append(Output(skips.pop(), "relu"))
            g = activate_backward(saved.down[level - 1], params, gradients, outputs, how, accumulate=accumulate)

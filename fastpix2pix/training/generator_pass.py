"""The generator's training pass, forward and backward written out: what a CUDA graph captures.

Same function as `Unet.forward` in training mode, but dropout masks come from counters (kernels/philox.py). Each
normalisation writes its one or two activated outputs where they are needed: leaky(z) for the next convolution, relu(z)
into its half of the concatenation that the matching up-block reads, so nothing is concatenated. Where the readers are
the project's own products, a map is written once, and they read it where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Train
from ..kernels.geometry import Source
from ..kernels.norm_act import Output
from ..kernels.philox import Noise
from ..model import Unet
from .arena import Gradients, Parameters
from .convolution import Plans, image
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
    images = len(x)
    saved = Saved()
    beside: list[_Skip] = []  # per level, outermost first
    a = Feature.of(x)
    for level in range(last + 1):
        stage = convolve(net.down[level], f"down.{level}", params, a, how)
        reader = how.of(f"down.{level + 1}.conv.weight" if level < last else "up.0.conv.weight", images)
        above = how.of(f"up.{last - level}.conv.weight", images) if skips and level < last else None
        source, skip = _down(stage, params, "leaky" if level < last else "relu", reader, above, how)
        if skip is not None:
            beside.append(skip)
        saved.down.append(stage)
        a = Feature((source,), stage.size)
    for number in range(last):
        block = net.up[number]
        stage = convolve(block, f"up.{number}", params, a, how)
        if block.dropout is not None:
            stage.noise = Noise(counters, block.dropout.block)  # type: ignore[union-attr, arg-type]
        reader = how.of(f"up.{number + 1}.conv.weight", images)
        a = _up(stage, params, reader, beside.pop() if skips else None, how)
        saved.up.append(stage)
    stage = convolve(net.up[last], f"up.{last}", params, a, how)
    y = torch.empty_like(stage.raw)
    activate(stage, params, [Output(y, "tanh")], how)
    saved.up.append(stage)
    return image(y, *stage.size), saved


class _Skip(NamedTuple):
    """What a down-block leaves for the up-block of its level."""

    source: Source | None = None  # read where it lies
    joined: Tensor | None = None  # or the left half of these rows [M, 2C]: the right one is the up-block's to write


def _down(
    stage: Stage, params: Parameters, activation: str, reader: Plans, above: Plans | None, how: How
) -> tuple[Source, _Skip | None]:
    """What the next block reads, and what the up-block of the same level does (`above`; None: there is no skip)."""
    if may_defer(stage, params) and reader.reads_sources and (above is None or above.reads_sources):
        source = defer(stage, params, activation, how)
        return source, None if above is None else _Skip(source._replace(activation="relu"))
    onward = torch.empty_like(stage.raw)
    outputs, skip = [Output(onward, activation)], None
    if above is not None:
        skip = _Skip(Source(onward, "relu"))  # relu(leaky(z)) = relu(z)
        if not above.reads_sources:
            m, c = stage.raw.shape
            skip = _Skip(joined=stage.raw.new_empty(m, 2 * c))
            outputs.append(Output(skip.joined[:, :c], "relu"))  # type: ignore[index]
    activate(stage, params, outputs, how)
    return Source(onward), skip


def _up(stage: Stage, params: Parameters, reader: Plans, skip: _Skip | None, how: How) -> Feature:
    """What the next up-block reads: the skip and this block's output."""
    if skip is not None and skip.joined is not None:
        activate(stage, params, [Output(skip.joined[:, -stage.raw.shape[1] :], "relu")], how)
        return Feature((Source(skip.joined),), stage.size)
    if reader.reads_sources and may_defer(stage, params):
        source = defer(stage, params, "relu", how)
    else:
        source = Source(torch.empty_like(stage.raw))
        activate(stage, params, [Output(source.rows, "relu")], how)
    beside = () if skip is None or skip.source is None else (skip.source,)
    return Feature((*beside, source), stage.size)


def generator_backward(
    net: Unet,
    params: Parameters,
    gradients: Gradients,  # biases in front of a normalisation are left alone: theirs is exactly 0
    saved: Saved,
    d_raw: Tensor,  # [N * H * W, out] gradient of the last convolution's output, that is through tanh and bias
    how: How,
) -> None:
    """Every parameter's gradient."""
    last = net.config.depth - 1
    bias = gradients.arrays[f"up.{last}.conv.bias"]
    total = d_raw.sum(0, dtype=bias.dtype)
    bias.copy_(bias + total if gradients.accumulate else total)
    skips: list[Tensor] = []  # gradients of the skips, outermost first
    g = d_raw
    for number in range(last, -1, -1):
        into = saved.up[number - 1] if number else saved.down[last]
        norm = norm_of(into, params, "relu")
        below, sums = convolve_backward(saved.up[number], params, gradients, g, how, norm=norm)
        c = into.raw.shape[1]
        if below.shape[1] > c:
            skips.append(below[:, :c])
        outputs = [Output(below[:, -c:], "relu")]
        g = activate_backward(into, params, gradients, outputs, how, sums=sums)
    for level in range(last, -1, -1):
        other = Output(skips.pop(), "relu") if skips and level else None
        norm = norm_of(saved.down[level - 1], params, "leaky", other) if level else None
        below, sums = convolve_backward(saved.down[level], params, gradients, g, how, need_dx=level > 0, norm=norm)
        if level:
            outputs = [Output(below, "leaky"), *([] if other is None else [other])]
            g = activate_backward(saved.down[level - 1], params, gradients, outputs, how, sums=sums)

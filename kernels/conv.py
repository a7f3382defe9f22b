"""A convolution's output, or its input's gradient: one gather product (geometry.py) with what is next to it fused in.

While loading: the scale, shift and activation of the producer, and two sources side by side instead of a
concatenation. While storing: bias and activation; or the statistics that the next normalisation needs; or, in backward,
the sums that its backward pass needs; or nothing but partial sums, which the kernel that follows adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import interpreted
from .activations import ACTIVATIONS
from .conv_kernel import _conv_kernel
from .conv_plan import ConvPlan, Problem, conv_plan, stages_for
from .dispatch import choose, launch
from .division import reciprocal
from .geometry import Gather, Geometry, Map, Source
from .norm_act_backward import hidden
from .rows import Output, Statistics, Sums, Tiles
from .split import sum_splits


class Norm(NamedTuple):
    """The normalisation that a gradient arrives at: the last C channels of what dgrad writes are its output's.

    Without dropout, whose random bits would take the registers of half a tile.
    """

    x: Tensor  # [M, C] as given to norm_act
    gamma: Tensor | None  # [C] fp32
    beta: Tensor | None  # [C] fp32
    statistics: Statistics  # one row per group of the product
    activation: str  # that this gradient is behind
    other: Output | None = None  # the gradient of its second output


class Product(NamedTuple):
    """What a product leaves behind beside its output."""

    tiles: Tiles | None = None  # where statistics were asked for
    sums: Sums | None = None  # where a norm was given
    # [splits, M, K] fp32 where they were asked for and the sum is split; y and a second output are unwritten
    partials: Tensor | None = None


def conv(
    sources: Sequence[Source],  # one or two, [N * H * W, C] each
    w: Tensor,  # kernel, channels-last in memory, dtype of the sources
    geometry: Geometry,
    size: Map,  # of the input
    y: Tensor,  # [N * h * w, K] dtype of the sources, row stride >= K, written
    *,
    bias: Tensor | None = None,  # [K] fp32
    activation: str = "none",
    second: Output | None = None,  # its activation of the rounded y, written too
    groups: int = 1,  # of the sources' scales and of the statistics; a divisor of the images
    statistics: bool = False,  # of y, per tile
    partials: bool = False,  # leave partial sums where the sum is split
    plan: ConvPlan | None = None,
    impl: str = "auto",
) -> Product:
    """y = activation(convolution(sources) + bias); fp32 accumulation, statistics of the rounded y."""
    height, width = geometry.output(size.height), geometry.output(size.width)
    return _product(
        sources, w, geometry, geometry.forward(), size, Map(size.images, height, width), y,
        bias, activation, second, groups, statistics, partials, None, plan, impl,
    )  # fmt: skip


def conv_dgrad(
    g: Tensor,  # [N * h * w, K] gradient of the convolution's output
    w: Tensor,  # kernel, channels-last in memory, dtype of g
    geometry: Geometry,
    size: Map,  # of the convolution's input
    dx: Tensor,  # [N * H * W, C] dtype of g, row stride >= C, written
    *,
    norm: Norm | None = None,  # the normalisation in front; its sums are taken
    groups: int = 1,
    partials: bool = False,
    plan: ConvPlan | None = None,
    impl: str = "auto",
) -> Product:
    """dx = the gradient of the convolution's input, all sources side by side; the sums are of the rounded dx."""
    height, width = geometry.output(size.height), geometry.output(size.width)
    return _product(
        [Source(g)], w, geometry, geometry.dgrad(), Map(size.images, height, width), size, dx,
        None, "none", None, groups, False, partials, norm, plan, impl,
    )  # fmt: skip


def problem_of(gather: Gather, size: Map, output: Map, groups: int, sources: Sequence[Source], outputs: int) -> Problem:
    """What a plan depends on."""
    inputs = tuple(source.rows.shape[1] for source in sources)
    plain = all(source.scale is None for source in sources)
    return Problem(gather, size, output, groups, inputs, outputs, plain)


def not_supported_reasons(
    sources: Sequence[Source],
    w: Tensor,
    geometry: Geometry,
    gather: Gather,
    size: Map,
    y: Tensor,
    groups: int,
    second: Output | None = None,
) -> list[str]:
    """Why the Triton kernel cannot take these arguments (shapes and dtypes only, no device is asked)."""
    reasons = geometry.not_supported_reasons()
    x = sources[0].rows
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"the input is {x.dtype}; allowed are float32, float16, bfloat16")
    if not 1 <= len(sources) <= 2:
        reasons.append(f"{len(sources)} sources; one or two are allowed")
    for source in sources:
        rows = source.rows
        if rows.ndim != 2 or len(rows) != size.rows or rows.stride(1) != 1 < rows.shape[1] or rows.dtype != x.dtype:
            reasons.append(f"a source is {tuple(rows.shape)} {rows.dtype}; {size.rows} rows like the first are needed")
        for vector in (source.scale, source.shift):
            if vector is not None and (vector.shape != (groups, rows.shape[1]) or not vector.is_contiguous()):
                reasons.append(f"a scale is {tuple(vector.shape)}; [{groups}, {rows.shape[1]}] contiguous needed")
    channels = sum(source.rows.shape[1] for source in sources), y.shape[1]
    if gather.channels(tuple(w.shape)) != channels or w.dtype != x.dtype:
        reasons.append(f"a kernel {tuple(w.shape)} {w.dtype} for {channels[0]} channels to {channels[1]} of {x.dtype}")
    if not w.is_contiguous(memory_format=torch.channels_last) and 1 not in w.shape:
        reasons.append(f"the kernel has strides {w.stride()}; channels-last is needed")
    if y.dtype != x.dtype or y.stride(1) != 1 < y.shape[1]:
        reasons.append(
            f"the output is {tuple(y.shape)} {y.dtype} with strides {y.stride()}; rows like the input needed"
        )
    if second is not None and (second.rows.shape, second.rows.dtype, second.rows.stride(1)) != (y.shape, y.dtype, 1):
        found = f"{tuple(second.rows.shape)} {second.rows.dtype} with strides {second.rows.stride()}"
        reasons.append(f"the second output is {found}; rows like the first are needed")
    if size.images % groups:
        reasons.append(f"{size.images} images in {groups} groups")
    return reasons


def _product(
    sources: Sequence[Source],
    w: Tensor,
    geometry: Geometry,
    gather: Gather,
    size: Map,
    output: Map,
    y: Tensor,
    bias: Tensor | None,
    activation: str,
    second: Output | None,
    groups: int,
    statistics: bool,
    partials: bool,
    norm: Norm | None,
    plan: ConvPlan | None,
    impl: str,
) -> Product:
    if len(y) != output.rows:
        raise ValueError(f"conv: the output has {len(y)} rows; {output} needs {output.rows}")
    reasons = not_supported_reasons(sources, w, geometry, gather, size, y, groups, second)
    if choose("conv", impl, y, reasons) == "triton":
        problem = problem_of(gather, size, output, groups, sources, y.shape[1])
        plan = plan or conv_plan(problem)
        return _conv_triton(problem, plan, sources, w, y, bias, activation, second, statistics, partials, norm)
    return _conv_reference(
        sources, w, geometry, gather, size, output, y, bias, activation, second, groups, statistics, norm
    )


def _conv_reference(
    sources: Sequence[Source],
    w: Tensor,
    geometry: Geometry,
    gather: Gather,
    size: Map,
    output: Map,
    y: Tensor,
    bias: Tensor | None,
    activation: str,
    second: Output | None,
    groups: int,
    statistics: bool,
    norm: Norm | None,
) -> Product:
    """torch's convolution between the pieces; the statistics of a group as one tile."""
    x = torch.cat([source.value() for source in sources], 1).view(*size, -1).permute(0, 3, 1, 2)
    forward = gather == geometry.forward()
    like = x if forward else x.new_empty(*output, y.shape[1]).permute(0, 3, 1, 2)  # for its shape and memory format
    stride, padding, transposed = [geometry.stride] * 2, [geometry.padding] * 2, geometry.transposed
    shape = stride, padding, [1, 1], transposed, [0, 0], 1
    if forward:
        found = torch.ops.aten.convolution(x, w, None, *shape)
    else:
        found = torch.ops.aten.convolution_backward(x, like, w, None, *shape, [True, False, False])[0]
    found = found.permute(0, 2, 3, 1).reshape(y.shape)
    if bias is not None or activation != "none":
        wide = found.to(torch.promote_types(y.dtype, torch.float32))
        found = ACTIVATIONS[activation].forward(wide if bias is None else wide + bias)
    y.copy_(found)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    if second is not None:
        second.rows.copy_(ACTIVATIONS[second.activation].forward(wide))
    wide = wide.view(groups, -1, y.shape[1])
    if statistics:
        mean = wide.mean(1, keepdim=True)
        return Product(tiles=Tiles(mean, (wide - mean).square().sum(1, keepdim=True), wide.shape[1]))
    return Product() if norm is None else Product(sums=_sums_reference(wide, norm))


def _sums_reference(
    dx: Tensor,  # [groups, rows, K] at least fp32
    norm: Norm,
) -> Sums:
    h = hidden(norm.x, norm.gamma, norm.beta, norm.statistics, 1, None)
    channels = h.shape[1]
    dz = dx[..., -channels:].reshape(h.shape).to(h.dtype) * ACTIVATIONS[norm.activation].derivative(h)
    if norm.other is not None:
        dz = dz + norm.other.rows.to(h.dtype) * ACTIVATIONS[norm.other.activation].derivative(h)
    dz = dz.view(len(dx), -1, channels)
    xhat = hidden(norm.x, None, None, norm.statistics, 1, None).view(dz.shape)
    return Sums(dz.sum(1, keepdim=True), (dz * xhat).sum(1, keepdim=True))


def _conv_triton(
    problem: Problem,
    plan: ConvPlan,
    sources: Sequence[Source],
    w: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: str,
    second: Output | None,
    statistics: bool,
    partials: bool,
    norm: Norm | None,
) -> Product:
    gather, size, output = problem.gather, problem.size, problem.output
    a, b = sources[0], sources[1] if len(sources) == 2 else None
    channels, parts = y.shape[1], gather.parities**2
    tiles, columns = -(-problem.rows // plan.block_m), -(-channels // plan.block_n)
    split = plan.splits > 1
    fused = bias is not None or activation != "none" or second is not None or statistics or norm is not None
    if split and fused and not partials:
        plan = plan._replace(tap_splits=1, channel_splits=1)  # what is fused needs whole sums
        split = False
    into = y.new_empty(plan.splits, len(y), channels, dtype=torch.float32) if split else y
    found = None
    if (statistics or norm is not None) and not split:
        width = channels if norm is None else norm.x.shape[1]
        found = y.new_empty(2, problem.groups, parts * tiles, width, dtype=torch.float32)
    height, width = problem.quotients
    chunks = [-(-c // (plan.block_k * plan.channel_splits)) * plan.block_k for c in problem.inputs]
    aligned = all(c % plan.block_k == 0 for c in problem.inputs)
    other = None if norm is None else norm.other
    read, written = _bytes(problem, sources, w, y, plan, norm)
    written += 0 if found is None else 4 * found.numel()
    second = None if split else second  # of partial sums, what adds them up makes it
    written += 0 if second is None else y.element_size() * second.rows.numel()
    launch(
        _conv_kernel,
        (problem.groups * tiles * columns * parts, plan.splits),
        *(a.rows, None if b is None else b.rows, w, into, None if second is None else second.rows),
        *(a.scale, a.shift),
        *((None, None) if b is None else (b.scale, b.shift)),
        *(bias, *((None, None) if found is None else found.unbind())),
        *((None,) * 5 if norm is None else (norm.x, norm.gamma, norm.beta, *norm.statistics)),
        None if other is None else other.rows,
        *(size.height, size.width, output.height, output.width, height, width, reciprocal(height), reciprocal(width)),
        *(problem.rows, tiles, reciprocal(tiles), reciprocal(columns), reciprocal(problem.inputs[0])),
        *(problem.inputs[0], problem.inputs[1] if b is not None else 0, channels),
        *(a.rows.stride(0), 0 if b is None else b.rows.stride(0)),
        *(channels if split else y.stride(0), 0 if second is None else second.rows.stride(0)),
        0 if other is None else other.rows.stride(0),
        *gather.strides(tuple(w.shape)),
        *(-(-problem.useful // plan.tap_splits), chunks[0], chunks[1] if b is not None else 0),
        *(plan.channel_splits, len(y), 0 if norm is None else norm.x.shape[1]),
        read=read,
        written=written,
        KERNEL=gather.kernel,
        TAPS=gather.taps,
        STEP=gather.step,
        FIRST=gather.first,
        K0=gather.k0,
        KSTEP=gather.kstep,
        PARITIES=gather.parities,
        ACT_A=ACTIVATIONS[a.activation].id,
        ACT_B=0 if b is None else ACTIVATIONS[b.activation].id,
        ACT=ACTIVATIONS[activation].id if norm is None else ACTIVATIONS[norm.activation].id,
        ACT_OTHER=0 if other is None else ACTIVATIONS[other.activation].id,
        ACT_2=0 if second is None else ACTIVATIONS[second.activation].id,
        FLAT=problem.flat,
        FLATTEN=bool(plan.flatten),
        SPLIT=split,
        WHOLE_K=aligned and not problem.flat,
        WHOLE_N=channels % plan.block_n == 0,
        UPCAST=interpreted,
        BM=plan.block_m,
        BN=plan.block_n,
        BK=plan.block_k,
        num_warps=plan.warps,
        num_stages=stages_for(plan.stages, w.element_size()),
    )
    if split:
        if partials:
            return Product(partials=into)
        sum_splits(into, y, impl="triton")
    elif statistics:
        assert found is not None
        return Product(tiles=Tiles(found[0], found[1], plan.block_m, parts))
    elif norm is not None:
        assert found is not None
        return Product(sums=Sums(found[0], found[1]))
    return Product()


def _bytes(
    problem: Problem, sources: Sequence[Source], w: Tensor, y: Tensor, plan: ConvPlan, norm: Norm | None
) -> tuple[int, int]:
    """(read, written): inputs, useful taps and outputs once; what a cache gives again is not counted."""
    half, (d0, d1, *_) = y.element_size(), w.shape
    read = half * (problem.size.rows * sum(problem.inputs) + problem.useful_of_kernel * d0 * d1)
    read += sum(2 * 4 * source.scale.numel() for source in sources if source.scale is not None)
    if norm is not None:
        read += half * norm.x.numel() * (1 if norm.other is None else 2)
    return read, 4 * plan.splits * y.numel() if plan.splits > 1 else half * y.numel()

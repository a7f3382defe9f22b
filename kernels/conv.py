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

from ._triton import interpreted, jit, tl
from .activations import ACTIVATIONS, activate, times_derivative
from .conv_plan import DEEP, FLAT, LARGE, SMALL, THIN, ConvPlan, Problem, Shape, conv_plan
from .dispatch import CompileCase, choose, launch
from .geometry import Gather, Geometry, Map, Source, dot
from .norm_act_backward import hidden
from .philox import Noise, dropout_mask, dropout_scale
from .rows import Output, Statistics, Sums, Tiles
from .split import sum_splits


class Norm(NamedTuple):
    """The normalisation that a gradient arrives at: the last C channels of what dgrad writes are its output's."""

    x: Tensor  # [M, C] as given to norm_act
    gamma: Tensor | None  # [C] fp32
    beta: Tensor | None  # [C] fp32
    statistics: Statistics  # one row per group of the product
    activation: str  # that this gradient is behind
    other: Output | None = None  # the gradient of its second output
    noise: Noise | None = None


class Product(NamedTuple):
    """What a product leaves behind beside its output."""

    tiles: Tiles | None = None  # where statistics were asked for
    sums: Sums | None = None  # where a norm was given
    partials: Tensor | None = None  # [splits, M, K] fp32 where they were asked for and the sum is split; y is unwritten


def conv(
    sources: Sequence[Source],  # one or two, [N * H * W, C] each
    w: Tensor,  # kernel, channels-last in memory, dtype of the sources
    geometry: Geometry,
    size: Map,  # of the input
    y: Tensor,  # [N * h * w, K] dtype of the sources, row stride >= K, written
    *,
    bias: Tensor | None = None,  # [K] fp32
    activation: str = "none",
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
        bias, activation, groups, statistics, partials, None, plan, impl,
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
        None, "none", groups, False, partials, norm, plan, impl,
    )  # fmt: skip


def problem_of(gather: Gather, size: Map, output: Map, groups: int, sources: Sequence[Source], outputs: int) -> Problem:
    """What a plan depends on."""
    inputs = tuple(source.rows.shape[1] for source in sources)
    plain = all(source.scale is None for source in sources)
    return Problem(gather, size, output, groups, inputs, outputs, plain)


def not_supported_reasons(
    sources: Sequence[Source], w: Tensor, geometry: Geometry, gather: Gather, size: Map, y: Tensor, groups: int
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
    groups: int,
    statistics: bool,
    partials: bool,
    norm: Norm | None,
    plan: ConvPlan | None,
    impl: str,
) -> Product:
    if len(y) != output.rows:
        raise ValueError(f"conv: the output has {len(y)} rows; {output} needs {output.rows}")
    reasons = not_supported_reasons(sources, w, geometry, gather, size, y, groups)
    if choose("conv", impl, y, reasons) == "triton":
        problem = problem_of(gather, size, output, groups, sources, y.shape[1])
        plan = plan or conv_plan(problem)
        return _conv_triton(problem, plan, sources, w, y, bias, activation, statistics, partials, norm)
    return _conv_reference(sources, w, geometry, gather, size, output, y, bias, activation, groups, statistics, norm)


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
    groups: int,
    statistics: bool,
    norm: Norm | None,
) -> Product:
    """torch's convolution between the pieces; the statistics of a group as one tile."""
    x = torch.cat([source.value() for source in sources], 1).view(*size, -1).permute(0, 3, 1, 2)
    forward = gather == geometry.forward()
    like = x if forward else x.new_empty(()).expand(output.images, y.shape[1], output.height, output.width)
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
    wide = y.to(torch.promote_types(y.dtype, torch.float32)).view(groups, -1, y.shape[1])
    if statistics:
        mean = wide.mean(1, keepdim=True)
        return Product(tiles=Tiles(mean, (wide - mean).square().sum(1, keepdim=True), wide.shape[1]))
    return Product() if norm is None else Product(sums=_sums_reference(wide, norm, size.images))


def _sums_reference(
    dx: Tensor,  # [groups, rows, K] at least fp32
    norm: Norm,
    images: int,
) -> Sums:
    h = hidden(norm.x, norm.gamma, norm.beta, norm.statistics, images, norm.noise)
    channels = h.shape[1]
    dz = dx[..., -channels:].reshape(h.shape).to(h.dtype) * ACTIVATIONS[norm.activation].derivative(h)
    if norm.other is not None:
        dz = dz + norm.other.rows.to(h.dtype) * ACTIVATIONS[norm.other.activation].derivative(h)
    if norm.noise is not None:
        dz = dz * 2 * dropout_mask(norm.noise, images, len(h) // images, channels)
    dz = dz.view(len(dx), -1, channels)
    xhat = hidden(norm.x, None, None, norm.statistics, images, None).view(dz.shape)
    return Sums(dz.sum(1, keepdim=True), (dz * xhat).sum(1, keepdim=True))


def _conv_triton(
    problem: Problem,
    plan: ConvPlan,
    sources: Sequence[Source],
    w: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: str,
    statistics: bool,
    partials: bool,
    norm: Norm | None,
) -> Product:
    gather, size, output = problem.gather, problem.size, problem.output
    first, second = sources[0], sources[1] if len(sources) == 2 else None
    channels, parts = y.shape[1], gather.parities**2
    tiles = -(-problem.rows // plan.block_m)
    split = plan.splits > 1
    if split and (bias is not None or activation != "none" or statistics or norm is not None) and not partials:
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
    noise = None if norm is None else norm.noise
    read, written = _bytes(problem, sources, w, y, plan, norm)
    written += 0 if found is None else 4 * found.numel()
    launch(
        _conv_kernel,
        (problem.groups * tiles * -(-channels // plan.block_n), parts * plan.splits),
        *(first.rows, None if second is None else second.rows, w, into),
        *(first.scale, first.shift),
        *((None, None) if second is None else (second.scale, second.shift)),
        *(bias, *((None, None) if found is None else found.unbind())),
        *((None,) * 5 if norm is None else (norm.x, norm.gamma, norm.beta, *norm.statistics)),
        None if other is None else other.rows,
        *((None, 0) if noise is None else noise[:2]),
        *(size.height, size.width, output.height, output.width, height, width),
        *(problem.rows, tiles, problem.inputs[0], problem.inputs[1] if second is not None else 0, channels),
        *(first.rows.stride(0), 0 if second is None else second.rows.stride(0)),
        *(channels if split else y.stride(0), 0 if other is None else other.rows.stride(0)),
        *gather.strides(tuple(w.shape)),
        *(-(-problem.useful // plan.tap_splits), chunks[0], chunks[1] if second is not None else 0),
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
        ACT_A=ACTIVATIONS[first.activation].id,
        ACT_B=0 if second is None else ACTIVATIONS[second.activation].id,
        ACT=ACTIVATIONS[activation].id if norm is None else ACTIVATIONS[norm.activation].id,
        ACT_OTHER=0 if other is None else ACTIVATIONS[other.activation].id,
        PER_IMAGE=noise is None or noise.per_image,
        FLAT=problem.flat,
        SPLIT=split,
        WHOLE_K=aligned and not problem.flat,
        WHOLE_N=channels % plan.block_n == 0,
        UPCAST=interpreted,
        BM=plan.block_m,
        BN=plan.block_n,
        BK=plan.block_k,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    if split:
        if partials:
            return Product(partials=into)
        sum_splits(into, y, impl="triton")
    elif statistics:
        assert found is not None
        return Product(tiles=Tiles(*found.unbind(), plan.block_m, parts))
    elif norm is not None:
        assert found is not None
        return Product(sums=Sums(*found.unbind()))
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


@jit
def _conv_kernel(
    xa,  # [N * H * W, CA] rows with stride lda
    xb,  # [N * H * W, CB] rows with stride ldb, or None
    w,  # kernel
    y,  # [N * OH * OW, CO] rows with stride ldy, written; partial sums [splits, N * OH * OW, CO] fp32 where SPLIT
    scale_a,  # [groups, CA] fp32 or None
    shift_a,
    scale_b,  # [groups, CB] fp32 or None
    shift_b,
    bias,  # [CO] fp32 or None
    tile_1,  # [groups, PARITIES**2 * tiles, CO] fp32 or None, written: mean, or sum of dz
    tile_2,  # [groups, PARITIES**2 * tiles, CO] fp32, written: squared distances, or sum of dz * xhat
    nx,  # [N * OH * OW, NC] raw rows of the normalisation in front, or None
    gamma,  # [NC] fp32 or None
    beta,  # [NC] fp32 or None
    mean,  # [groups, NC] fp32
    rstd,  # [groups, NC] fp32
    other,  # [N * OH * OW, NC] gradient of its second output with row stride ldo, or None
    counters,  # [3] int64 or None: no dropout
    block,
    H,
    W,
    OH,
    OW,
    QH,
    QW,
    rows,  # of one parity of one group
    tiles,  # of these
    CA,
    CB,
    CO,
    lda,
    ldb,
    ldy,
    ldo,
    stride_tap,
    stride_k,
    stride_n,
    tap_share,  # useful taps of a split
    chunk_a,  # channels of a split, a multiple of BK
    chunk_b,
    channel_splits,
    M,  # N * OH * OW
    NC,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
    K0: tl.constexpr,
    KSTEP: tl.constexpr,
    PARITIES: tl.constexpr,
    ACT_A: tl.constexpr,
    ACT_B: tl.constexpr,
    ACT: tl.constexpr,  # of the output; with nx, of the normalisation's output that is differentiated
    ACT_OTHER: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    FLAT: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    columns = tl.cdiv(CO, BN)
    col = (tl.program_id(0) % columns) * BN + tl.arange(0, BN)
    tile = tl.program_id(0) // columns
    group, tile = tile // tiles, tile % tiles
    part, split = tl.program_id(1) % (PARITIES * PARITIES), tl.program_id(1) // (PARITIES * PARITIES)
    ph, pw = part // PARITIES, part % PARITIES

    row = tile * BM + tl.arange(0, BM)
    inside = row < rows
    q = group * rows + row
    qw, qh, image = q % QW, (q // QW) % QH, (q // (QW * QH)).to(tl.int64)
    fh, fw = qh * STEP + (FIRST + ph), qw * STEP + (FIRST + pw)
    kh, kw = K0 - ph, K0 - pw

    acc = tl.zeros((BM, BN), tl.float32)
    if FLAT:
        base = xa + image * (H * W) * lda
        for first in range(0, TAPS * TAPS * CA, BK):
            k = first + tl.arange(0, BK)
            th, tw, c = k // CA // TAPS, k // CA % TAPS, k % CA
            ih, iw = fh[:, None] + th[None, :], fw[:, None] + tw[None, :]
            ok = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W) & inside[:, None] & (k < TAPS * TAPS * CA)[None, :]
            a = tl.load(base[:, None] + (ih * W + iw) * lda + c[None, :], mask=ok, other=0.0)
            if ACT_A != 0:
                a = activate(a.to(tl.float32), ACT_A).to(a.dtype)
            at = ((kh + KSTEP * th) * KERNEL + kw + KSTEP * tw) * stride_tap + c * stride_k
            ok = (k < TAPS * TAPS * CA)[:, None] & (col < CO)[None, :]
            b = tl.load(w + at[:, None] + col[None, :] * stride_n, mask=ok, other=0.0)
            acc = dot(a, b, acc, UPCAST)
    else:
        low_h, low_w = _lowest_tap(FIRST + ph, QH, STEP), _lowest_tap(FIRST + pw, QW, STEP)
        high_h, high_w = tl.minimum(TAPS, H - (FIRST + ph)), tl.minimum(TAPS, W - (FIRST + pw))
        wide = tl.maximum(high_w - low_w, 0)
        useful = tl.maximum(high_h - low_h, 0) * wide
        tap_split, channel_split = split // channel_splits, split % channel_splits
        for tap in range(tap_split * tap_share, tl.minimum((tap_split + 1) * tap_share, useful)):
            th, tw = low_h + tap // wide, low_w + tap % wide
            ih, iw = fh + th, fw + tw
            ok = inside & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            pixel = image * (H * W) + ih * W + iw
            wt = w + ((kh + KSTEP * th) * KERNEL + kw + KSTEP * tw) * stride_tap
            acc = _add_source(
                acc, xa + pixel * lda, ok, wt, scale_a, shift_a, group, CA, channel_split * chunk_a, chunk_a,
                col, CO, stride_k, stride_n, ACT_A, WHOLE_K, WHOLE_N, UPCAST, BK,
            )  # fmt: skip
            if xb is not None:
                acc = _add_source(
                    acc, xb + pixel * ldb, ok, wt + CA * stride_k, scale_b, shift_b, group, CB,
                    channel_split * chunk_b, chunk_b, col, CO, stride_k, stride_n, ACT_B, WHOLE_K, WHOLE_N, UPCAST, BK,
                )  # fmt: skip

    if PARITIES == 1:
        out = q.to(tl.int64)
    else:
        oh, ow = qh * PARITIES + ph, qw * PARITIES + pw
        inside = inside & (oh < OH) & (ow < OW)
        out = (image * OH + oh) * OW + ow
    mask = inside[:, None] & (col < CO)[None, :]
    if SPLIT:
        into = y + split.to(tl.int64) * M * CO
        tl.store(into + out[:, None] * CO + col[None, :], acc, mask=mask)
    else:
        if bias is not None:
            acc += tl.load(bias + col, mask=col < CO, other=0.0).to(tl.float32)[None, :]
        if nx is None:
            acc = activate(acc, ACT)
        rounded = acc.to(y.dtype.element_ty)
        tl.store(y + out[:, None] * ldy + col[None, :], rounded, mask=mask)
        at = group * (PARITIES * PARITIES) * tiles + part * tiles + tile
        if nx is not None:
            c = col - (CO - NC)
            mask = mask & (c >= 0)[None, :]
            layer = nx, gamma, beta, mean, rstd, other, counters, block, NC, ldo, OH * OW, ACT, ACT_OTHER, PER_IMAGE
            dz, dzx = _dz(layer, rounded.to(tl.float32), group, out, c, mask)
            tl.store(tile_1 + at * NC + c, tl.sum(dz, 0), mask=(c >= 0) & (col < CO))
            tl.store(tile_2 + at * NC + c, tl.sum(dzx, 0), mask=(c >= 0) & (col < CO))
        elif tile_1 is not None:
            v = rounded.to(tl.float32)
            center = tl.sum(tl.where(mask, v, 0.0), 0) / tl.minimum(rows - tile * BM, BM).to(tl.float32)
            apart = tl.where(mask, v - center[None, :], 0.0)
            tl.store(tile_1 + at * CO + col, center, mask=col < CO)
            tl.store(tile_2 + at * CO + col, tl.sum(apart * apart, 0), mask=col < CO)


@jit
def _lowest_tap(first, outputs, STEP: tl.constexpr):
    """The first tap that meets the input for some output."""
    return tl.maximum(0, -(first + (outputs - 1) * STEP))


@jit
def _add_source(
    acc,  # [BM, BN] fp32
    x,  # [BM] pointers to the pixels that a tap meets
    ok,  # [BM] whether it meets one
    w,  # the tap's kernel [C, CO]
    scale,  # [groups, C] fp32 or None
    shift,
    group,
    C,
    first,  # channels first to first + count are summed over
    count,
    col,  # [BN]
    CO,
    stride_k,
    stride_n,
    ACT: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    UPCAST: tl.constexpr,
    BK: tl.constexpr,
):
    """acc plus one tap of one source."""
    last = tl.minimum(first + count, C)
    for start in range(first, last, BK):
        k = start + tl.arange(0, BK)
        if WHOLE_K:
            a = tl.load(x[:, None] + k[None, :], mask=ok[:, None], other=0.0)
        else:
            a = tl.load(x[:, None] + k[None, :], mask=ok[:, None] & (k < last)[None, :], other=0.0)
        if scale is not None:
            h = a.to(tl.float32) * tl.load(scale + group * C + k, mask=k < last, other=0.0)[None, :]
            h = activate(h + tl.load(shift + group * C + k, mask=k < last, other=0.0)[None, :], ACT)
            a = _padded(h, ok).to(a.dtype)
        elif ACT != 0:
            a = activate(a.to(tl.float32), ACT).to(a.dtype)
        at = w + k[:, None] * stride_k + col[None, :] * stride_n
        if WHOLE_K and WHOLE_N:
            b = tl.load(at)
        else:
            b = tl.load(at, mask=(k < last)[:, None] & (col < CO)[None, :], other=0.0)
        acc = dot(a, b, acc, UPCAST)
    return acc


@jit
def _padded(h, ok):
    """Padding is zero after the activation."""
    return tl.where(ok[:, None], h, 0.0)


@jit
def _dz(layer, g, group, row, c, mask):
    """dz and dz * xhat [BM, BN], 0 outside the mask; g: gradient of the activated output."""
    nx, gamma, beta, mean, rstd, other, counters, block, NC, ldo, positions, ACT, ACT_OTHER, PER_IMAGE = layer
    inside = (c >= 0) & (c < NC)
    x = tl.load(nx + row[:, None] * NC + c[None, :], mask=mask, other=0.0).to(tl.float32)
    xhat = x - tl.load(mean + group * NC + c, mask=inside, other=0.0)[None, :]
    xhat = xhat * tl.load(rstd + group * NC + c, mask=inside, other=0.0)[None, :]
    h = xhat
    if gamma is not None:
        h = h * tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if beta is not None:
        h = h + tl.load(beta + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if counters is not None:
        drop = dropout_scale(counters, block, row, c, positions, NC, PER_IMAGE)
        h = h * drop
    dz = times_derivative(g, h, ACT)
    if other is not None:
        more = tl.load(other + row[:, None] * ldo + c[None, :], mask=mask, other=0.0).to(tl.float32)
        dz += times_derivative(more, h, ACT_OTHER)
    if counters is not None:
        dz = dz * drop
    dz = tl.where(mask, dz, 0.0)
    return dz, dz * xhat


def compile_cases() -> list[CompileCase]:
    """Every block shape that a plan may have, in the forms that the networks need."""
    halving, doubling = Geometry(4, 2, 1).forward(), Geometry(4, 2, 1).dgrad()
    flipped = Geometry(4, 1, 1).dgrad()
    up = {"stride_n": "i32:16", "stride_k": 1}  # a convolution's kernel; its dgrad and a transposed one's: the reverse
    back = {"stride_n": 1, "stride_k": "i32:16"}
    affine, two = ("scale_a", "shift_a"), ("xb", "ldb", "CB", "chunk_b")
    both = (*two, *affine, "scale_b", "shift_b")
    norm = ("nx", "mean", "rstd", "gamma", "beta", "tile_1", "tile_2", "NC")
    stats = ("tile_1", "tile_2")
    thin = {"CA": "i32", "lda": "i32", "stride_k": 1, "stride_n": "i32", "stride_tap": "i32"}
    narrow = {"CO": "i32", "ldy": "i32"}
    cases = [_compile_case(shape, halving, (), thin, FLAT=True, ACT=1) for shape in FLAT]
    cases += [_compile_case(shape, doubling, two, back | narrow | {"stride_n": 1}, ACT_A=2, ACT=3) for shape in THIN]
    for shape in (*DEEP, *SMALL):
        cases.append(_compile_case(shape, halving, (), up, SPLIT=True))
        cases.append(_compile_case(shape, doubling, two, back, SPLIT=True, ACT_A=2))
    for shape in (*LARGE, SMALL[1]):
        cases.append(_compile_case(shape, halving, (*affine, *stats), up, ACT_A=1))
        cases.append(_compile_case(shape, doubling, (*both, *stats), back, ACT_A=2, ACT_B=2))
        cases.append(_compile_case(shape, halving, (*norm, "other"), back, ACT=2, ACT_OTHER=1))
        cases.append(_compile_case(shape, doubling, (*norm, "other", "ldo"), back, ACT=1, ACT_OTHER=2))
        cases.append(_compile_case(shape, flipped, norm, back, ACT=1))
    return cases


def _compile_case(
    shape: Shape, gather: Gather, present: Sequence[str], types: dict[str, str | int], **constants: int
) -> CompileCase:
    """One block shape and form; `present`: the optional arguments that are there."""
    bm, bn, bk, warps, stages = shape
    optional = ("xb", "scale_a", "shift_a", "scale_b", "shift_b", "bias", "tile_1", "tile_2", "nx", "gamma", "beta")
    optional += ("mean", "rstd", "other", "counters")
    numbers = {"CB", "ldb", "chunk_b", "NC", "ldo", "block"}
    flags = {"ACT_A": 0, "ACT_B": 0, "ACT": 0, "ACT_OTHER": 0, "PER_IMAGE": True, "FLAT": False, "SPLIT": False}
    whole = not constants.get("FLAT", False)
    constexprs = dict.fromkeys((name for name in optional if name not in present), None)
    constexprs |= dict.fromkeys((name for name in numbers if name not in present and name != "block"), 0)
    constexprs |= flags | constants | {"WHOLE_K": whole, "WHOLE_N": types.get("CO") != "i32", "UPCAST": False}
    constexprs |= {"BM": bm, "BN": bn, "BK": bk, **{k.upper(): v for k, v in gather._asdict().items()}}
    constexprs = {name: constexprs[name] for name in _conv_kernel.arg_names if name in constexprs}
    signature = {}
    for name in _conv_kernel.arg_names:
        given = types.get(name)
        if isinstance(given, int):
            constexprs[name] = given
        elif name not in constexprs:
            signature[name] = given or _type(name, constants.get("SPLIT", False))
    return CompileCase(_conv_kernel, signature, constexprs, warps, stages)


def _type(name: str, split: int) -> str:
    if name in ("xa", "xb", "w", "nx", "other"):
        return "*bf16"
    if name == "y":
        return "*fp32" if split else "*bf16"
    if name in (
        "scale_a",
        "shift_a",
        "scale_b",
        "shift_b",
        "bias",
        "tile_1",
        "tile_2",
        "gamma",
        "beta",
        "mean",
        "rstd",
    ):
        return "*fp32"
    channels = ("CA", "CB", "CO", "NC", "lda", "ldb", "ldy", "ldo", "chunk_a", "chunk_b")
    return "i32:16" if name in channels or name.startswith("stride") else "i32"

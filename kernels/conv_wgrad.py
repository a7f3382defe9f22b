"""The gradient of a convolution's kernel, written where the optimiser reads it (the sums: wgrad_plan.py).

The producer's scale, shift and activation are computed while loading, on whichever map the layer's input is. A sum over
many rows is split; the parts are added in a fixed order by one more launch. A tap that meets no pixel reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._triton import interpreted, jit, tl
from .activations import ACTIVATIONS
from .conv_plan import stages_for
from .dispatch import CompileCase, choose, launch, processors
from .division import over, reciprocal, within
from .geometry import Geometry, Map, Source, dot
from .operands import operand
from .split import sum_splits
from .wgrad_plan import DEEP, FLAT, LARGE, MIDDLE, Roles, Shape, WgradPlan, roles_of, wgrad_plan


def conv_wgrad(
    sources: Sequence[Source],  # one or two: the layer's input [N * H * W, C]; two for a transposed one only
    g: Tensor,  # [N * h * w, K] gradient of its raw output, contiguous, dtype of the sources
    dw: Tensor,  # kernel gradient [d0, d1, k, k], dense and channels-last in memory, any float dtype, written
    geometry: Geometry,
    size: Map,  # of the input
    *,
    accumulate: bool = False,  # add to dw
    plan: WgradPlan | None = None,
    impl: str = "auto",
) -> None:
    """dw = the gradient of the kernel; fp32 accumulation over rows in a fixed order."""
    reasons = not_supported_reasons(sources, g, dw, geometry, size)
    if choose("conv", impl, g, reasons) == "triton":
        plan = plan or wgrad_plan(geometry, size, tuple(dw.shape), processors(g.device))
        _conv_wgrad_triton(sources, g, dw, roles_of(geometry, size, tuple(dw.shape)), accumulate, plan)
        return
    _conv_wgrad_reference(sources, g, dw, geometry, size, accumulate)


def not_supported_reasons(sources: Sequence[Source], g: Tensor, dw: Tensor, geometry: Geometry, size: Map) -> list[str]:
    """Why the Triton kernel cannot take these arguments (shapes and dtypes only, no device is asked)."""
    reasons = geometry.not_supported_reasons()
    if not 1 <= len(sources) <= (2 if geometry.transposed else 1):
        reasons.append(f"{len(sources)} sources; one is allowed, or two of a transposed convolution")
    if g.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"the gradient is {g.dtype}; allowed are float32, float16, bfloat16")
    channels, groups = 0, {len(source.scale) for source in sources if source.scale is not None}
    for source in sources:
        rows = source.rows
        channels += rows.shape[1]
        if len(rows) != size.rows or rows.stride(1) != 1 < rows.shape[1] or rows.dtype != g.dtype:
            reasons.append(f"a source is {tuple(rows.shape)} {rows.dtype}; {size.rows} rows of {g.dtype} are needed")
        for v in (source.scale, source.shift):
            if v is not None and (v.shape[1:] != rows.shape[1:] or not v.is_contiguous() or v.dtype != torch.float32):
                reasons.append(
                    f"a scale is {tuple(v.shape)} {v.dtype}; [groups, {rows.shape[1]}] contiguous fp32 needed"
                )
    if len(groups) > 1 or any(size.images % count for count in groups):
        reasons.append(f"scales of {sorted(groups)} groups for {size.images} images; one divisor of them is needed")
    if tuple(dw.shape[:2]) != ((channels, g.shape[1]) if geometry.transposed else (g.shape[1], channels)):
        reasons.append(f"a kernel gradient {tuple(dw.shape)} for {channels} channels to {g.shape[1]}")
    if tuple(dw.shape[2:]) != (geometry.kernel, geometry.kernel) or not dw.permute(0, 2, 3, 1).is_contiguous():
        reasons.append(
            f"a kernel gradient {tuple(dw.shape)} with strides {dw.stride()}; "
            f"{geometry.kernel}x{geometry.kernel} dense channels-last is needed"
        )
    output = size.images * geometry.output(size.height) * geometry.output(size.width)
    if g.shape[0] != output or not g.is_contiguous():
        reasons.append(f"the gradient is {tuple(g.shape)} with strides {g.stride()}; {output} contiguous rows needed")
    return reasons


def _conv_wgrad_reference(
    sources: Sequence[Source], g: Tensor, dw: Tensor, geometry: Geometry, size: Map, accumulate: bool
) -> None:
    x = torch.cat([source.value() for source in sources], 1).view(*size, -1).permute(0, 3, 1, 2)
    height, width = geometry.output(size.height), geometry.output(size.width)
    dy = g.view(size.images, height, width, -1).permute(0, 3, 1, 2)
    like = x.new_empty(()).expand(dw.shape)
    options = [geometry.stride] * 2, [geometry.padding] * 2, [1, 1], geometry.transposed, [0, 0], 1
    found = torch.ops.aten.convolution_backward(dy, x, like, None, *options, [False, True, False])[1]
    dw.copy_(dw + found if accumulate else found)


def _conv_wgrad_triton(
    sources: Sequence[Source], g: Tensor, dw: Tensor, roles: Roles, accumulate: bool, plan: WgradPlan
) -> None:
    split, flat, n = plan.splits > 1, plan.block_q > roles.q, dw.numel()
    whole = dw.permute(0, 2, 3, 1).view(1, n)  # the kernel's memory
    into = whole.new_empty(plan.splits, 1, n, dtype=torch.float32) if split else whole
    a, b = sources[0], sources[1] if len(sources) == 2 else None
    # no block straddles two sources: each has its own, and the programs of a block know one
    inputs = [source.rows.shape[1] for source in sources] if roles.input_plain else [roles.p]
    blocks = [-(-channels // plan.block_p) for channels in inputs]
    scales = [source.scale for source in sources if source.scale is not None]
    groups = len(scales[0]) if scales else 1
    plain, gathered = roles.plain, roles.gathered
    share = -(-plain.rows // (plan.splits * plan.block_rows)) * plan.block_rows
    read = g.element_size() * roles.operands + sum(8 * scale.numel() for scale in scales)
    launch(
        _conv_wgrad_kernel,
        (sum(blocks) * plan.columns(roles), plan.splits),
        *(a.rows, None if b is None else b.rows, g, into),
        *(a.scale, a.shift, *((None, None) if b is None else (b.scale, b.shift))),
        *(plain.rows, plain.height, plain.width, gathered.height, gathered.width),
        *(inputs[0], 0 if b is None else inputs[1], roles.q),
        *(a.rows.stride(0), 0 if b is None else b.rows.stride(0), g.shape[1]),
        *(*roles.strides, n, share, plain.rows // groups, reciprocal(plain.height), reciprocal(plain.width)),
        read=read + (0 if split or not accumulate else n * dw.element_size()),
        written=into.numel() * into.element_size(),
        INPUT_PLAIN=roles.input_plain,
        SIDE=roles.side,
        STRIDE=roles.stride,
        PADDING=roles.padding,
        FLIPPED=roles.flipped,
        ACT_A=ACTIVATIONS[a.activation].id,
        ACT_B=0 if b is None else ACTIVATIONS[b.activation].id,
        FLAT=flat,
        FEW=roles.few,
        WHOLE=all(channels % plan.block_p == 0 for channels in inputs)
        and (roles.taps * roles.q if flat else roles.q) % plan.block_q == 0,
        ACCUMULATE=accumulate and not split,
        UPCAST=interpreted,
        BP=plan.block_p,
        BQ=plan.block_q,
        BR=plan.block_rows,
        num_warps=plan.warps,
        num_stages=stages_for(plan.stages, g.element_size()),
    )
    if split:
        sum_splits(into, whole, accumulate=accumulate, impl="triton")


@jit
def _conv_wgrad_kernel(
    xa,  # the layer's input, rows with stride lda
    xb,  # more channels of it, rows with stride ldb, or None
    g,  # gradient of its output, rows with stride ldg
    dw,  # [n], written; partial sums [splits, n] fp32
    scale_a,  # [groups, channels of xa] fp32 or None
    shift_a,
    scale_b,  # [groups, channels of xb] fp32 or None
    shift_b,
    M,  # rows of the plain map, images of PH * PW
    PH,
    PW,
    H,  # of the gathered map
    W,
    PA,  # channels of the plain map; of xa, where xb is there
    PB,  # of xb, then
    Q,  # channels of the gathered map
    lda,
    ldb,
    ldg,
    stride_p,
    stride_tap,
    stride_q,
    n,
    share,  # rows of a split, a multiple of BR
    group_rows,  # rows of the plain map whose images share a scale
    by_PH,  # reciprocals of PH and PW
    by_PW,
    INPUT_PLAIN: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLIPPED: tl.constexpr,
    ACT_A: tl.constexpr,
    ACT_B: tl.constexpr,
    FLAT: tl.constexpr,
    FEW: tl.constexpr,
    WHOLE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    UPCAST: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    TAPS: tl.constexpr = SIDE * SIDE
    split = tl.program_id(1)
    start = split * share
    end = tl.minimum(start + share, M)
    blocks = tl.cdiv(TAPS * Q, BQ) if FLAT else TAPS * tl.cdiv(Q, BQ)
    block, column = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if FLAT:
        column = column * BQ + tl.arange(0, BQ)
        tap, q = column // Q, column % Q
        th, tw, here = tap // SIDE, tap % SIDE, tap < TAPS
    else:
        tap = column % TAPS
        q = (column // TAPS) * BQ + tl.arange(0, BQ)
        th, tw, here = tap // SIDE, tap % SIDE, q < Q
        if not _meets(th, PH, H, STRIDE, PADDING) or not _meets(tw, PW, W, STRIDE, PADDING):
            end = start

    p = block * BP + tl.arange(0, BP)
    P = PA
    rows = start, end, group_rows, PH, PW, H, W, by_PH, by_PW
    columns = q, th, tw, here
    if not INPUT_PLAIN:
        acc = _sum(
            g, p, PA, ldg, xa, Q, lda, scale_a, shift_a, rows, columns,
            False, STRIDE, PADDING, ACT_A, FLAT, FEW, WHOLE, UPCAST, BP, BQ, BR,
        )  # fmt: skip
    elif xb is None or block < tl.cdiv(PA, BP):
        acc = _sum(
            xa, p, PA, lda, g, Q, ldg, scale_a, shift_a, rows, columns,
            True, STRIDE, PADDING, ACT_A, FLAT, FEW, WHOLE, UPCAST, BP, BQ, BR,
        )  # fmt: skip
    else:
        dw += PA * stride_p
        p -= tl.cdiv(PA, BP) * BP
        P = PB
        acc = _sum(
            xb, p, PB, ldb, g, Q, ldg, scale_b, shift_b, rows, columns,
            True, STRIDE, PADDING, ACT_B, FLAT, FEW, WHOLE, UPCAST, BP, BQ, BR,
        )  # fmt: skip

    if FLIPPED:
        tap = TAPS - 1 - tap
    at = dw + split.to(tl.int64) * n + (p[:, None] * stride_p + (tap * stride_tap + q * stride_q)[None, :])
    inside = (p < P)[:, None] & here[None, :]
    if ACCUMULATE:
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, acc.to(dw.dtype.element_ty), mask=inside)


@jit
def _meets(tap, outputs, size, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """Whether a tap meets a pixel of the gathered map for some pixel of the plain one."""
    return (tap - PADDING < size) & ((outputs - 1) * STRIDE - PADDING + tap >= 0)


@jit
def _sum(
    plain,
    p,  # [BP] channels of it
    P,
    ld_p,
    gathered,
    Q,
    ld_q,
    scale,  # [groups, P or Q] fp32 or None: of the layer's input
    shift,
    rows,
    columns,
    INPUT_PLAIN: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ACT: tl.constexpr,
    FLAT: tl.constexpr,
    FEW: tl.constexpr,  # channels: neighbours in memory are pixels then
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):  # [BP, BQ] fp32
    """Over the rows of a split, one group of images after the other."""
    start, end, group_rows, PH, PW, H, W, by_PH, by_PW = rows
    q, th, tw, here = columns
    # Of a gathered block a thread has few places along the last axis and many along the other, each of them numbers to
    # compute. Vectors of channels are loaded along the last axis; where there are none, the rows lie along it.
    ROW: tl.constexpr = 0 if FEW else 1  # the axis that a vector over rows lacks
    COLUMN: tl.constexpr = 1 - ROW
    acc = tl.zeros((BP, BQ), tl.float32)
    offset = (th * W + tw) * ld_q + q  # within an image, which int32 holds
    for group in range(start // group_rows, tl.cdiv(end, group_rows)):
        last = tl.minimum(end, (group + 1) * group_rows)
        s, t = None, None
        if scale is not None:
            c = p if INPUT_PLAIN else q
            C = P if INPUT_PLAIN else Q
            axis: tl.constexpr = 1 if INPUT_PLAIN else COLUMN
            s = tl.expand_dims(tl.load(scale + group * C + c, mask=c < C, other=0.0), axis)
            t = tl.expand_dims(tl.load(shift + group * C + c, mask=c < C, other=0.0), axis)
        for first in range(tl.maximum(start, group * group_rows), last, BR):
            m = first + tl.arange(0, BR)
            line = over(m, by_PW)
            image = over(line, by_PH)
            ih, iw = (line - image * PH) * STRIDE - PADDING, (m - line * PW) * STRIDE - PADDING  # of tap 0
            pixel = gathered + (image.to(tl.int64) * (H * W) + (ih * W + iw)) * ld_q
            known = m < last
            if FLAT:
                ih, iw = tl.expand_dims(ih, ROW), tl.expand_dims(iw, ROW)
                meets = within(ih + tl.expand_dims(th, COLUMN), H) & within(iw + tl.expand_dims(tw, COLUMN), W)
                meets = tl.expand_dims(known, ROW) & meets
            else:
                meets = tl.expand_dims(known & within(ih + th, H) & within(iw + tw, W), ROW)
            known = known[None, :]
            if not WHOLE:
                known = known & (p < P)[:, None]
                meets = meets & tl.expand_dims(here, COLUMN)
            a = tl.load(plain + m.to(tl.int64)[None, :] * ld_p + p[:, None], mask=known, other=0.0)
            b = tl.load(tl.expand_dims(pixel, ROW) + tl.expand_dims(offset, COLUMN), mask=meets, other=0.0)
            if INPUT_PLAIN:
                a = operand(a, s, t, None, ACT, True)  # rows that are none meet zeros
            else:
                b = operand(b, s, t, meets, ACT, False)
            if FEW:
                b = tl.trans(b)
            acc = dot(a, b, acc, UPCAST)
    return acc


def compile_cases() -> list[CompileCase]:
    """Every block shape that a plan may have, in the forms that the networks need."""
    one, both = ("scale_a", "shift_a"), ("xb", "scale_a", "shift_a", "scale_b", "shift_b")
    cases = []
    thin: dict[str, Any] = {"Q": "i32", "stride_p": "i32", "stride_tap": "i32"}
    gathered = thin | {"ldg": "i32", "ACT_A": 2, "ACT_B": 2}
    flipped: dict[str, Any] = {
        "Q": "i32",
        "ldg": "i32",
        "stride_p": 1,
        "FLIPPED": True,
        "STRIDE": 1,
        "PADDING": 2,
        "ACT_A": 1,
    }
    for shape in FLAT[:2]:  # c5, whose roles are reversed
        cases.append(_compile_case(shape, one, INPUT_PLAIN=True, FLAT=True, FEW=True, stride_q="i32", **flipped))
    for shape in FLAT[1:]:  # d1
        cases.append(_compile_case(shape, both, INPUT_PLAIN=True, WHOLE=False, FLAT=True, FEW=True, **gathered))
    for shape in FLAT[2:]:  # e1 and c1
        cases.append(_compile_case(shape, (), WHOLE=False, FLAT=True, FEW=True, lda="i32", **thin))
    for shape in (*DEEP, MIDDLE, *LARGE):
        cases.append(_compile_case(shape, (), ACT_A=1, ACCUMULATE=True))
        cases.append(_compile_case(shape, ("xb",), INPUT_PLAIN=True, ACT_A=2, ACT_B=2))
        cases.append(_compile_case(shape, one, ACT_A=1, dw="*fp32"))
        cases.append(_compile_case(shape, both, INPUT_PLAIN=True, ACT_A=2, ACT_B=2, dw="*fp32"))
    for shape in (DEEP[0], *LARGE):  # 64 channels: two taps a block
        cases.append(_compile_case(shape, one, ACT_A=1, FLAT=True, dw="*fp32"))
        cases.append(_compile_case(shape, both, INPUT_PLAIN=True, ACT_A=2, ACT_B=2, FLAT=True, dw="*fp32"))
    return cases


def _compile_case(shape: Shape, present: Sequence[str], **given: str | int) -> CompileCase:
    """One block shape and form; `present`: the optional arguments that are there."""
    p, q, rows, warps, stages = shape
    optional = ("xb", "scale_a", "shift_a", "scale_b", "shift_b")
    constexprs: dict[str, Any] = {"INPUT_PLAIN": False, "SIDE": 4, "STRIDE": 2, "PADDING": 1, "FLIPPED": False}
    constexprs |= {
        "ACT_A": 0,
        "ACT_B": 0,
        "FLAT": False,
        "FEW": False,
        "WHOLE": True,
        "ACCUMULATE": False,
        "UPCAST": False,
    }
    constexprs |= {"BP": p, "BQ": q, "BR": rows, "stride_q": 1}  # an argument that is 1 becomes a constant
    constexprs |= {name: None for name in optional if name not in present}
    constexprs |= {} if "xb" in present else {"ldb": 0, "PB": 0}
    constexprs |= {name: value for name, value in given.items() if not isinstance(value, str)}
    types = dict.fromkeys(("xa", "xb", "g", "dw"), "*bf16") | dict.fromkeys(optional[1:], "*fp32")
    types |= dict.fromkeys(("PA", "PB", "Q", "lda", "ldb", "ldg", "stride_p", "stride_tap", "n"), "i32:16")
    types |= dict.fromkeys(("by_PH", "by_PW"), "i64")
    types |= {name: value for name, value in given.items() if isinstance(value, str)}
    constexprs = {name: value for name, value in constexprs.items() if name not in given or name not in types}
    names = [name for name in _conv_wgrad_kernel.arg_names if name not in constexprs]
    return CompileCase(_conv_wgrad_kernel, {name: types.get(name, "i32") for name in names}, constexprs, warps, stages)

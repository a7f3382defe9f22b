"""The kernel of conv.py: every product of a convolution but its kernel's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._triton import jit, tl
from .activations import activate, times_derivative
from .conv_plan import DEEP, FLAT, FLATTENED, LARGE, SMALL, THIN, WIDE, Shape
from .dispatch import CompileCase
from .division import over, within
from .geometry import Gather, Geometry, dot
from .operands import operand
from .overlap import enter, prefetch


@jit
def _conv_kernel(
    xa,  # [N * H * W, CA] rows with stride lda
    xb,  # [N * H * W, CB] rows with stride ldb, or None
    w,  # kernel
    y,  # [N * OH * OW, CO] rows with stride ldy, written; partial sums [splits, N * OH * OW, CO] fp32 where SPLIT
    y2,  # [N * OH * OW, CO] rows with stride ldy2, written with ACT_2 of y; or None
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
    H,
    W,
    OH,
    OW,
    QH,
    QW,
    by_QH,  # reciprocals
    by_QW,
    rows,  # of one parity of one group
    tiles,  # of these
    by_tiles,
    by_columns,  # of blocks of CO
    by_CA,
    CA,
    CB,
    CO,
    lda,
    ldb,
    ldy,
    ldy2,
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
    ACT_2: tl.constexpr,
    FLAT: tl.constexpr,
    FLATTEN: tl.constexpr,  # the loops over taps and channels as one
    SPLIT: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    # neighbours are the parities of a tile, then its columns: they read the same pixels
    part, tile = tl.program_id(0) % (PARITIES * PARITIES), tl.program_id(0) // (PARITIES * PARITIES)
    split = tl.program_id(1)
    columns = tl.cdiv(CO, BN)
    block = over(tile, by_columns)
    first_col = (tile - block * columns) * BN
    col = first_col + tl.arange(0, BN)
    group = over(block, by_tiles)
    tile = block - group * tiles
    ph, pw = part // PARITIES, part % PARITIES

    row = tile * BM + tl.arange(0, BM)
    inside = row < rows
    q = group * rows + row
    line = over(q, by_QW)
    image = over(line, by_QH)
    qw, qh, image = q - line * QW, line - image * QH, image.to(tl.int64)
    fh, fw = qh * STEP + (FIRST + ph), qw * STEP + (FIRST + pw)
    kh, kw = K0 - ph, K0 - pw

    acc = tl.zeros((BM, BN), tl.float32)
    if FLAT:
        enter(OVERLAP)
        pixel = xa + (image * (H * W) + fh * W + fw) * lda
        for first in range(0, TAPS * TAPS * CA, BK):
            k = first + tl.arange(0, BK)
            tap = over(k, by_CA)
            th, tw, c = tap // TAPS, tap % TAPS, k - tap * CA
            ok = within(fh[:, None] + th[None, :], H) & within(fw[:, None] + tw[None, :], W)
            ok = ok & inside[:, None] & (k < TAPS * TAPS * CA)[None, :]
            a = tl.load(pixel[:, None] + ((th * W + tw) * lda + c)[None, :], mask=ok, other=0.0)
            a = operand(a, None, None, None, ACT_A, True)
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
        first_tap, end_tap = tap_split * tap_share, tl.minimum((tap_split + 1) * tap_share, useful)
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            if SPLIT:  # one program alone reads its part of the kernel
                for tap in range(first_tap, end_tap):
                    th, tw = low_h + tap // wide, low_w + tap % wide
                    wt = w + ((kh + KSTEP * th) * KERNEL + kw + KSTEP * tw) * stride_tap
                    _prefetch_source(
                        wt, CA, channel_split * chunk_a, chunk_a, first_col, CO, stride_k, stride_n, BN, BK
                    )
                    if xb is not None:
                        _prefetch_source(
                            wt + CA * stride_k, CB, channel_split * chunk_b, chunk_b, first_col, CO, stride_k, stride_n,
                            BN, BK,
                        )  # fmt: skip
            tl.extra.cuda.gdc_wait()
        for tap in tl.range(first_tap, end_tap, flatten=FLATTEN):
            th, tw = low_h + tap // wide, low_w + tap % wide
            ih, iw = fh + th, fw + tw
            ok = inside & within(ih, H) & within(iw, W)
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
        if y2 is not None:
            again = activate(rounded.to(tl.float32), ACT_2).to(y.dtype.element_ty)
            tl.store(y2 + out[:, None] * ldy2 + col[None, :], again, mask=mask)
        tl.store(y + (out[:, None] * ldy + col[None, :]), rounded, mask=mask)
        at = group * (PARITIES * PARITIES) * tiles + part * tiles + tile
        if nx is not None:
            c = col - (CO - NC)
            mask = mask & (c >= 0)[None, :]
            layer = nx, gamma, beta, mean, rstd, other, NC, ldo, ACT, ACT_OTHER
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
    # not before first: Triton 3.7.1 flattens loops that end before they begin wrong
    last = tl.maximum(first, tl.minimum(first + count, C))
    for start in range(first, last, BK):
        k = start + tl.arange(0, BK)
        if WHOLE_K:
            a = tl.load(x[:, None] + k[None, :], mask=ok[:, None], other=0.0)
        else:
            a = tl.load(x[:, None] + k[None, :], mask=ok[:, None] & (k < last)[None, :], other=0.0)
        s, t = None, None
        if scale is not None:
            s = tl.load(scale + group * C + k, mask=k < last, other=0.0)[None, :]
            t = tl.load(shift + group * C + k, mask=k < last, other=0.0)[None, :]
        a = operand(a, s, t, ok[:, None], ACT, True)
        at = w + k[:, None] * stride_k + col[None, :] * stride_n
        if WHOLE_K and WHOLE_N:
            b = tl.load(at)
        else:
            b = tl.load(at, mask=(k < last)[:, None] & (col < CO)[None, :], other=0.0)
        acc = dot(a, b, acc, UPCAST)
    return acc


@jit
def _prefetch_source(
    w, C, first, count, first_col, CO, stride_k, stride_n, BN: tl.constexpr, BK: tl.constexpr, LINE: tl.constexpr = 64
):
    """One tap's kernel of the channels that `_add_source` will sum over: an address in LINE numbers (128 bytes)."""
    last = tl.minimum(first + count, C)
    for start in range(first, last, BK):
        if stride_n == 1:
            each_k = tl.minimum(start + tl.arange(0, BK), last - 1)
            some_n = tl.minimum(first_col + LINE * tl.arange(0, (BN + LINE - 1) // LINE), CO - 1)
            prefetch(w + each_k[:, None] * stride_k + some_n[None, :])
        else:
            some_k = tl.minimum(start + LINE * tl.arange(0, (BK + LINE - 1) // LINE), last - 1)
            each_n = tl.minimum(first_col + tl.arange(0, BN), CO - 1)
            prefetch(w + some_k[:, None] * stride_k + each_n[None, :] * stride_n)


@jit
def _dz(layer, g, group, row, c, mask):
    """dz and dz * xhat [BM, BN], 0 outside the mask; g: gradient of the activated output."""
    nx, gamma, beta, mean, rstd, other, NC, ldo, ACT, ACT_OTHER = layer
    inside = (c >= 0) & (c < NC)
    x = tl.load(nx + row[:, None] * NC + c[None, :], mask=mask, other=0.0).to(tl.float32)
    xhat = x - tl.load(mean + group * NC + c, mask=inside, other=0.0)[None, :]
    xhat = xhat * tl.load(rstd + group * NC + c, mask=inside, other=0.0)[None, :]
    h = xhat
    if gamma is not None:
        h = h * tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if beta is not None:
        h = h + tl.load(beta + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    dz = times_derivative(g, h, ACT)
    if other is not None:
        more = tl.load(other + row[:, None] * ldo + c[None, :], mask=mask, other=0.0).to(tl.float32)
        dz += times_derivative(more, h, ACT_OTHER)
    dz = tl.where(mask, dz, 0.0)
    return dz, dz * xhat


def compile_cases() -> list[CompileCase]:
    """Every block shape that a plan may have, in the heaviest of the forms that the networks need."""
    halving, doubling = Geometry(4, 2, 1).forward(), Geometry(4, 2, 1).dgrad()
    same, flipped = Geometry(4, 1, 1).forward(), Geometry(4, 1, 1).dgrad()
    pixels = Geometry(3, 1, 1).forward()
    # a convolution's kernel; its dgrad's and a transposed one's are the reverse
    up: Types = {"stride_n": "i32:16", "stride_k": 1}
    back: Types = {"stride_n": 1, "stride_k": "i32:16"}
    affine, two = ("scale_a", "shift_a"), ("xb", "ldb", "CB", "chunk_b")
    again = ("y2", "ldy2")
    both = (*two, *affine, "scale_b", "shift_b")
    norm = ("nx", "mean", "rstd", "gamma", "beta", "tile_1", "tile_2", "NC")
    stats = ("tile_1", "tile_2")
    thin: Types = {"CA": "i32", "lda": "i32", "stride_k": 1, "stride_n": "i32", "stride_tap": "i32"}
    narrow: Types = {"CO": "i32", "ldy": "i32"}
    second = (*two, "scale_b", "shift_b")
    cases = []
    for shape in FLAT:  # e1 and c1; the dgrads of d1 and c5
        cases.append(_compile_case(shape, halving, again, thin, FLAT=True, ACT=1, ACT_2=2))
        cases.append(_compile_case(shape, halving, norm, thin, FLAT=True, ACT=2))
    for shape in THIN:  # d1, in two forms; c5
        cases.append(_compile_case(shape, pixels, (), up | narrow, ACT=3))
        cases.append(_compile_case(shape, doubling, second, back | narrow, ACT_A=2, ACT_B=2, ACT=3))
        cases.append(_compile_case(shape, same, affine, up | narrow, ACT_A=1))
        cases.append(_compile_case(shape, same, affine, up | narrow, ACT_A=1, SPLIT=True))
    for shape in (*DEEP, *SMALL):
        cases.append(_compile_case(shape, halving, (), up, SPLIT=True))
        cases.append(_compile_case(shape, doubling, two, back, SPLIT=True, ACT_A=2))
        cases.append(_compile_case(shape, doubling, (*norm, "other", "ldo"), back, ACT=1, ACT_OTHER=2))
    for shape in LARGE[:2]:
        cases.append(_compile_case(shape, halving, affine, up, SPLIT=True, ACT_A=1))
        cases.append(_compile_case(shape, doubling, both, back, SPLIT=True, ACT_A=2, ACT_B=2))
    for shape in WIDE:
        cases.append(_compile_case(shape, halving, again, up, ACT=1, ACT_2=2))
        cases.append(_compile_case(shape, doubling, stats, back))
        cases.append(_compile_case(shape, halving, (*affine, *stats), up, ACT_A=1))
        cases.append(_compile_case(shape, doubling, (*both, *stats), back, ACT_A=2, ACT_B=2))
        cases.append(_compile_case(shape, halving, (*norm, "other"), back, ACT=2, ACT_OTHER=1))
        cases.append(_compile_case(shape, doubling, (*norm, "other", "ldo"), back, ACT=1, ACT_OTHER=2))
        cases.append(_compile_case(shape, flipped, norm, back, ACT=1))
    for forms in ((halving, up, stats), (halving, up, (*affine, *stats)), (doubling, back, (*norm, "other", "ldo"))):
        gather, types, present = forms
        for split in (False, True):
            some = tuple(name for name in present if name in affine) if split else present
            case = _compile_case(
                FLATTENED, gather, some, types, SPLIT=split, ACT_A=int("scale_a" in some), FLATTEN=True
            )
            cases.append(case)
    return cases


Types = dict[str, str | int]  # of arguments; a number is one that becomes a constant
_OPTIONAL = (
    *("xb", "y2", "scale_a", "shift_a", "scale_b", "shift_b", "bias", "tile_1", "tile_2"),
    *("nx", "gamma", "beta", "mean", "rstd", "other"),
)
_NUMBERS = ("CB", "ldb", "chunk_b", "NC", "ldo", "ldy2")  # 0 where there is nothing to number


def _compile_case(shape: Shape, gather: Gather, present: Sequence[str], types: Types, **constants: int) -> CompileCase:
    """One block shape and form; `present`: the optional arguments that are there."""
    bm, bn, bk, warps, stages = shape
    flags = {"ACT_A": 0, "ACT_B": 0, "ACT": 0, "ACT_OTHER": 0, "ACT_2": 0}
    flags |= {"FLAT": False, "FLATTEN": False, "SPLIT": False}
    whole = not constants.get("FLAT", False)
    constexprs: dict[str, Any] = {name: None for name in _OPTIONAL if name not in present}
    constexprs |= {name: 0 for name in _NUMBERS if name not in present}
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
    if name in ("xa", "xb", "w", "y2", "nx", "other") or (name == "y" and not split):
        return "*bf16"
    if name == "y" or name in _OPTIONAL:
        return "*fp32"
    if name.startswith("by_"):
        return "i64"
    channels = ("CA", "CO", "lda", "ldy", "chunk_a", *_NUMBERS)
    return "i32:16" if name in channels or name.startswith("stride") else "i32"

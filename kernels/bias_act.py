"""Add a bias and activate, where there is no normalisation: the first layers, the bottleneck, the last layers.

Activations are matrices of rows (rows.py). With no bias and no second output this is the bare activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import jit, tl
from .activations import ACTIVATIONS, activate, times_derivative
from .dispatch import CompileCase, choose, launch
from .overlap import enter
from .rows import (
    Output,
    check_partials,
    compile_case,
    launch_plan,
    not_supported_reasons,
    raw_rows,
    row_bytes,
    store_total,
    sum_tiles,
)


def bias_act(
    x: Tensor,  # [M, C] fp32, fp16 or bf16, raw convolution output without its bias, contiguous
    bias: Tensor | None,  # [C] fp32
    outputs: Sequence[Output],  # one or two, written
    *,
    partials: Tensor | None = None,  # [splits, M, C] fp32, contiguous: x is their sum, rounded, and is written
    impl: str = "auto",
) -> None:
    """outputs[i] = activation_i(x + bias)."""
    check_partials("bias_act", partials, x)
    written, fp32 = [output.rows for output in outputs], () if partials is None else (partials,)
    if choose("bias_act", impl, x, not_supported_reasons(x, written, (bias,), len(outputs), fp32)) == "triton":
        _bias_act_triton(x, bias, outputs, partials)
        return
    if partials is not None:
        x.copy_(partials.sum(0))
    h = _hidden(x, bias)
    for output in outputs:
        output.rows.copy_(ACTIVATIONS[output.activation].forward(h))


def bias_act_backward(
    gradients: Sequence[Output],  # of the outputs: rows are dL/d output
    x: Tensor,  # [M, C] as given to bias_act
    bias: Tensor | None,  # [C] fp32
    dx: Tensor,  # [M, C] dtype of x, written
    dbias: Tensor | None,  # [C] any float dtype, written (or added to)
    *,
    accumulate: bool = False,
    impl: str = "auto",
) -> None:
    """dx and dbias from the gradients of both outputs. What is written overlaps nothing that is read."""
    like_x = [*(gradient.rows for gradient in gradients), dx]
    if choose("bias_act", impl, x, not_supported_reasons(x, like_x, (bias, dbias), len(gradients))) == "triton":
        _bias_act_backward_triton(gradients, x, bias, dx, dbias, accumulate)
        return
    h = _hidden(x, bias)
    dz = sum(g.rows.to(h.dtype) * ACTIVATIONS[g.activation].derivative(h) for g in gradients)
    assert isinstance(dz, Tensor)
    dx.copy_(dz)
    if dbias is not None:
        dbias.copy_(dbias + dz.sum(0) if accumulate else dz.sum(0))


def _hidden(x: Tensor, bias: Tensor | None) -> Tensor:  # [M, C] at least fp32
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide if bias is None else wide + bias


def _bias_act_triton(x: Tensor, bias: Tensor | None, outputs: Sequence[Output], partials: Tensor | None) -> None:
    first, second = outputs[0], outputs[1] if len(outputs) == 2 else None
    splits = 1 if partials is None else len(partials)
    plan = launch_plan(*x.shape, 1, splits)
    launch(
        _bias_act_fwd_kernel,
        plan.grid,
        *(x, partials, bias, first.rows, None if second is None else second.rows),
        *(splits, x.numel(), *x.shape, plan.tile_rows),
        *(first.rows.stride(0), 0 if second is None else second.rows.stride(0)),
        read=row_bytes(x, partials is None, bias is not None) + (0 if partials is None else 4 * partials.numel()),
        written=row_bytes(x, len(outputs) + (partials is not None)),
        ACT1=ACTIVATIONS[first.activation].id,
        ACT2=0 if second is None else ACTIVATIONS[second.activation].id,
        BM=plan.block_rows,
        BC=plan.block_channels,
        num_warps=plan.warps,
    )


def _bias_act_backward_triton(
    gradients: Sequence[Output],
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    dbias: Tensor | None,
    accumulate: bool,
) -> None:
    """dx and the sums per tile in one pass; a second, tiny launch adds several tiles up."""
    first, second = gradients[0], gradients[1] if len(gradients) == 2 else None
    rows, channels = x.shape
    plan = launch_plan(rows, channels, 1)
    direct = plan.tiles == 1
    sums = dbias if direct or dbias is None else x.new_empty(plan.tiles, channels, dtype=torch.float32)
    sums_bytes = 0 if sums is None else sums.numel() * sums.element_size()
    launch(
        _bias_act_bwd_kernel,
        plan.grid,
        *(x, bias, first.rows, None if second is None else second.rows, dx, sums, rows, channels, plan.tile_rows),
        *(first.rows.stride(0), 0 if second is None else second.rows.stride(0), dx.stride(0)),
        read=row_bytes(x, 1 + len(gradients), bias is not None) + sums_bytes * (direct and accumulate),
        written=row_bytes(x, 1) + sums_bytes,
        ACT1=ACTIVATIONS[first.activation].id,
        ACT2=0 if second is None else ACTIVATIONS[second.activation].id,
        ACCUMULATE=direct and accumulate,
        BM=plan.block_rows,
        BC=plan.block_channels,
        num_warps=plan.warps,
    )
    if dbias is not None and not direct:
        bias_bytes = dbias.numel() * dbias.element_size()
        launch(
            _bias_sum_kernel,
            plan.grid[:1],
            *(sums, dbias, channels, plan.tiles),
            read=sums_bytes + bias_bytes * accumulate,
            written=bias_bytes,
            ACCUMULATE=accumulate,
            BC=plan.block_channels,
            num_warps=4,
        )


@jit
def _bias_act_fwd_kernel(
    x,  # [rows, C], written where there are partial sums
    partials,  # [splits, rows, C] fp32 or None
    bias,  # [C] or None
    y1,  # rows of C with stride ld1, written
    y2,  # rows of C with stride ld2, written, or None
    splits,
    size,  # of x
    rows,
    C,
    tile_rows,
    ld1,
    ld2,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    enter(OVERLAP)
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    start = tl.program_id(1) * tile_rows
    for first in range(start, tl.minimum(start + tile_rows, rows), BM):
        row = first + tl.arange(0, BM)
        h, ok, wide = _biased((x, partials, splits, size), bias, row, rows, col, C)
        tl.store(y1 + wide * ld1 + col[None, :], activate(h, ACT1).to(y1.dtype.element_ty), mask=ok)
        if y2 is not None:
            tl.store(y2 + wide * ld2 + col[None, :], activate(h, ACT2).to(y2.dtype.element_ty), mask=ok)


@jit
def _bias_act_bwd_kernel(
    x,  # [rows, C]
    bias,  # [C] or None
    g1,  # rows of C with stride ld1
    g2,  # rows of C with stride ld2, or None
    dx,  # rows of C with stride ld, written
    sums,  # [tiles, C], written: sums of dx, or None; one tile's is the bias gradient itself
    rows,
    C,
    tile_rows,
    ld1,
    ld2,
    ld,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    tile = tl.program_id(1)
    start = tile * tile_rows
    total = tl.zeros((BM, BC), tl.float32)
    for first in range(start, tl.minimum(start + tile_rows, rows), BM):
        row = first + tl.arange(0, BM)
        h, ok, wide = _biased((x, None, 1, 0), bias, row, rows, col, C)
        d = times_derivative(tl.load(g1 + wide * ld1 + col[None, :], mask=ok, other=0.0).to(tl.float32), h, ACT1)
        if g2 is not None:
            more = tl.load(g2 + wide * ld2 + col[None, :], mask=ok, other=0.0).to(tl.float32)
            d += times_derivative(more, h, ACT2)
        tl.store(dx + wide * ld + col[None, :], d.to(dx.dtype.element_ty), mask=ok)
        total += d
    if sums is not None:
        store_total(sums + tile * C, tl.sum(total, 0), col, C, ACCUMULATE)


@jit
def _bias_sum_kernel(
    sums,  # [tiles, C] fp32
    dbias,  # [C], written
    C,
    tiles,
    ACCUMULATE: tl.constexpr,
    BC: tl.constexpr,
):
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    store_total(dbias, sum_tiles(sums, tiles, col, C, BC), col, C, ACCUMULATE)


@jit
def _biased(raw, bias, row, rows, col, C):
    """x (as in raw_rows) + bias in fp32, the mask of what exists [BM, BC], and the rows as int64 [BM, 1]."""
    ok = (row < rows)[:, None] & (col < C)[None, :]
    wide = row.to(tl.int64)[:, None]
    h = raw_rows(raw, wide, col, ok, C, True)
    if bias is not None:
        h += tl.load(bias + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    return h, ok, wide


def compile_cases() -> list[CompileCase]:
    """Training's forms: e1 with two outputs, the RGB output, e8 from partial sums, and the bias gradient's sum."""
    big, two, whole = {"BM": 128, "BC": 32}, {"ACT1": 1, "ACT2": 2}, {"partials": None, "splits": 1}
    rgb = {"BM": 1024, "BC": 4, "ACT1": 3, "ACT2": 0}
    return [
        compile_case(_bias_act_fwd_kernel, {**big, **two, **whole}),
        compile_case(_bias_act_fwd_kernel, {**rgb, **whole, "y2": None}, C="i32", size="i32", ld1="i32"),
        compile_case(_bias_act_fwd_kernel, {"BM": 1, "BC": 8, "ACT1": 2, "ACT2": 0, "y2": None}, num_warps=1),
        compile_case(_bias_act_fwd_kernel, {"BM": 128, "BC": 8, **two}),
        compile_case(_bias_act_bwd_kernel, {**big, **two, "ACCUMULATE": False}),
        compile_case(_bias_act_bwd_kernel, {**rgb, "g2": None, "ACCUMULATE": False}, C="i32", ld1="i32", ld="i32"),
        compile_case(_bias_sum_kernel, {"BC": 32, "ACCUMULATE": True}, num_warps=4),
    ]

"""Add up the parts of a split sum, in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .dispatch import CompileCase, choose, launch
from .overlap import enter

_BLOCK = 2048  # numbers in registers: 16 per thread


def sum_splits(
    partials: Tensor,  # [splits, M, C] fp32, contiguous
    out: Tensor,  # [M, C] any float dtype, row stride >= C, written
    *,
    accumulate: bool = False,  # add to out instead
    impl: str = "auto",
) -> None:
    """out = the sum of the parts, rounded once."""
    reasons = not_supported_reasons(partials, out)
    if choose("conv", impl, out, reasons) == "triton":
        _sum_splits_triton(partials, out, accumulate)
        return
    _sum_splits_reference(partials, out, accumulate)


def not_supported_reasons(partials: Tensor, out: Tensor) -> list[str]:
    """Why the Triton kernel cannot take these arguments."""
    reasons = []
    if partials.ndim != 3 or not partials.is_contiguous() or partials.dtype != torch.float32:
        reasons.append(f"partial sums {tuple(partials.shape)} {partials.dtype}; [splits, M, C] contiguous fp32 needed")
    if out.shape != partials.shape[1:] or out.stride(1) != 1 < out.shape[1]:
        reasons.append(f"the output is {tuple(out.shape)} with strides {out.stride()}; rows like the parts needed")
    return reasons


def _sum_splits_reference(partials: Tensor, out: Tensor, accumulate: bool) -> None:
    total = partials.sum(0)
    out.copy_(out + total if accumulate else total)


def block_shape(splits: int) -> tuple[int, int]:
    """(parts, numbers) that a program holds: many parts of few numbers at once, so that no load waits for another."""
    lanes = min(64, 1 << (splits - 1).bit_length())
    return lanes, _BLOCK // lanes


def _sum_splits_triton(partials: Tensor, out: Tensor, accumulate: bool) -> None:
    splits, rows, channels = partials.shape
    size = out.numel() * out.element_size()
    lanes, block = block_shape(splits)
    launch(
        _sum_splits_kernel,
        (-(-out.numel() // block),),
        *(partials, out, out.numel(), channels, out.stride(0), splits),
        read=4 * partials.numel() + size * accumulate,
        written=size,
        ACCUMULATE=accumulate,
        DENSE=rows == 1 or out.stride(0) == channels,
        LANES=lanes,
        BLOCK=block,
    )


@jit
def _sum_splits_kernel(
    partials,  # [splits, n] fp32
    out,  # n numbers in rows of C with stride ld, written
    n,
    C,
    ld,
    splits,
    ACCUMULATE: tl.constexpr,
    DENSE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    enter(OVERLAP)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    parts = partials + lane.to(tl.int64)[:, None] * n + i[None, :]
    total = tl.zeros((LANES, BLOCK), tl.float32)
    for first in range(0, splits, LANES):
        total += tl.load(parts, mask=(first + lane < splits)[:, None] & (i < n)[None, :], other=0.0)
        parts += LANES * n
    total = tl.sum(total, 0)
    at = i if DENSE else (i // C).to(tl.int64) * ld + i % C
    if ACCUMULATE:
        total += tl.load(out + at, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=i < n)


def compile_cases() -> list[CompileCase]:
    """A kernel's gradient into its arena, rows that lie apart, and many parts of few numbers."""
    types = {"partials": "*fp32", "out": "*bf16", "n": "i32:16", "C": "i32:16", "ld": "i32:16", "splits": "i32"}
    cases = []
    for splits, accumulate, dense in ((2, True, True), (8, False, False), (64, False, True)):
        lanes, block = block_shape(splits)
        constexprs = {"ACCUMULATE": accumulate, "DENSE": dense, "LANES": lanes, "BLOCK": block}
        cases.append(CompileCase(_sum_splits_kernel, types, constexprs))
    return cases

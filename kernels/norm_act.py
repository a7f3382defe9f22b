"""Normalise, drop, activate: one pass over a raw convolution output, up to two activated outputs.

Activations are matrices of rows (rows.py). The backward op is norm_act_backward.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import jit, tl
from .activations import ACTIVATIONS, activate
from .dispatch import CompileCase, choose, launch
from .norm_act_backward import hidden, norm_act_backward
from .philox import Noise, dropout_scale
from .rows import Output, Statistics, compile_case, launch_plan, not_supported_reasons, row_bytes
from .statistics import merged_tiles, row_statistics

__all__ = ["EPS", "Output", "Running", "Statistics", "norm_act", "norm_act_backward"]

EPS = 1e-5


class Running(NamedTuple):
    """Running statistics of a batch norm, updated once per group, in the order of the groups."""

    mean: Tensor  # [C] fp32
    var: Tensor  # [C] fp32, unbiased
    batches: Tensor  # [] int64
    momentum: float = 0.1


def norm_act(
    x: Tensor,  # [M, C] fp32, fp16 or bf16, raw convolution output, contiguous
    gamma: Tensor | None,  # [C] fp32
    beta: Tensor | None,  # [C] fp32
    outputs: Sequence[Output],  # one or two, written
    *,
    groups: int = 1,  # M is a multiple of it
    images: int = 1,  # M is a multiple of it; only dropout looks at it
    noise: Noise | None = None,  # dropout 0.5 between normalisation and activation
    running: Running | None = None,  # updated
    eps: float = EPS,
    impl: str = "auto",
) -> Statistics:
    """outputs[i] = activation_i(drop(gamma * (x - mean) * rstd + beta)); statistics in fp32, biased variance.

    A group needs two rows: one alone has no variance (ValueError, as torch's batch norm in training).
    """
    rows = len(x)
    if rows % groups or rows % images:
        raise ValueError(f"norm_act: {rows} rows are not a multiple of groups = {groups} and images = {images}")
    if rows // groups < 2:
        raise ValueError(
            f"norm_act: {rows} rows in {groups} groups leave {rows // groups} value per channel to normalise; "
            f"at least 2 are needed: use a larger image or batch"
        )
    written = [output.rows for output in outputs]
    vectors = (gamma, beta) if running is None else (gamma, beta, running.mean, running.var)
    reasons = not_supported_reasons(x, written, vectors, len(outputs))
    if choose("norm_act", impl, x, reasons) == "triton":
        return _norm_act_triton(x, gamma, beta, outputs, groups, images, noise, running, eps)
    return _norm_act_reference(x, gamma, beta, outputs, groups, images, noise, running, eps)


def _norm_act_reference(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    outputs: Sequence[Output],
    groups: int,
    images: int,
    noise: Noise | None,
    running: Running | None,
    eps: float,
) -> Statistics:
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).view(groups, -1, x.shape[1])
    var, mean = torch.var_mean(wide, 1, correction=0)
    statistics = Statistics(mean, torch.rsqrt(var + eps))
    h = hidden(x, gamma, beta, statistics, images, noise)
    for output in outputs:
        output.rows.copy_(ACTIVATIONS[output.activation].forward(h))
    if running is not None:
        count = wide.shape[1]
        for group in range(groups):
            running.mean.lerp_(mean[group], running.momentum)
            running.var.lerp_(var[group] * count / (count - 1), running.momentum)
            running.batches.add_(1)
    return statistics


def _norm_act_triton(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    outputs: Sequence[Output],
    groups: int,
    images: int,
    noise: Noise | None,
    running: Running | None,
    eps: float,
) -> Statistics:
    """One launch where a group is one tile, else statistics per tile and then everything else."""
    (total, channels), first, second = x.shape, outputs[0], outputs[-1] if len(outputs) == 2 else None
    rows = total // groups
    plan = launch_plan(rows, channels, groups)
    block = {"BM": plan.block_rows, "BC": plan.block_channels, "num_warps": plan.warps}
    mean, rstd = x.new_empty(2, groups, channels, dtype=torch.float32).unbind()
    tile_mean = tile_m2 = None
    # the program that updates the running statistics needs every group's: it reads two groups, but not many
    if plan.tiles > 1 or (running is not None and groups > 2):
        tile_mean, tile_m2 = x.new_empty(2, groups, plan.tiles, channels, dtype=torch.float32).unbind()
        sizes = (rows, channels, plan.tiles, plan.tile_rows)
        written = row_bytes(x, 0, 2 * groups * plan.tiles)
        launch(
            _norm_act_stats_kernel,
            plan.grid,
            *(x, tile_mean, tile_m2, *sizes),
            read=row_bytes(x, 1),
            written=written,
            **block,
        )
    launch(
        _norm_act_fwd_kernel,
        plan.grid,
        *(x, gamma, beta, first.rows, None if second is None else second.rows),
        *(mean, rstd, tile_mean, tile_m2),
        *((None, None, None, 0.0) if running is None else running),
        *((None, 0) if noise is None else noise[:2]),
        *(rows, channels, groups, plan.tiles, plan.tile_rows, total // images),
        *(first.rows.stride(0), 0 if second is None else second.rows.stride(0), eps),
        # x once more than the outputs, although a lone tile reads it twice: the second time comes from a cache
        read=row_bytes(
            x,
            1,
            (gamma is not None)
            + (beta is not None)
            + 2 * (running is not None)
            + 2 * groups * plan.tiles * (tile_mean is not None),
        ),
        written=row_bytes(x, len(outputs), 2 * groups + 2 * (running is not None)),
        ACT1=ACTIVATIONS[first.activation].id,
        ACT2=0 if second is None else ACTIVATIONS[second.activation].id,
        PER_IMAGE=noise is None or noise.per_image,
        **block,
    )
    return Statistics(mean, rstd)


@jit
def _norm_act_stats_kernel(
    x,  # [groups * rows, C]
    tile_mean,  # [groups, tiles, C] fp32, written
    tile_m2,  # [groups, tiles, C] fp32, written: sum of squared distances from the tile's mean
    rows,
    C,
    tiles,
    tile_rows,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    tile, group = tl.program_id(1), tl.program_id(2)
    start = group * rows + tile * tile_rows
    mean, m2 = row_statistics(x, start, tl.minimum(start + tile_rows, (group + 1) * rows), col, C, BM, BC)
    at = (group * tiles + tile) * C + col
    tl.store(tile_mean + at, mean, mask=col < C)
    tl.store(tile_m2 + at, m2, mask=col < C)


@jit
def _norm_act_fwd_kernel(
    x,  # [groups * rows, C]
    gamma,  # [C] or None
    beta,  # [C] or None
    y1,  # rows of C with stride ld1, written
    y2,  # rows of C with stride ld2, written, or None
    mean_out,  # [groups, C] fp32, written
    rstd_out,  # [groups, C] fp32, written
    tile_mean,  # as _norm_act_stats_kernel left it, or None: this program's tile is its group
    tile_m2,
    running_mean,  # [C] fp32, updated, or None
    running_var,  # [C] fp32, updated
    batches,  # [] int64, updated
    momentum,
    counters,  # [3] int64 or None: no dropout
    block,
    rows,
    C,
    groups,
    tiles,
    tile_rows,
    positions,
    ld1,
    ld2,
    eps,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    tile, group = tl.program_id(1), tl.program_id(2)
    inside = col < C
    mean, m2 = _group_statistics(x, tile_mean, tile_m2, group, rows, tiles, tile_rows, col, C, BM, BC)
    rstd = tl.rsqrt(m2 / rows + eps)
    if tile == 0:
        tl.store(mean_out + group * C + col, mean, mask=inside)
        tl.store(rstd_out + group * C + col, rstd, mask=inside)
        if running_mean is not None and group == 0:
            r_mean = tl.load(running_mean + col, mask=inside, other=0.0)
            r_var = tl.load(running_var + col, mask=inside, other=0.0)
            r_mean += momentum * (mean - r_mean)
            r_var += momentum * (m2 / (rows - 1) - r_var)
            for other in range(1, groups):
                m, s = _group_statistics(x, tile_mean, tile_m2, other, rows, tiles, tile_rows, col, C, BM, BC)
                r_mean += momentum * (m - r_mean)
                r_var += momentum * (s / (rows - 1) - r_var)
            tl.store(running_mean + col, r_mean, mask=inside)
            tl.store(running_var + col, r_var, mask=inside)
            if tl.program_id(0) == 0:
                tl.store(batches, tl.load(batches) + groups)
    scale, shift = rstd, tl.zeros((BC,), tl.float32)
    if gamma is not None:
        scale = scale * tl.load(gamma + col, mask=inside, other=0.0).to(tl.float32)
    if beta is not None:
        shift = tl.load(beta + col, mask=inside, other=0.0).to(tl.float32)
    start = group * rows + tile * tile_rows
    end = tl.minimum(start + tile_rows, (group + 1) * rows)
    for first in range(start, end, BM):
        row = first + tl.arange(0, BM)
        ok = (row < end)[:, None] & inside[None, :]
        wide = row.to(tl.int64)[:, None]
        h = tl.load(x + wide * C + col[None, :], mask=ok, other=0.0).to(tl.float32)
        h = (h - mean[None, :]) * scale[None, :] + shift[None, :]
        if counters is not None:
            h = h * dropout_scale(counters, block, row, col, positions, C, PER_IMAGE)
        tl.store(y1 + wide * ld1 + col[None, :], activate(h, ACT1).to(y1.dtype.element_ty), mask=ok)
        if y2 is not None:
            tl.store(y2 + wide * ld2 + col[None, :], activate(h, ACT2).to(y2.dtype.element_ty), mask=ok)


@jit
def _group_statistics(x, tile_mean, tile_m2, group, rows, tiles, tile_rows, col, C, BM: tl.constexpr, BC: tl.constexpr):
    """Mean and sum of squared distances [BC] of a group: of its rows, or merged from its tiles."""
    if tile_mean is None:
        mean, m2 = row_statistics(x, group * rows, (group + 1) * rows, col, C, BM, BC)
    else:
        mean, m2 = merged_tiles(tile_mean, tile_m2, group, rows, tiles, tile_rows, col, C, BC)
    return mean, m2


def compile_cases() -> list[CompileCase]:
    """Training's forms: two outputs merged from tiles, d8 with dropout in one launch, and the largest lone tile."""
    big, plain = {"BM": 128, "BC": 32, "PER_IMAGE": True}, {"counters": None}
    lone = {"tile_mean": None, "tile_m2": None}
    fixed = {"running_mean": None, "running_var": None, "batches": None}
    two, one = {"ACT1": 1, "ACT2": 2}, {"ACT1": 2, "ACT2": 0, "y2": None}
    return [
        compile_case(_norm_act_stats_kernel, {"BM": 128, "BC": 32}),
        compile_case(_norm_act_stats_kernel, {"BM": 1024, "BC": 4}, x="*fp32", C="i32"),
        compile_case(_norm_act_fwd_kernel, {**big, **two, **plain}),
        compile_case(_norm_act_fwd_kernel, {**big, **two, **plain, **lone, **fixed, "gamma": None, "beta": None}),
        compile_case(_norm_act_fwd_kernel, {**big, **one, **lone}, x="*fp32", y1="*fp32"),
        compile_case(_norm_act_fwd_kernel, {**big, **one, **lone, "BM": 4, "groups": 1, "tiles": 1}, num_warps=1),
    ]

"""Normalise, drop, activate: one pass over a raw convolution output, up to two activated outputs.

Activations are matrices of rows (rows.py). The backward op is norm_act_backward.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import jit, tl
from .activations import ACTIVATIONS, activate
from .dispatch import CompileCase, choose, launch
from .merge import fewer_tiles
from .norm_act_backward import hidden, norm_act_backward
from .overlap import enter
from .philox import Noise, dropout_scale
from .rows import (
    EPS,
    Output,
    Plan,
    Running,
    Statistics,
    Tiles,
    check_partials,
    compile_case,
    launch_plan,
    not_supported_reasons,
    raw_rows,
    row_bytes,
)
from .statistics import group_statistics, of_tiles, row_statistics, update_running

__all__ = ["EPS", "Output", "Running", "Statistics", "norm_act", "norm_act_backward"]


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
    tiles: Tiles | None = None,  # of x, where its statistics pass has been saved
    partials: Tensor | None = None,  # [splits, M, C] fp32, contiguous: x is their sum, rounded, and is written
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
    if tiles is not None and partials is not None:
        raise ValueError("norm_act: tiles and partial sums; x that is yet to be summed has no tiles: give one of them")
    if tiles is not None and (errors := tiles.errors(groups, rows // groups, x.shape[1])):
        raise ValueError(f"norm_act: {errors[0]}")
    check_partials("norm_act", partials, x)
    written = [output.rows for output in outputs]
    vectors = (gamma, beta) if running is None else (gamma, beta, running.mean, running.var)
    fp32 = [t for t in (partials, *(() if tiles is None else tiles[:2])) if t is not None]
    reasons = not_supported_reasons(x, written, vectors, len(outputs), fp32)
    if choose("norm_act", impl, x, reasons) == "triton":
        return _norm_act_triton(x, gamma, beta, outputs, groups, images, noise, running, eps, tiles, partials)
    return _norm_act_reference(x, gamma, beta, outputs, groups, images, noise, running, eps, tiles, partials)


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
    tiles: Tiles | None,
    partials: Tensor | None,
) -> Statistics:
    if partials is not None:
        x.copy_(partials.sum(0))
    rows = len(x) // groups
    if tiles is None:
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).view(groups, rows, -1)
        var, mean = torch.var_mean(wide, 1, correction=0, keepdim=True)
        tiles = Tiles(mean, var * rows, rows)
    mean, m2 = of_tiles(tiles, rows)
    statistics = Statistics(mean, torch.rsqrt(m2 / rows + eps))
    h = hidden(x, gamma, beta, statistics, images, noise)
    for output in outputs:
        output.rows.copy_(ACTIVATIONS[output.activation].forward(h))
    if running is not None:
        update_running(running, mean, m2, rows)
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
    tiles: Tiles | None,
    partials: Tensor | None,
) -> Statistics:
    """One launch where a group is one tile or tiles are given, else statistics per tile and then everything else."""
    (total, channels), first, second = x.shape, outputs[0], outputs[-1] if len(outputs) == 2 else None
    rows, splits = total // groups, 1 if partials is None else len(partials)
    plan = launch_plan(rows, channels, groups, splits)
    mean, rstd = x.new_empty(2, groups, channels, dtype=torch.float32).unbind()
    if tiles is not None:
        tiles = fewer_tiles(tiles, rows, math.prod(plan.grid))
    # the program that updates the running statistics needs every group's: it reads two groups, but not many
    elif plan.tiles > 1 or (running is not None and groups > 2):
        tiles, partials = _tiles_of(x, partials, groups, plan), None
        plan = launch_plan(rows, channels, groups)
    vectors = (gamma is not None) + (beta is not None) + 2 * (running is not None)
    parts_bytes = 0 if partials is None else 4 * partials.numel()
    launch(
        _norm_act_fwd_kernel,
        plan.grid,
        *(x, partials, gamma, beta, first.rows, None if second is None else second.rows, mean, rstd),
        *((None, None, 0, 0, 0, 0) if tiles is None else (*tiles[:2], tiles.mean.shape[1], *tiles.cut(rows))),
        *((None, None, None, 0.0) if running is None else running),
        *((None, 0) if noise is None else noise[:2]),
        *(splits, x.numel(), rows, channels, groups, plan.tile_rows, total // images),
        *(first.rows.stride(0), 0 if second is None else second.rows.stride(0), eps),
        # a lone tile reads x, or its parts, twice: the second time comes from a cache
        read=parts_bytes
        + row_bytes(x, partials is None, vectors + (0 if tiles is None else 2 * groups * tiles.mean.shape[1])),
        written=row_bytes(x, len(outputs) + (partials is not None), 2 * groups + 2 * (running is not None)),
        ACT1=ACTIVATIONS[first.activation].id,
        ACT2=0 if second is None else ACTIVATIONS[second.activation].id,
        PER_IMAGE=noise is None or noise.per_image,
        BM=plan.block_rows,
        BC=plan.block_channels,
        num_warps=plan.warps,
    )
    return Statistics(mean, rstd)


def _tiles_of(x: Tensor, partials: Tensor | None, groups: int, plan: Plan) -> Tiles:
    """The statistics pass; x is written where it comes as partial sums."""
    (total, channels), splits = x.shape, 1 if partials is None else len(partials)
    mean, m2 = x.new_empty(2, groups, plan.tiles, channels, dtype=torch.float32).unbind()
    launch(
        _norm_act_stats_kernel,
        plan.grid,
        *(x, partials, mean, m2, splits, x.numel(), total // groups, channels, plan.tiles, plan.tile_rows),
        read=row_bytes(x, 1) if partials is None else 4 * partials.numel(),
        written=row_bytes(x, partials is not None, 2 * groups * plan.tiles),
        BM=plan.block_rows,
        BC=plan.block_channels,
        num_warps=plan.warps,
    )
    return Tiles(mean, m2, plan.tile_rows)


@jit
def _norm_act_stats_kernel(
    x,  # [groups * rows, C], written where there are partial sums
    partials,  # [splits, groups * rows, C] fp32 or None
    tile_mean,  # [groups, tiles, C] fp32, written
    tile_m2,  # [groups, tiles, C] fp32, written: sum of squared distances from the tile's mean
    splits,
    size,
    rows,
    C,
    tiles,
    tile_rows,
    BM: tl.constexpr,
    BC: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    enter(OVERLAP)
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    tile, group = tl.program_id(1), tl.program_id(2)
    start = group * rows + tile * tile_rows
    end = tl.minimum(start + tile_rows, (group + 1) * rows)
    mean, m2 = row_statistics((x, partials, splits, size), start, end, col, C, True, BM, BC)
    at = (group * tiles + tile) * C + col
    tl.store(tile_mean + at, mean, mask=col < C)
    tl.store(tile_m2 + at, m2, mask=col < C)


@jit
def _norm_act_fwd_kernel(
    x,  # [groups * rows, C], written where there are partial sums
    partials,  # [splits, groups * rows, C] fp32 or None
    gamma,  # [C] or None
    beta,  # [C] or None
    y1,  # rows of C with stride ld1, written
    y2,  # rows of C with stride ld2, written, or None
    mean_out,  # [groups, C] fp32, written
    rstd_out,  # [groups, C] fp32, written
    tile_mean,  # [groups, tiles, C] fp32, or None: this program's rows are its group
    tile_m2,
    tiles,
    part_tiles,
    part_rows,
    rows_of_tile,
    running_mean,  # [C] fp32, updated, or None
    running_var,  # [C] fp32, updated
    batches,  # [] int64, updated
    momentum,
    counters,  # [3] int64 or None: no dropout
    block,
    splits,
    size,  # of x
    rows,
    C,
    groups,
    tile_rows,  # of this launch
    positions,
    ld1,
    ld2,
    eps,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    LANES: tl.constexpr = 32
    enter(OVERLAP)
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    tile, group = tl.program_id(1), tl.program_id(2)
    inside = col < C
    raw, known = (x, partials, splits, size), (tile_mean, tile_m2, tiles, part_tiles, part_rows, rows_of_tile)
    running, update = (running_mean, running_var, batches, momentum), (tile == 0) & (group == 0)
    mean, m2 = group_statistics(raw, known, running, update, group, groups, rows, col, C, LANES, BM, BC)
    rstd = tl.rsqrt(m2 / rows + eps)
    if tile == 0:
        tl.store(mean_out + group * C + col, mean, mask=inside)
        tl.store(rstd_out + group * C + col, rstd, mask=inside)
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
        h = raw_rows(raw, wide, col, ok, C, True)
        h = (h - mean[None, :]) * scale[None, :] + shift[None, :]
        if counters is not None:
            h = h * dropout_scale(counters, block, row, col, positions, C, PER_IMAGE)
        tl.store(y1 + wide * ld1 + col[None, :], activate(h, ACT1).to(y1.dtype.element_ty), mask=ok)
        if y2 is not None:
            tl.store(y2 + wide * ld2 + col[None, :], activate(h, ACT2).to(y2.dtype.element_ty), mask=ok)


def compile_cases() -> list[CompileCase]:
    """Training's forms: two outputs merged from tiles, d8 with dropout in one launch, the largest lone tile, splits."""
    big, plain = {"BM": 128, "BC": 32, "PER_IMAGE": True}, {"counters": None}
    whole, parts = {"partials": None, "splits": 1}, {"BM": 128, "BC": 8}
    lone = {"tile_mean": None, "tile_m2": None}
    fixed = {"running_mean": None, "running_var": None, "batches": None}
    two, one = {"ACT1": 1, "ACT2": 2}, {"ACT1": 2, "ACT2": 0, "y2": None}
    return [
        compile_case(_norm_act_stats_kernel, {"BM": 128, "BC": 32, **whole}),
        compile_case(_norm_act_stats_kernel, {"BM": 1024, "BC": 4, **whole}, x="*fp32", C="i32"),
        compile_case(_norm_act_stats_kernel, parts),
        compile_case(_norm_act_fwd_kernel, {**big, **two, **plain, **whole}),
        compile_case(
            _norm_act_fwd_kernel, {**big, **two, **plain, **whole, **lone, **fixed, "gamma": None, "beta": None}
        ),
        compile_case(_norm_act_fwd_kernel, {**big, **one, **whole, **lone}, x="*fp32", y1="*fp32"),
        compile_case(_norm_act_fwd_kernel, {**big, **one, **whole, **lone, "BM": 4, "groups": 1}, num_warps=1),
        compile_case(_norm_act_fwd_kernel, {**big, **one, **lone, **parts}),
        compile_case(_norm_act_fwd_kernel, {**big, **two, **plain, **lone, **parts, "BM": 4, "groups": 1}, num_warps=1),
    ]

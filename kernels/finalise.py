"""From the statistics of tiles to what consumers apply while they load: the scale and shift of a normalisation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import jit, tl
from .dispatch import CompileCase, choose, launch
from .merge import fewer_tiles
from .overlap import enter
from .rows import EPS, Running, Statistics, Tiles, compile_case, fp32_reasons, vector_reasons
from .statistics import group_statistics, of_tiles, update_running

LANES = 128  # tiles loaded at a time
_BLOCK_CHANNELS = 8  # a sector of memory: few programs run, so each is narrow


class Scale(NamedTuple):
    """A normalisation as scale * x + shift."""

    statistics: Statistics
    scale: Tensor  # [groups, C] fp32
    shift: Tensor  # [groups, C] fp32


def finalise(
    tiles: Tiles,  # of x
    gamma: Tensor | None,  # [C] fp32
    beta: Tensor | None,  # [C] fp32
    *,
    rows: int,  # of a group
    running: Running | None = None,  # updated
    eps: float = EPS,
    impl: str = "auto",
) -> Scale:
    """scale = gamma * rstd, shift = beta - mean * scale; statistics and their running means as norm_act has them.

    A group needs two rows: one alone has no variance (ValueError).
    """
    groups, _, channels = tiles.mean.shape
    if rows < 2:
        raise ValueError(f"finalise: a group of {rows} rows has no variance; at least 2 are needed")
    if errors := tiles.errors(groups, rows, channels):
        raise ValueError(f"finalise: {errors[0]}")
    vectors = (gamma, beta) if running is None else (gamma, beta, running.mean, running.var)
    reasons = fp32_reasons(tiles[:2]) + vector_reasons(vectors, channels)
    if choose("norm_act", impl, tiles.mean, reasons) == "triton":
        return _finalise_triton(tiles, gamma, beta, rows, running, eps)
    return _finalise_reference(tiles, gamma, beta, rows, running, eps)


def _finalise_reference(
    tiles: Tiles, gamma: Tensor | None, beta: Tensor | None, rows: int, running: Running | None, eps: float
) -> Scale:
    mean, m2 = of_tiles(tiles, rows)
    statistics = Statistics(mean, torch.rsqrt(m2 / rows + eps))
    scale = statistics.rstd if gamma is None else statistics.rstd * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    if running is not None:
        update_running(running, mean, m2, rows)
    return Scale(statistics, scale, shift)


def _finalise_triton(
    tiles: Tiles, gamma: Tensor | None, beta: Tensor | None, rows: int, running: Running | None, eps: float
) -> Scale:
    groups, _, channels = tiles.mean.shape
    grid = -(-channels // _BLOCK_CHANNELS), groups
    tiles = fewer_tiles(tiles, rows, math.prod(grid))
    written = tiles.mean.new_empty(4, groups, channels)
    vectors = (gamma is not None) + (beta is not None) + 2 * (running is not None)
    launch(
        _finalise_kernel,
        grid,
        *(*tiles[:2], gamma, beta, *written.unbind()),
        *((None, None, None, 0.0) if running is None else running),
        *(tiles.mean.shape[1], *tiles.cut(rows), rows, channels, groups, eps),
        read=4 * (2 * tiles.mean.numel() + vectors * channels),
        written=4 * (written.numel() + 2 * channels * (running is not None)),
        LANES=LANES,
        BC=_BLOCK_CHANNELS,
        num_warps=8,
    )
    mean, rstd, scale, shift = written.unbind()
    return Scale(Statistics(mean, rstd), scale, shift)


@jit
def _finalise_kernel(
    tile_mean,  # [groups, tiles, C] fp32
    tile_m2,  # [groups, tiles, C] fp32
    gamma,  # [C] or None
    beta,  # [C] or None
    mean_out,  # [groups, C] fp32, written, as the three that follow
    rstd_out,
    scale_out,
    shift_out,
    running_mean,  # [C] fp32, updated, or None
    running_var,  # [C] fp32, updated
    batches,  # [] int64, updated
    momentum,
    tiles,
    part_tiles,
    part_rows,
    rows_of_tile,
    rows,
    C,
    groups,
    eps,
    LANES: tl.constexpr,
    BC: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    enter(OVERLAP)
    col, group = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1)
    inside = col < C
    raw, known = (None, None, 1, 0), (tile_mean, tile_m2, tiles, part_tiles, part_rows, rows_of_tile)
    running, update = (running_mean, running_var, batches, momentum), group == 0
    mean, m2 = group_statistics(raw, known, running, update, group, groups, rows, col, C, LANES, 1, BC)
    rstd = tl.rsqrt(m2 / rows + eps)
    scale = rstd
    if gamma is not None:
        scale = scale * tl.load(gamma + col, mask=inside, other=0.0)
    shift = -mean * scale
    if beta is not None:
        shift += tl.load(beta + col, mask=inside, other=0.0)
    at = group * C + col
    tl.store(mean_out + at, mean, mask=inside)
    tl.store(rstd_out + at, rstd, mask=inside)
    tl.store(scale_out + at, scale, mask=inside)
    tl.store(shift_out + at, shift, mask=inside)


def compile_cases() -> list[CompileCase]:
    """Batch norm with running statistics, and instance norm."""
    block = {"LANES": LANES, "BC": _BLOCK_CHANNELS}
    instance = {"gamma": None, "beta": None, "running_mean": None, "running_var": None, "batches": None}
    return [compile_case(_finalise_kernel, block), compile_case(_finalise_kernel, {**block, **instance})]

"""Mean and squared distances of columns, in torch and inside kernels: Welford's update, Chan's merge, in a fixed order.

Sums of squares would lose a variance beside a large mean; these do not. Chan, Golub and LeVeque 1979.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .rows import Running, Tiles, raw_rows


def of_tiles(tiles: Tiles, rows: int) -> tuple[Tensor, Tensor]:  # [groups, C] each
    """The specification of the merge: mean and squared distances of groups of `rows` rows."""
    return merged_runs(tiles.mean, tiles.m2, sizes(tiles, rows))


def sizes(tiles: Tiles, rows: int) -> Tensor:  # [tiles] int64 on their device
    """How many rows each tile of a group has."""
    part_tiles, part_rows, tile_rows = tiles.cut(rows)
    start = torch.arange(part_tiles, device=tiles.mean.device) * tile_rows
    return (part_rows - start).clamp(max=tile_rows).repeat(tiles.parts)


def merged_runs(
    mean: Tensor,  # [groups, runs, C]
    m2: Tensor,  # [groups, runs, C]
    count: Tensor,  # [runs]
) -> tuple[Tensor, Tensor]:  # [groups, C] each
    """Chan's merge of runs of rows."""
    weight = count[:, None].to(mean.dtype)
    center = (mean * weight).sum(1) / weight.sum()
    apart = mean - center[:, None]
    rest = (apart * weight).sum(1) / weight.sum()  # the rounding of center, where means are 1e3
    return center + rest, (m2 + (apart - rest[:, None]) ** 2 * weight).sum(1)


def update_running(
    running: Running,
    mean: Tensor,  # [groups, C]
    m2: Tensor,  # [groups, C]
    rows: int,  # of a group
) -> None:
    """What torch's batch norm does for one group after the other."""
    for group in range(len(mean)):
        running.mean.lerp_(mean[group], running.momentum)
        running.var.lerp_(m2[group] / (rows - 1), running.momentum)
        running.batches.add_(1)


@jit
def group_statistics(
    raw,  # as in raw_rows
    tiles,  # mean and m2 [groups, number, C] or None; number, tiles of a part, rows of a part, rows of a tile
    running,  # mean and var [C] fp32 or None, updated; batches [] int64, updated; momentum
    update,  # whether this program updates them; then its group is the first
    group,
    groups,
    rows,  # of a group
    col,
    C,
    LANES: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Mean and sum of squared distances [BC] of a group; the one program that updates goes through all of them."""
    running_mean, running_var, batches, momentum = running
    if running_mean is None:
        mean, m2 = _of_group(raw, tiles, group, rows, col, C, LANES, BM, BC)
    else:
        if update & (tl.program_id(0) == 0):
            tl.store(batches, tl.load(batches) + groups)
        mean, m2 = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
        r_mean = tl.load(running_mean + col, mask=(col < C) & update, other=0.0)
        r_var = tl.load(running_var + col, mask=(col < C) & update, other=0.0)
        for other in range(group, tl.where(update, groups, group + 1)):
            m, s = _of_group(raw, tiles, other, rows, col, C, LANES, BM, BC)
            mean, m2 = tl.where(other == group, m, mean), tl.where(other == group, s, m2)
            r_mean += momentum * (m - r_mean)
            r_var += momentum * (s / (rows - 1) - r_var)
        tl.store(running_mean + col, r_mean, mask=(col < C) & update)
        tl.store(running_var + col, r_var, mask=(col < C) & update)
    return mean, m2


@jit
def _of_group(raw, tiles, group, rows, col, C, LANES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Of a group's rows, or merged from its tiles."""
    if tiles[0] is None:
        mean, m2 = row_statistics(raw, group * rows, (group + 1) * rows, col, C, False, BM, BC)
    else:
        number = tiles[2]
        mean, m2 = merged_tiles(tiles, group * number, (group + 1) * number, col, C, LANES, BC)
    return mean, m2


@jit
def row_statistics(raw, start, end, col, C, WRITE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Of rows start to end: Welford's update in each of BM lanes, then the lanes merged."""
    lane = tl.arange(0, BM)
    mean = tl.zeros((BM, BC), tl.float32)
    m2 = tl.zeros((BM, BC), tl.float32)
    number = 0.0
    for first in range(start, end, BM):
        row = first + lane
        ok = (row < end)[:, None] & (col < C)[None, :]
        v = raw_rows(raw, row.to(tl.int64)[:, None], col, ok, C, WRITE)
        number += 1.0
        delta = tl.where(ok, v - mean, 0.0)
        mean += delta * (1.0 / number)
        m2 += delta * (v - mean)
    count = (end - start - lane + (BM - 1)) // BM
    return merged(mean, m2, count.to(tl.float32))


@jit
def merged_tiles(tiles, start, end, col, C, LANES: tl.constexpr, BC: tl.constexpr):
    """Of tiles start to end, of one group: Chan's update in each of LANES lanes, then the lanes merged."""
    tile_mean, tile_m2, _, part_tiles, part_rows, tile_rows = tiles
    lane = tl.arange(0, LANES)
    mean = tl.zeros((LANES, BC), tl.float32)
    m2 = tl.zeros((LANES, BC), tl.float32)
    count = tl.zeros((LANES,), tl.float32)
    for first in range(start, end, LANES):
        tile = first + lane
        ok = (tile < end)[:, None] & (col < C)[None, :]
        at = tile[:, None] * C + col[None, :]
        left = part_rows - tile % part_tiles * tile_rows
        size = tl.where(tile < end, tl.minimum(left, tile_rows), 0).to(tl.float32)
        share = size / tl.maximum(count + size, 1.0)
        delta = tl.load(tile_mean + at, mask=ok, other=0.0) - mean
        mean += delta * share[:, None]
        m2 += tl.load(tile_m2 + at, mask=ok, other=0.0) + delta * delta * (count * share)[:, None]
        count += size
    return merged(mean, m2, count)


@jit
def merged(mean, m2, count):
    """Chan's merge of lanes [L, BC], [L, BC], [L] to [BC], [BC]."""
    total = tl.sum(count, 0)
    center = tl.sum(mean * count[:, None], 0) / total
    center += tl.sum((mean - center[None, :]) * count[:, None], 0) / total  # its rounding, where means are 1e3
    apart = mean - center[None, :]
    return center, tl.sum(m2 + apart * apart * count[:, None], 0)

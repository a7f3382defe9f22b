"""Fewer tiles: where a convolution left so many that every program of what follows would read too much."""

from __future__ import annotations

import torch

from ._triton import jit, tl
from .dispatch import CompileCase, choose, launch
from .overlap import enter
from .rows import Sums, Tiles, compile_case, fp32_reasons, sum_tiles
from .statistics import merged_runs, merged_tiles, sizes

CHUNK = 64  # tiles that become one
_BLOCK_CHANNELS = 32


def needs_merge(tiles: int, programs: int) -> bool:
    """Whether another launch costs less than `programs` programs that read `tiles` tiles each.

    One tile is 256 bytes to a program (two fp32 for each of 32 channels), and 8 MB of them take about as long as a
    launch. 256 tiles are a chain of loads as long as that, and 32 are a single one.
    """
    return tiles > max(32, min(256, (1 << 15) // programs))


def fewer_tiles(tiles: Tiles, rows: int, programs: int) -> Tiles:
    """Tiles that `programs` programs can read; by launches, where it takes any."""
    while needs_merge(tiles.mean.shape[1], programs):
        tiles = merge_tiles(tiles, rows, impl="triton")
    return tiles


def fewer_sums(sums: Sums, programs: int) -> Sums:
    """Sums that `programs` programs can read; by launches, where it takes any."""
    while needs_merge(sums.dz.shape[1], programs):
        sums = merge_sums(sums, impl="triton")
    return sums


def merge_tiles(
    tiles: Tiles,
    rows: int,  # of a group
    *,
    impl: str = "auto",
) -> Tiles:
    """Tiles of CHUNK times as many rows; none crosses a part. Chan's merge, in fp32."""
    part_tiles, _, tile_rows = tiles.cut(rows)
    chunks = -(-part_tiles // CHUNK)
    groups, number, channels = tiles.mean.shape
    if errors := tiles.errors(groups, rows, channels):
        raise ValueError(f"merge_tiles: {errors[0]}")
    if choose("norm_act", impl, tiles.mean, fp32_reasons(tiles[:2])) == "reference":
        count = sizes(tiles, rows)
        runs = [
            slice(p + c, p + min(c + CHUNK, part_tiles))
            for p in range(0, number, part_tiles)
            for c in range(0, part_tiles, CHUNK)
        ]
        found = [merged_runs(tiles.mean[:, run], tiles.m2[:, run], count[run]) for run in runs]
        mean, m2 = (torch.stack(values, 1) for values in zip(*found, strict=True))
        return Tiles(mean, m2, CHUNK * tile_rows, tiles.parts)
    shape = groups, tiles.parts * chunks, channels
    mean, m2 = tiles.mean.new_empty(2, *shape).unbind()
    launch(
        _merge_tiles_kernel,
        (-(-channels // _BLOCK_CHANNELS), tiles.parts * chunks, groups),
        *(*tiles[:2], mean, m2, number, *tiles.cut(rows), chunks, channels),
        read=2 * 4 * tiles.mean.numel(),
        written=2 * 4 * mean.numel(),
        CHUNK=CHUNK,
        BC=_BLOCK_CHANNELS,
        num_warps=8,
    )
    return Tiles(mean, m2, CHUNK * tile_rows, tiles.parts)


def merge_sums(sums: Sums, *, impl: str = "auto") -> Sums:
    """A CHUNKth as many sums, added in fp32 in their order."""
    if choose("norm_act", impl, sums.dz, fp32_reasons(sums)) == "reference":
        return Sums(*(torch.stack([c.sum(1) for c in t.split(CHUNK, 1)], 1) for t in sums))
    groups, tiles, channels = sums.dz.shape
    dz, dzx = sums.dz.new_empty(2, groups, -(-tiles // CHUNK), channels).unbind()
    launch(
        _merge_sums_kernel,
        (-(-channels // _BLOCK_CHANNELS), dz.shape[1], groups),
        *(*sums, dz, dzx, tiles, channels),
        read=2 * 4 * sums.dz.numel(),
        written=2 * 4 * dz.numel(),
        CHUNK=CHUNK,
        BC=_BLOCK_CHANNELS,
        num_warps=4,
    )
    return Sums(dz, dzx)


@jit
def _merge_tiles_kernel(
    tile_mean,  # [groups, tiles, C] fp32
    tile_m2,  # [groups, tiles, C] fp32
    into_1,  # [groups, parts * chunks, C] fp32, written: means
    into_2,  # [groups, parts * chunks, C] fp32, written: squared distances
    tiles,
    part_tiles,
    part_rows,
    tile_rows,
    chunks,  # of a part
    C,
    CHUNK: tl.constexpr,
    BC: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    enter(OVERLAP)
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    into, group = tl.program_id(1), tl.program_id(2)
    part = group * tiles + into // chunks * part_tiles
    start = part + into % chunks * CHUNK
    given = tile_mean, tile_m2, tiles, part_tiles, part_rows, tile_rows
    mean, m2 = merged_tiles(given, start, tl.minimum(start + CHUNK, part + part_tiles), col, C, CHUNK, BC)
    at = (group * tl.num_programs(1) + into) * C + col
    tl.store(into_1 + at, mean, mask=col < C)
    tl.store(into_2 + at, m2, mask=col < C)


@jit
def _merge_sums_kernel(
    tile_dz,  # [groups, tiles, C] fp32
    tile_dzx,  # [groups, tiles, C] fp32
    into_1,  # [groups, chunks, C] fp32, written: sums of dz
    into_2,  # [groups, chunks, C] fp32, written: sums of dz * xhat
    tiles,
    C,
    CHUNK: tl.constexpr,
    BC: tl.constexpr,
):
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    into, group = tl.program_id(1), tl.program_id(2)
    start = (group * tiles + into * CHUNK) * C
    number = tl.minimum(tiles - into * CHUNK, CHUNK)
    at = (group * tl.num_programs(1) + into) * C + col
    tl.store(into_1 + at, sum_tiles(tile_dz + start, number, col, C, BC), mask=col < C)
    tl.store(into_2 + at, sum_tiles(tile_dzx + start, number, col, C, BC), mask=col < C)


def compile_cases() -> list[CompileCase]:
    """The one block shape."""
    block = {"CHUNK": CHUNK, "BC": _BLOCK_CHANNELS}
    return [
        compile_case(_merge_tiles_kernel, block),
        compile_case(_merge_sums_kernel, block, num_warps=4),
    ]

"""Mean and squared distances of columns inside a kernel: Welford's update, Chan's merge, both in a fixed order.

Sums of squares would lose a variance beside a large mean; these do not. Chan, Golub and LeVeque 1979.
"""

from __future__ import annotations

from ._triton import jit, tl


@jit
def row_statistics(x, start, end, col, C, BM: tl.constexpr, BC: tl.constexpr):
    """Of rows start to end: Welford's update in each of BM lanes, then the lanes merged."""
    lane = tl.arange(0, BM)
    mean = tl.zeros((BM, BC), tl.float32)
    m2 = tl.zeros((BM, BC), tl.float32)
    number = 0.0
    for first in range(start, end, BM):
        row = first + lane
        ok = (row < end)[:, None] & (col < C)[None, :]
        v = tl.load(x + row.to(tl.int64)[:, None] * C + col[None, :], mask=ok, other=0.0).to(tl.float32)
        number += 1.0
        delta = tl.where(ok, v - mean, 0.0)
        mean += delta * (1.0 / number)
        m2 += delta * (v - mean)
    count = (end - start - lane + (BM - 1)) // BM
    return merged(mean, m2, count.to(tl.float32))


@jit
def merged_tiles(tile_mean, tile_m2, group, rows, tiles, tile_rows, col, C, BC: tl.constexpr):
    """Chan's update over the tiles in each of LANES lanes, then the lanes merged."""
    LANES: tl.constexpr = 32
    lane = tl.arange(0, LANES)
    mean = tl.zeros((LANES, BC), tl.float32)
    m2 = tl.zeros((LANES, BC), tl.float32)
    count = tl.zeros((LANES,), tl.float32)
    for first in range(0, tiles, LANES):
        tile = first + lane
        ok = (tile < tiles)[:, None] & (col < C)[None, :]
        at = (group * tiles + tile)[:, None] * C + col[None, :]
        size = tl.where(tile < tiles, tl.minimum(rows - tile * tile_rows, tile_rows), 0).to(tl.float32)
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

"""Matrices of rows, which norm_act and bias_act work on, and how their launches cut them up.

A channels-last [N, C, H, W] tensor is seen as [N * H * W, C], row stride >= C, so that an output may be one half of the
concatenation buffer. A statistics group is a run of rows that share mean and variance: all rows (batch norm,
groups = 1), one image (groups = N), or one of the joined discriminator's halves (groups = 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import jit, tl
from .dispatch import CompileCase

EPS = 1e-5  # of every normalisation


class Output(NamedTuple):
    """One activated output, or in backward its gradient."""

    rows: Tensor  # [M, C] compute dtype, row stride >= C
    activation: str  # a name of ACTIVATIONS


class Statistics(NamedTuple):
    """What backward needs to normalise again."""

    mean: Tensor  # [groups, C] fp32
    rstd: Tensor  # [groups, C] fp32


class Running(NamedTuple):
    """Running statistics of a batch norm, updated once per group, in the order of the groups."""

    mean: Tensor  # [C] fp32
    var: Tensor  # [C] fp32, unbiased
    batches: Tensor  # [] int64
    momentum: float = 0.1


class Tiles(NamedTuple):
    """Mean and squared distances of runs of rows, as a convolution leaves them behind: the statistics pass, saved.

    A group's rows come in `parts` equal parts (the four parities of a transposed convolution, whose rows lie
    interleaved in memory), each cut into tiles of `rows` rows; the last tile of a part has what is left.
    """

    mean: Tensor  # [groups, tiles, C] fp32
    m2: Tensor  # [groups, tiles, C] fp32: sum of squared distances from the tile's mean
    rows: int
    parts: int = 1

    def cut(self, rows: int) -> tuple[int, int, int]:
        """(tiles of a part, rows of a part, rows of a tile) where a group has `rows` rows."""
        return _ceil_div(rows // self.parts, self.rows), rows // self.parts, self.rows

    def errors(self, groups: int, rows: int, channels: int) -> list[str]:
        """Why these are not the tiles of `groups` groups of `rows` rows."""
        found, expected = tuple(self.mean.shape), (groups, self.parts * self.cut(rows)[0], channels)
        if rows % self.parts == 0 and found == tuple(self.m2.shape) == expected:
            return []
        what = f"{rows} rows in {self.parts} parts of tiles of {self.rows}"
        return [f"tiles {found} and {tuple(self.m2.shape)}; {list(expected)} needed for groups of {what}"]


class Sums(NamedTuple):
    """Sums over runs of rows that norm_act_backward needs: of dz and of dz * xhat, dz what arrives at the norm.

    (xhat is the normalised input; how many rows a tile has does not matter.)
    """

    dz: Tensor  # [groups, tiles, C] fp32
    dzx: Tensor  # [groups, tiles, C] fp32


class Plan(NamedTuple):
    """How a launch over [groups * rows, C] is cut: one program per tile of rows, block of channels and group."""

    block_rows: int  # rows in registers at a time, a power of two
    block_channels: int  # a power of two
    tile_rows: int  # rows of one program
    tiles: int  # per group
    warps: int
    grid: tuple[int, int, int]  # channel blocks first: neighbours in memory run together


_BLOCK = 4096  # elements in registers: 16 per thread of 8 warps
_PROGRAMS = 528  # 4 for each multiprocessor of an H100 keep enough loads in flight
_MAX_TILES = 256  # per group: every program of the second pass reads the sums of all of them
_TWICE = 2048  # rows of partial sums that a program reads twice sooner than waiting for a second launch


@lru_cache
def launch_plan(rows: int, channels: int, groups: int, splits: int = 1) -> Plan:
    """The plan for `groups` groups of `rows` rows, each the sum of `splits` partial sums.

    One tile per group (statistics and result in one launch) where the group is small or the other groups and channels
    keep the device busy. Rows that are yet to be summed are few, and much is read for each: narrow blocks of channels
    (a sector of memory at least) make more programs of them.
    """
    block_channels = min(32, max(4, _next_power_of_2(channels)))
    while splits > 1 and block_channels > 8 and _ceil_div(channels, block_channels) * groups < _PROGRAMS // 4:
        block_channels //= 2
    block = _BLOCK if splits == 1 else _BLOCK // 4  # several parts are loaded at a time
    block_rows = min(block // block_channels, _next_power_of_2(rows))
    columns = _ceil_div(channels, block_channels)
    # not one more than there is room for: a last wave of a few programs takes as long as a full one
    tiles = min(_MAX_TILES, max(1, _PROGRAMS // (columns * groups)), _ceil_div(rows, block_rows))
    tile_rows = _ceil_div(_ceil_div(rows, tiles), block_rows) * block_rows
    # a second launch costs more than reading that little twice
    if rows <= 2 * block_rows if splits == 1 else rows * splits <= _TWICE:
        tile_rows = rows
    tiles = _ceil_div(rows, tile_rows)
    warps = min(8, max(1, block_rows * block_channels // 128))
    return Plan(block_rows, block_channels, tile_rows, tiles, warps, (columns, tiles, groups))


def not_supported_reasons(
    x: Tensor,
    like_x: Sequence[Tensor],
    vectors: Sequence[Tensor | None] = (),
    outputs: int = 1,
    fp32: Sequence[Tensor] = (),
) -> list[str]:
    """Why the Triton kernels cannot take these arguments (shapes and dtypes only, no device is asked).

    `like_x`: outputs or gradients; `vectors`: parameters per channel; `outputs`: how many outputs the op has; `fp32`:
    partial sums, tiles or sums of tiles.
    """
    reasons = []
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"x is {x.dtype}; allowed are float32, float16, bfloat16")
    if x.ndim != 2 or not x.is_contiguous():
        reasons.append(f"x {tuple(x.shape)} with strides {x.stride()}; contiguous rows [M, C] are needed")
        return reasons
    if not 1 <= outputs <= 2:
        reasons.append(f"{outputs} outputs; one or two are allowed")
    for rows in like_x:
        if rows.shape != x.shape or (rows.stride(1) != 1 < rows.shape[1]) or rows.dtype != x.dtype:
            reasons.append(
                f"an output is {tuple(rows.shape)} {rows.dtype} with strides {rows.stride()}; rows like x needed"
            )
    return reasons + vector_reasons(vectors, x.shape[1]) + fp32_reasons(fp32)


def vector_reasons(vectors: Sequence[Tensor | None], channels: int) -> list[str]:
    """Why a kernel cannot read or write these parameters as they are."""
    return [
        f"a parameter is {tuple(v.shape)} with strides {v.stride()}; {channels} contiguous values needed"
        for v in vectors
        if v is not None and (tuple(v.shape) != (channels,) or not v.is_contiguous())
    ]


def fp32_reasons(given: Sequence[Tensor]) -> list[str]:
    """Why a kernel cannot read these [splits, M, C] or [groups, tiles, C] as they are."""
    return [
        f"partial sums or tiles {tuple(t.shape)} are {t.dtype} with strides {t.stride()}; contiguous float32 needed"
        for t in given
        if t.dtype != torch.float32 or not t.is_contiguous()
    ]


def check_partials(op: str, partials: Tensor | None, x: Tensor) -> None:
    """ValueError unless x can be the sum of `partials`."""
    if partials is not None and (partials.ndim != 3 or partials.shape[1:] != x.shape or len(partials) < 1):
        needed = f"[splits, {', '.join(map(str, x.shape))}]"
        raise ValueError(f"{op}: partial sums {tuple(partials.shape)} for x {tuple(x.shape)}; {needed} needed")


def row_bytes(x: Tensor, matrices: int, vectors: int = 0) -> int:
    """Bytes of `matrices` arrays like x and `vectors` fp32 arrays of its channels."""
    return matrices * x.numel() * x.element_size() + vectors * x.shape[1] * 4


_HALF = ("x", "y1", "y2", "g1", "g2", "dx", "dgamma", "dbeta", "dbias")
_VECTORS = ("gamma", "beta", "bias", "mean", "rstd", "mean_out", "rstd_out", "scale_out", "shift_out")
_SUMS = ("partials", "tile_mean", "tile_m2", "tile_dz", "tile_dzx", "sums", "into_1", "into_2")
_TYPES = (
    dict.fromkeys(_HALF, "*bf16")
    | dict.fromkeys((*_VECTORS, *_SUMS, "running_mean", "running_var"), "*fp32")
    | dict.fromkeys(("counters", "batches"), "*i64")
    | dict.fromkeys(("momentum", "eps"), "fp32")
    | dict.fromkeys(("C", "size", "ld", "ld1", "ld2"), "i32:16")
)


def compile_case(kernel: Any, constexprs: dict[str, Any], num_warps: int = 8, **types: str) -> CompileCase:
    """A CompileCase of a kernel on bf16 rows of 16 n channels; `types` replaces types by name."""
    names = [name for name in kernel.arg_names if name not in constexprs]
    return CompileCase(kernel, {name: (_TYPES | types).get(name, "i32") for name in names}, constexprs, num_warps)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@jit
def raw_rows(
    raw,  # x [M, C]; partials [splits, M, C] fp32 whose sum x is to be, or None; splits; size = M * C
    row,  # [BM, 1] int64
    col,  # [BC] int32
    ok,  # [BM, BC]
    C,
    WRITE: tl.constexpr,  # the sum to x
):  # [BM, BC] fp32, 0 where not ok
    """A block of x. Partial sums are added in their order and rounded to x's dtype."""
    x, partials, splits, size = raw
    at = row * C + col[None, :]
    if partials is None:
        value = tl.load(x + at, mask=ok, other=0.0)
    else:
        total = tl.zeros(ok.shape, tl.float32)
        for _ in tl.range(0, splits, loop_unroll_factor=8):  # so many loads in flight
            total += tl.load(partials + at, mask=ok, other=0.0)
            partials += size
        value = total.to(x.dtype.element_ty)
        if WRITE:
            tl.store(x + at, value, mask=ok)
    return value.to(tl.float32)


@jit
def sum_tiles(
    partial,  # [tiles, C] fp32
    tiles,
    col,  # [BC] int32
    C,
    BC: tl.constexpr,
):  # [BC] fp32
    """Sum over tiles in a fixed order."""
    LANES: tl.constexpr = 32
    total = tl.zeros((LANES, BC), tl.float32)
    for first in range(0, tiles, LANES):
        tile = first + tl.arange(0, LANES)
        ok = (tile < tiles)[:, None] & (col < C)[None, :]
        total += tl.load(partial + tile[:, None] * C + col[None, :], mask=ok, other=0.0)
    return tl.sum(total, 0)


@jit
def store_total(
    into,  # [C] float, written
    total,  # [BC] fp32
    col,  # [BC] int32
    C,
    ACCUMULATE: tl.constexpr,
):
    """Write or add the gradient of a parameter."""
    if ACCUMULATE:
        total += tl.load(into + col, mask=col < C, other=0.0).to(tl.float32)
    tl.store(into + col, total.to(into.dtype.element_ty), mask=col < C)

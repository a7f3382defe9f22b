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


class Output(NamedTuple):
    """One activated output, or in backward its gradient."""

    rows: Tensor  # [M, C] compute dtype, row stride >= C
    activation: str  # a name of ACTIVATIONS


class Statistics(NamedTuple):
    """What backward needs to normalise again."""

    mean: Tensor  # [groups, C] fp32
    rstd: Tensor  # [groups, C] fp32


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


@lru_cache
def launch_plan(rows: int, channels: int, groups: int) -> Plan:
    """The plan for `groups` groups of `rows` rows.

    One tile per group (statistics and result in one launch) where the group is small or the other groups and channels
    keep the device busy.
    """
    block_channels = min(32, max(4, _next_power_of_2(channels)))
    block_rows = min(_BLOCK // block_channels, _next_power_of_2(rows))
    columns = _ceil_div(channels, block_channels)
    tiles = min(_MAX_TILES, _ceil_div(_PROGRAMS, columns * groups), _ceil_div(rows, block_rows))
    tile_rows = _ceil_div(_ceil_div(rows, tiles), block_rows) * block_rows
    if rows <= 2 * block_rows:  # a second launch costs more than reading that little twice
        tile_rows = rows
    tiles = _ceil_div(rows, tile_rows)
    warps = min(8, max(1, block_rows * block_channels // 128))
    return Plan(block_rows, block_channels, tile_rows, tiles, warps, (columns, tiles, groups))


def not_supported_reasons(
    x: Tensor, like_x: Sequence[Tensor], vectors: Sequence[Tensor | None] = (), outputs: int = 1
) -> list[str]:
    """Why the Triton kernels cannot take these arguments (shapes and dtypes only, no device is asked).

    `like_x`: outputs or gradients; `vectors`: parameters per channel; `outputs`: how many outputs the op has.
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
    for vector in vectors:
        if vector is not None and (vector.shape != x.shape[1:] or not vector.is_contiguous()):
            reasons.append(
                f"a parameter is {tuple(vector.shape)} with strides {vector.stride()}; "
                f"{x.shape[1]} contiguous values needed"
            )
    return reasons


def row_bytes(x: Tensor, matrices: int, vectors: int = 0) -> int:
    """Bytes of `matrices` arrays like x and `vectors` fp32 arrays of its channels."""
    return matrices * x.numel() * x.element_size() + vectors * x.shape[1] * 4


_HALF = ("x", "y1", "y2", "g1", "g2", "dx", "dgamma", "dbeta", "dbias")
_VECTORS = ("gamma", "beta", "bias", "mean", "rstd", "mean_out", "rstd_out", "running_mean", "running_var")
_SUMS = ("tile_mean", "tile_m2", "tile_dz", "tile_dzx", "sums")
_TYPES = (
    dict.fromkeys(_HALF, "*bf16")
    | dict.fromkeys(_VECTORS + _SUMS, "*fp32")
    | dict.fromkeys(("counters", "batches"), "*i64")
    | dict.fromkeys(("momentum", "eps"), "fp32")
    | dict.fromkeys(("C", "ld", "ld1", "ld2"), "i32:16")
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

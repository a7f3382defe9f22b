"""The backward pass of norm_act: gradients of the raw convolution output and of the affine parameters.

Nothing of forward is kept but x and its statistics; what the activations saw is computed again. Ioffe and Szegedy 2015,
section 3, summed over both outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import jit, tl
from .activations import ACTIVATIONS, times_derivative
from .dispatch import CompileCase, choose, launch
from .merge import fewer_sums
from .philox import Noise, dropout_mask, dropout_scale
from .rows import (
    Output,
    Statistics,
    Sums,
    compile_case,
    launch_plan,
    not_supported_reasons,
    row_bytes,
    store_total,
    sum_tiles,
)


def norm_act_backward(
    gradients: Sequence[Output],  # of the outputs: rows are dL/d output
    x: Tensor,  # [M, C] as given to norm_act
    gamma: Tensor | None,  # [C] fp32
    beta: Tensor | None,  # [C] fp32
    statistics: Statistics,
    dx: Tensor,  # [M, C] dtype of x, written
    dgamma: Tensor | None,  # [C] any float dtype, written (or added to)
    dbeta: Tensor | None,  # [C]
    *,
    images: int = 1,
    noise: Noise | None = None,
    accumulate: bool = False,  # add to dgamma and dbeta instead of writing them
    sums: Sums | None = None,  # of these gradients, where they have been taken
    impl: str = "auto",
) -> None:
    """dx, dgamma and dbeta from the gradients of both outputs. What is written overlaps nothing that is read."""
    groups, channels = statistics.mean.shape
    if sums is not None and not all(t.ndim == 3 and (len(t), t.shape[2]) == (groups, channels) for t in sums):
        shapes = " and ".join(str(tuple(t.shape)) for t in sums)
        raise ValueError(f"norm_act_backward: sums {shapes}; [{groups}, tiles, {channels}] needed")
    like_x = [*(gradient.rows for gradient in gradients), dx]
    reasons = not_supported_reasons(x, like_x, (gamma, beta, dgamma, dbeta), len(gradients), sums or ())
    rest = gradients, x, gamma, beta, statistics, dx, dgamma, dbeta, images, noise, accumulate, sums
    if choose("norm_act", impl, x, reasons) == "triton":
        _norm_act_backward_triton(*rest)
    else:
        _norm_act_backward_reference(*rest)


def hidden(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, statistics: Statistics, images: int, noise: Noise | None
) -> Tensor:  # [M, C] at least fp32: normalised and dropped, what the activations see
    """The plain computation that forward and backward share."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).view(len(statistics.mean), -1, x.shape[1])
    h = (wide - statistics.mean[:, None]) * statistics.rstd[:, None]
    h = h if gamma is None else h * gamma
    h = (h if beta is None else h + beta).view(x.shape)
    if noise is not None:
        h = h * 2 * dropout_mask(noise, images, len(x) // images, x.shape[1])
    return h


def _norm_act_backward_reference(
    gradients: Sequence[Output],
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    statistics: Statistics,
    dx: Tensor,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    images: int,
    noise: Noise | None,
    accumulate: bool,
    sums: Sums | None,
) -> None:
    h = hidden(x, gamma, beta, statistics, images, noise)
    dz = sum(g.rows.to(h.dtype) * ACTIVATIONS[g.activation].derivative(h) for g in gradients)
    assert isinstance(dz, Tensor)
    if noise is not None:
        dz = dz * 2 * dropout_mask(noise, images, len(x) // images, x.shape[1])
    dz = dz.view(len(statistics.mean), -1, x.shape[1])
    xhat = hidden(x, None, None, statistics, images, None).view(dz.shape)
    sum_dz, sum_dzx = (t.sum(1) for t in ((dz, dz * xhat) if sums is None else sums))
    for into, total in ((dgamma, sum_dzx.sum(0)), (dbeta, sum_dz.sum(0))):
        if into is not None:
            into.copy_(into + total if accumulate else total)
    mean_dz, mean_dzx = sum_dz[:, None] / dz.shape[1], sum_dzx[:, None] / dz.shape[1]
    scale = statistics.rstd if gamma is None else statistics.rstd * gamma
    dx.copy_(((dz - mean_dz - xhat * mean_dzx) * scale[:, None]).view(x.shape))


def _norm_act_backward_triton(
    gradients: Sequence[Output],
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    statistics: Statistics,
    dx: Tensor,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    images: int,
    noise: Noise | None,
    accumulate: bool,
    sums: Sums | None,
) -> None:
    """One launch where a group is one tile or sums are given, else sums per tile and then everything else."""
    first, second = gradients[0], gradients[1] if len(gradients) == 2 else None
    (total, channels), groups = x.shape, len(statistics.mean)
    rows = total // groups
    plan = launch_plan(rows, channels, groups)
    affine = (gamma is not None) + (beta is not None)
    wanted = (dgamma is not None) + (dbeta is not None)
    inputs = (
        *(x, gamma, beta, *statistics, first.rows, None if second is None else second.rows),
        *((None, 0) if noise is None else noise[:2]),
        *(rows, channels, plan.tile_rows, total // images),
        *(first.rows.stride(0), 0 if second is None else second.rows.stride(0)),
    )
    options = {
        "ACT1": ACTIVATIONS[first.activation].id,
        "ACT2": 0 if second is None else ACTIVATIONS[second.activation].id,
        "PER_IMAGE": noise is None or noise.per_image,
        "BM": plan.block_rows,
        "BC": plan.block_channels,
        "num_warps": plan.warps,
    }
    vectors = affine + 2 * groups
    if sums is not None:
        sums = fewer_sums(sums, math.prod(plan.grid))
    # the program that writes dgamma and dbeta needs every group's sums: it reads two groups, but not many
    elif plan.tiles > 1 or (wanted and groups > 2):
        sums = Sums(*x.new_empty(2, groups, plan.tiles, channels, dtype=torch.float32).unbind())
        launch(
            _norm_act_bwd_sums_kernel,
            plan.grid,
            *(*inputs, *sums, plan.tiles),
            read=row_bytes(x, 1 + len(gradients), vectors),
            written=row_bytes(x, 0, 2 * groups * plan.tiles),
            **options,
        )
    tiles = 0 if sums is None else sums.dz.shape[1]
    written = sum(into.numel() * into.element_size() for into in (dgamma, dbeta) if into is not None)
    launch(
        _norm_act_bwd_kernel,
        plan.grid,
        *(*inputs, *((None, None) if sums is None else sums), tiles),
        *(dx, dx.stride(0), dgamma, dbeta, groups),
        # a lone tile reads x and the gradients twice, the second time from a cache
        read=row_bytes(x, 1 + len(gradients), vectors + 2 * groups * tiles) + written * accumulate,
        written=row_bytes(x, 1) + written,
        ACCUMULATE=accumulate,
        **options,
    )


@jit
def _norm_act_bwd_sums_kernel(
    x,  # [groups * rows, C]
    gamma,  # [C] or None
    beta,  # [C] or None
    mean,  # [groups, C] fp32
    rstd,  # [groups, C] fp32
    g1,  # rows of C with stride ld1
    g2,  # rows of C with stride ld2, or None
    counters,  # [3] int64 or None: no dropout
    block,
    rows,
    C,
    tile_rows,
    positions,
    ld1,
    ld2,
    tile_dz,  # [groups, tiles, C] fp32, written: sums of dz
    tile_dzx,  # [groups, tiles, C] fp32, written: sums of dz * xhat
    tiles,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    tile, group = tl.program_id(1), tl.program_id(2)
    layer = x, gamma, beta, mean, rstd, g1, g2, counters, block, C, positions, ld1, ld2, ACT1, ACT2, PER_IMAGE
    start = group * rows + tile * tile_rows
    sum_dz, sum_dzx = _sums(layer, group, start, tl.minimum(start + tile_rows, (group + 1) * rows), col, BM, BC)
    at = (group * tiles + tile) * C + col
    tl.store(tile_dz + at, sum_dz, mask=col < C)
    tl.store(tile_dzx + at, sum_dzx, mask=col < C)


@jit
def _norm_act_bwd_kernel(
    x,  # as in _norm_act_bwd_sums_kernel
    gamma,
    beta,
    mean,
    rstd,
    g1,
    g2,
    counters,
    block,
    rows,
    C,
    tile_rows,
    positions,
    ld1,
    ld2,
    tile_dz,  # [groups, tiles, C] fp32, or None: this program's rows are its group
    tile_dzx,
    tiles,
    dx,  # rows of C with stride ld, written
    ld,
    dgamma,  # [C] or None, written by the first program of each block of channels
    dbeta,
    groups,
    ACCUMULATE: tl.constexpr,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    tile, group = tl.program_id(1), tl.program_id(2)
    layer = x, gamma, beta, mean, rstd, g1, g2, counters, block, C, positions, ld1, ld2, ACT1, ACT2, PER_IMAGE
    sum_dz, sum_dzx = _group_sums(layer, tile_dz, tile_dzx, group, rows, tiles, col, BM, BC)
    mean_dz, mean_dzx = sum_dz / rows, sum_dzx / rows
    if (dgamma is not None or dbeta is not None) and (tile == 0 and group == 0):
        total_dz, total_dzx = sum_dz, sum_dzx
        for other in range(1, groups):
            more_dz, more_dzx = _group_sums(layer, tile_dz, tile_dzx, other, rows, tiles, col, BM, BC)
            total_dz += more_dz
            total_dzx += more_dzx
        if dgamma is not None:
            store_total(dgamma, total_dzx, col, C, ACCUMULATE)
        if dbeta is not None:
            store_total(dbeta, total_dz, col, C, ACCUMULATE)
    scale = tl.load(rstd + group * C + col, mask=col < C, other=0.0)
    if gamma is not None:
        scale = scale * tl.load(gamma + col, mask=col < C, other=0.0).to(tl.float32)
    start = group * rows + tile * tile_rows
    end = tl.minimum(start + tile_rows, (group + 1) * rows)
    for first in range(start, end, BM):
        row = first + tl.arange(0, BM)
        dz, xhat, ok = _gradient(layer, group, row, end, col)
        d = (dz - mean_dz[None, :] - xhat * mean_dzx[None, :]) * scale[None, :]
        tl.store(dx + row.to(tl.int64)[:, None] * ld + col[None, :], d.to(dx.dtype.element_ty), mask=ok)


@jit
def _group_sums(layer, tile_dz, tile_dzx, group, rows, tiles, col, BM: tl.constexpr, BC: tl.constexpr):
    """Sums [BC] of dz and dz * xhat of a group: over its rows, or over its tiles."""
    if tile_dz is None:
        sum_dz, sum_dzx = _sums(layer, group, group * rows, (group + 1) * rows, col, BM, BC)
    else:
        C = layer[9]
        sum_dz = sum_tiles(tile_dz + group * tiles * C, tiles, col, C, BC)
        sum_dzx = sum_tiles(tile_dzx + group * tiles * C, tiles, col, C, BC)
    return sum_dz, sum_dzx


@jit
def _sums(layer, group, start, end, col, BM: tl.constexpr, BC: tl.constexpr):
    """Sums [BC] of dz and dz * xhat of rows start to end."""
    sum_dz = tl.zeros((BM, BC), tl.float32)
    sum_dzx = tl.zeros((BM, BC), tl.float32)
    for first in range(start, end, BM):
        dz, xhat, _ = _gradient(layer, group, first + tl.arange(0, BM), end, col)
        sum_dz += dz
        sum_dzx += dz * xhat
    return tl.sum(sum_dz, 0), tl.sum(sum_dzx, 0)


@jit
def _gradient(layer, group, row, end, col):
    """dz (0 outside), the normalised x and the mask, all [BM, BC], of a block of rows of one group."""
    x, gamma, beta, mean, rstd, g1, g2, counters, block, C, positions, ld1, ld2, ACT1, ACT2, PER_IMAGE = layer
    inside = col < C
    ok = (row < end)[:, None] & inside[None, :]
    wide = row.to(tl.int64)[:, None]
    center = tl.load(mean + group * C + col, mask=inside, other=0.0)
    xhat = tl.load(x + wide * C + col[None, :], mask=ok, other=0.0).to(tl.float32) - center[None, :]
    xhat = xhat * tl.load(rstd + group * C + col, mask=inside, other=0.0)[None, :]
    h = xhat
    if gamma is not None:
        h = h * tl.load(gamma + col, mask=inside, other=0.0).to(tl.float32)[None, :]
    if beta is not None:
        h = h + tl.load(beta + col, mask=inside, other=0.0).to(tl.float32)[None, :]
    if counters is not None:
        dropout = dropout_scale(counters, block, row, col, positions, C, PER_IMAGE)
        h = h * dropout
    dz = tl.load(g1 + wide * ld1 + col[None, :], mask=ok, other=0.0).to(tl.float32)
    dz = times_derivative(dz, h, ACT1)
    if g2 is not None:
        more = tl.load(g2 + wide * ld2 + col[None, :], mask=ok, other=0.0).to(tl.float32)
        dz += times_derivative(more, h, ACT2)
    if counters is not None:
        dz = dz * dropout
    return dz, xhat, ok


def compile_cases() -> list[CompileCase]:
    """Training's forms: two gradients, sums per tile; d8 with dropout in one launch; the largest lone tile."""
    big = {"BM": 128, "BC": 32, "PER_IMAGE": True}
    two, one = {"ACT1": 1, "ACT2": 2}, {"ACT1": 2, "ACT2": 0, "g2": None}
    write, plain = {"ACCUMULATE": False}, {"counters": None}
    lone = {"tile_dz": None, "tile_dzx": None, **write}
    small = {"BM": 4, "groups": 1, "tiles": 1}
    instance = {"gamma": None, "beta": None, "dgamma": None, "dbeta": None}
    return [
        compile_case(_norm_act_bwd_sums_kernel, {**big, **two, **plain}),
        compile_case(_norm_act_bwd_kernel, {**big, **two, **plain, "ACCUMULATE": True}),
        compile_case(_norm_act_bwd_kernel, {**big, **two, **plain, **instance, **lone}),
        compile_case(_norm_act_bwd_kernel, {**big, **two, **lone}, x="*fp32", g1="*fp32", g2="*fp32", dx="*fp32"),
        compile_case(_norm_act_bwd_kernel, {**big, **one, **lone, **small}, num_warps=1),
    ]

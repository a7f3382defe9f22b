"""What convolutions leave for the normalisation: tiles, sums and partial sums, merged and finished, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpix2pix.kernels import statistics as module
from fastpix2pix.kernels._triton import jit, tl
from fastpix2pix.kernels.bias_act import bias_act
from fastpix2pix.kernels.dispatch import NotSupported, recorded
from fastpix2pix.kernels.finalise import finalise
from fastpix2pix.kernels.merge import CHUNK, fewer_sums, merge_sums, merge_tiles, needs_merge
from fastpix2pix.kernels.norm_act import norm_act, norm_act_backward
from fastpix2pix.kernels.rows import EPS, Output, Running, Statistics, Sums, Tiles
from fastpix2pix.kernels.statistics import merged_tiles, of_tiles
from tests.kernels.common import DEVICE, IMPLEMENTATIONS, interpreter, needs_triton, normal


def tiles_of(x: Tensor, parts: int, tile_rows: int) -> Tiles:
    """Exact tiles, rounded to fp32, of [groups, rows, C], a group's rows in `parts` equal runs."""
    groups, rows, channels = x.shape
    runs = x.double().view(groups, parts, rows // parts, channels)
    cut = [run for part in runs.unbind(1) for run in part.split(tile_rows, 1)]
    mean = torch.stack([run.mean(1) for run in cut], 1)
    m2 = torch.stack([(run - run.mean(1, keepdim=True)).square().sum(1) for run in cut], 1)
    return Tiles(mean.float(), m2.float(), tile_rows, parts)


def near(found: Tensor, exact: Tensor, slack: float = 2**-20) -> None:
    """Up to the rounding of sums in fp32."""
    assert (found.double() - exact).abs().max() <= slack * exact.abs().max() + 1e-30


SHAPES = [  # groups, parts, rows of a group, tile rows, channels, offset, why
    (1, 1, 130, 64, 5, 0.0, "the last tile has two rows"),
    (2, 4, 280, 32, 9, 0.0, "four parities of two groups, the last tile of each part is short"),
    (3, 1, 64, 64, 3, 0.0, "a tile is a group"),
    (1, 1, 16 * 300, 16, 2, 0.0, "more tiles than are read at once"),
    (1, 4, 512, 64, 8, 1e3, "a variance of 1 beside a mean of 1e3"),
    (1, 1, 2, 64, 1, 0.0, "the fewest rows with a variance"),
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("groups", "parts", "rows", "tile", "channels", "offset", "why"), SHAPES)
def test_finalise(groups, parts, rows, tile, channels, offset, why, impl):
    x = normal(groups, rows, channels) + offset
    gamma, beta, mean, var = normal(4, channels, seed=1).unbind()
    running = Running(mean.clone(), var.abs(), torch.tensor(7, device=DEVICE))
    norm = torch.nn.BatchNorm2d(channels).double().to(DEVICE)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var.abs())
    for group in x.double():
        norm(group.T[None, :, :, None])
    found = finalise(tiles_of(x, parts, tile), gamma, beta, rows=rows, running=running, impl=impl)
    var, mean = torch.var_mean(x.double(), 1, correction=0)
    rstd = torch.rsqrt(var + EPS)
    near(found.statistics.mean, mean)
    near(found.statistics.rstd, rstd, 2**-18)
    near(found.scale, gamma * rstd, 2**-18)
    near(found.shift, beta - mean * gamma * rstd, 2**-18)
    near(running.mean, norm.running_mean)
    near(running.var, norm.running_var, 2**-18)
    assert int(running.batches) == 7 + groups


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_finalise_without_parameters(impl):
    x = normal(3, 70, 6)
    found = finalise(tiles_of(x, 1, 64), None, None, rows=70, impl=impl)
    assert torch.equal(found.scale, found.statistics.rstd)
    near(found.shift, -(x.double().mean(1) * torch.rsqrt(x.double().var(1, correction=0) + EPS)), 2**-18)


@needs_triton
def test_many_tiles_take_a_launch_more():
    x = normal(1, 16 * 300, 2)
    for rows, kernels in ((16 * 300, ["_merge_tiles_kernel", "_finalise_kernel"]), (16 * 30, ["_finalise_kernel"])):
        with recorded() as tape:
            finalise(tiles_of(x[:, :rows], 1, 16), None, None, rows=rows, impl="triton")
        assert [entry.kernel for entry in tape] == kernels
    assert needs_merge(257, 1) and not needs_merge(256, 1) and not needs_merge(32, 10**6) and needs_merge(33, 10**6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_merged_tiles_and_sums_are_of_the_same_rows(impl):
    x = normal(2, 2 * 16 * 70 + 10, 5) + 30  # parts of 1125 rows: 71 tiles, the last of 5 rows
    tiles = tiles_of(x, 2, 16)
    merged = merge_tiles(tiles, x.shape[1], impl=impl)
    assert merged.mean.shape == (2, 2 * 2, 5) and (merged.rows, merged.parts) == (CHUNK * 16, 2)
    exact = tiles_of(x, 2, CHUNK * 16)
    near(merged.mean, exact.mean.double())
    near(merged.m2, exact.m2.double())
    mean, m2 = of_tiles(merged, x.shape[1])
    near(mean, x.double().mean(1))
    near(m2, (x - x.double().mean(1, keepdim=True)).square().sum(1))
    sums = Sums(*normal(2, 2, CHUNK + 9, 5, seed=3).unbind())
    for found, given in zip(merge_sums(sums, impl=impl), sums, strict=True):
        assert found.shape == (2, 2, 5)
        near(found, torch.stack([given[:, :CHUNK].double().sum(1), given[:, CHUNK:].double().sum(1)], 1))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("groups", "rows", "channels"), [(2, 70, 9), (1, 4, 33), (3, 300, 8)])
def test_norm_act_of_tiles_is_norm_act_of_rows(groups, rows, channels, dtype):
    x = normal(groups * rows, channels).to(dtype)
    gamma, beta, mean, var = normal(4, channels, seed=1).unbind()
    found = []
    for tiles in (None, tiles_of(x.view(groups, rows, -1), 1, 64)):
        running = Running(mean.clone(), var.abs(), torch.tensor(0, device=DEVICE))
        y = [torch.full_like(x, math.nan) for _ in range(2)]
        outputs = [Output(y[0], "leaky"), Output(y[1], "relu")]
        given = norm_act(x, gamma, beta, outputs, groups=groups, running=running, tiles=tiles, impl="triton")
        found.append([*y, *given, *running[:3]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-5)


SPLITS = [  # splits, rows, groups, channels, why
    (4, 4, 1, 40, "d8: one launch"),
    (16, 16, 2, 9, "e6, joined"),
    (3, 700, 1, 8, "two launches: statistics first"),
    (2, 2, 3, 5, "a group per image of two pixels"),
]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("splits", "rows", "groups", "channels", "why"), SPLITS)
def test_partial_sums_are_added_on_the_way(splits, rows, groups, channels, why, dtype):
    """x is their sum, rounded once and written; everything else is of that x."""
    parts = normal(splits, groups * rows, channels)
    exact, vectors = parts.double().sum(0), normal(2, channels, seed=1).unbind()
    for op in ("norm_act", "bias_act"):
        results = []
        for impl in ("triton", "reference"):
            x, y = (torch.full((groups * rows, channels), math.nan, dtype=dtype, device=DEVICE) for _ in range(2))
            if op == "norm_act":
                norm_act(x, *vectors, [Output(y, "relu")], groups=groups, partials=parts, impl=impl)
            else:
                bias_act(x, vectors[0], [Output(y, "tanh")], partials=parts, impl=impl)
            near(x, exact, torch.finfo(dtype).eps)
            results.append(y)
        torch.testing.assert_close(*results, rtol=1e-4 if dtype == torch.float32 else 4e-3, atol=2e-3 * splits**0.5)


@needs_triton
@pytest.mark.parametrize("tiles", [3, 300])
def test_norm_act_backward_of_sums_is_that_of_rows(tiles):
    rows, channels, groups = 600, 6, 2
    x, g = normal(2, groups * rows, channels).unbind()
    gamma, beta = normal(2, channels, seed=1).unbind()
    statistics = Statistics(normal(groups, channels, seed=2), normal(groups, channels, seed=3).abs())
    xhat = (x.view(groups, rows, -1) - statistics.mean[:, None]) * statistics.rstd[:, None]
    dz = g.view(groups, rows, -1) * ((xhat * gamma + beta) > 0)
    sums = Sums(*(torch.stack([c.sum(1) for c in t.tensor_split(tiles, 1)], 1) for t in (dz, dz * xhat)))
    found = []
    for given in (None, sums):
        dx, (dgamma, dbeta) = torch.full_like(x, math.nan), torch.full((2, channels), math.nan, device=DEVICE).unbind()
        with recorded() as tape:
            norm_act_backward(
                [Output(g, "relu")], x, gamma, beta, statistics, dx, dgamma, dbeta, sums=given, impl="triton"
            )
        found.append([dx, dgamma, dbeta])
    kernels = [entry.kernel for entry in tape]
    assert kernels == ["_merge_sums_kernel"] * (tiles > 256) + ["_norm_act_bwd_kernel"]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@jit
def _equal_sizes(given, start, end, col, C, LANES, BC):
    tile_mean, tile_m2, tiles, part_tiles, _, tile_rows = given
    given = tile_mean, tile_m2, tiles, part_tiles, part_tiles * tile_rows, tile_rows  # as if no tile were short
    return merged_tiles(given, start, tl.minimum(end, end), col, C, LANES, BC)


@interpreter
def test_comparison_sees_a_short_tile_that_counts_as_a_whole_one(monkeypatch):
    x = normal(1, 130, 5)
    near(finalise(tiles_of(x, 1, 64), None, None, rows=130, impl="triton").statistics.mean, x.double().mean(1))
    monkeypatch.setattr(module, "merged_tiles", _equal_sizes)
    with pytest.raises(AssertionError):
        near(finalise(tiles_of(x, 1, 64), None, None, rows=130, impl="triton").statistics.mean, x.double().mean(1))


def test_refusals():
    tiles = tiles_of(normal(1, 130, 5), 1, 64)
    with pytest.raises(ValueError, match="a group of 1 rows has no variance"):
        finalise(tiles, None, None, rows=1)
    with pytest.raises(ValueError, match=r"tiles \(1, 3, 5\) .* \[1, 4, 5\] needed for groups of 200 rows"):
        finalise(tiles, None, None, rows=200)
    with pytest.raises(ValueError, match=r"merge_tiles: tiles \(1, 3, 5\)"):
        merge_tiles(tiles, 200)
    for bad in (tiles.mean.double(), tiles.mean.transpose(0, 2).contiguous().transpose(0, 2)):
        if bad.dtype == torch.float64 or not bad.is_contiguous():
            with pytest.raises(NotSupported, match="contiguous float32 needed"):
                finalise(tiles._replace(mean=bad), None, None, rows=130, impl="triton")
    with pytest.raises(NotSupported, match="5 contiguous values needed"):
        finalise(tiles, normal(6), None, rows=130, impl="triton")
    x, parts = normal(8, 5), normal(2, 8, 6)
    with pytest.raises(ValueError, match=r"partial sums \(2, 8, 6\) for x \(8, 5\)"):
        norm_act(x, None, None, [Output(x.clone(), "relu")], partials=parts)
    with pytest.raises(ValueError, match="x that is yet to be summed has no tiles"):
        norm_act(x, None, None, [Output(x.clone(), "relu")], partials=parts[..., :5], tiles=tiles)
    with pytest.raises(ValueError, match=r"sums .* \[1, tiles, 5\] needed"):
        wrong = Sums(normal(2, 3, 5), normal(2, 3, 5))
        one = Statistics(normal(1, 5), normal(1, 5))
        norm_act_backward([Output(x, "relu")], x, None, None, one, x.clone(), None, None, sums=wrong)
    assert fewer_sums(Sums(normal(1, 3, 5), normal(1, 3, 5)), 1).dz.shape == (1, 3, 5)

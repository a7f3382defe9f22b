"""The gather sums against torch's convolutions, written out number by number in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpix2pix.kernels.geometry import Gather, Geometry, Source

GEOMETRIES = [
    Geometry(4, 2, 1),
    Geometry(4, 2, 1, transposed=True),
    Geometry(4, 1, 1),
    Geometry(1, 1, 0),
    Geometry(3, 1, 1),
]


def gathered(
    gather: Gather,
    x: Tensor,  # [H, W, K]
    w: Tensor,  # [d0, d1, k, k]
    height: int,
    width: int,
) -> Tensor:  # [height, width, N]
    """The definition in geometry.py, as loops."""
    y = x.new_zeros(height, width, gather.channels(tuple(w.shape))[1])
    for oh, ow in itertools.product(range(height), range(width)):
        (qh, ph), (qw, pw) = divmod(oh, gather.parities), divmod(ow, gather.parities)
        for th, tw in itertools.product(range(gather.taps), repeat=2):
            ih, iw = (q * gather.step + gather.first + p + t for q, p, t in ((qh, ph, th), (qw, pw, tw)))
            if 0 <= ih < x.shape[0] and 0 <= iw < x.shape[1]:
                tap = w[:, :, gather.k0 - ph + gather.kstep * th, gather.k0 - pw + gather.kstep * tw]
                y[oh, ow] += x[ih, iw] @ (tap if gather.inner_first else tap.T)
    return y


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("size", [(2, 4), (5, 7)], ids=["even", "odd"])
def test_sums_are_torchs_convolutions(geometry, size):
    draws = torch.Generator().manual_seed(3)
    k, options = geometry.kernel, {"stride": geometry.stride, "padding": geometry.padding}
    x = torch.randn(1, 3, *size, generator=draws, dtype=torch.float64, requires_grad=True)
    w = torch.randn(*((3, 2) if geometry.transposed else (2, 3)), k, k, generator=draws, dtype=torch.float64)
    if min(size) + 2 * geometry.padding < k:
        size = (4, 4)
        x = torch.randn(1, 3, *size, generator=draws, dtype=torch.float64, requires_grad=True)
    y = (F.conv_transpose2d if geometry.transposed else F.conv2d)(x, w, **options)
    assert y.shape[2:] == (geometry.output(size[0]), geometry.output(size[1]))
    ours = gathered(geometry.forward(), x.detach()[0].permute(1, 2, 0), w, *y.shape[2:])
    torch.testing.assert_close(ours, y.detach()[0].permute(1, 2, 0))
    g = torch.randn(y.shape, generator=draws, dtype=torch.float64)
    (dx,) = torch.autograd.grad(y, x, g)
    ours = gathered(geometry.dgrad(), g[0].permute(1, 2, 0), w, *size)
    torch.testing.assert_close(ours, dx[0].permute(1, 2, 0))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("direction", ["forward", "dgrad"])
def test_strides_are_those_of_a_channels_last_kernel(geometry, direction):
    gather = getattr(geometry, direction)()
    k = geometry.kernel
    w = torch.arange(5 * 3 * k * k).view(5, 3, k, k).contiguous(memory_format=torch.channels_last)
    memory = w.permute(0, 2, 3, 1).flatten()
    per_tap, per_inner, per_outer = gather.strides(tuple(w.shape))
    for tap, d0, d1 in itertools.product(range(k * k), range(5), range(3)):
        inner, outer = (d0, d1) if gather.inner_first else (d1, d0)
        assert memory[tap * per_tap + inner * per_inner + outer * per_outer] == w[d0, d1, tap // k, tap % k]


@pytest.mark.parametrize(
    ("geometry", "size", "expected", "why"),
    [
        (Geometry(4, 2, 1), 2, [range(1, 3)], "the innermost down-block sees 2x2 pixels through its middle taps"),
        (Geometry(4, 2, 1, True), 1, [range(1, 2), range(1)], "one pixel: one tap of each parity"),
        (Geometry(4, 2, 1), 8, [range(4)], "every tap meets some pixel"),
        (Geometry(4, 1, 1), 3, [range(4)], "2x2 outputs of 3x3 pixels"),
    ],
)
def test_useful_taps(geometry, size, expected, why):
    gather = geometry.forward()
    assert gather.useful_taps(size, geometry.output(size) // gather.parities) == expected


def test_geometries_that_are_no_gather_are_refused():
    assert Geometry(4, 2, 1).not_supported_reasons() == []
    for wrong in (Geometry(3, 2, 1), Geometry(4, 2, 1)._replace(padding=0), Geometry(2, 2, 0, True), Geometry(1, 1, 1)):
        (reason,) = wrong.not_supported_reasons()
        assert "allowed are 4x4 stride 2 padding 1" in reason


def test_value_of_a_source():
    rows = torch.tensor([[1.0, -2.0], [3.0, 4.0]]).half()
    assert Source(rows).value() is rows
    assert Source(rows, "relu").value().tolist() == [[1, 0], [3, 4]]
    scale, shift = torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -5.0]])
    found = Source(rows, "leaky", scale, shift).value()  # a group per row
    assert found.dtype == torch.half
    torch.testing.assert_close(found, torch.tensor([[1.0, -0.2], [6.0, -1.0]]).half())

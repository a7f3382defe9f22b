"""Division by multiplication is division, for every divisor and every row number that a launch may have."""

from __future__ import annotations

import random

import pytest
import torch

from fastpix2pix.kernels._triton import interpreted, jit, tl
from fastpix2pix.kernels.division import over, reciprocal, within

TOP = (1 << 31) - 1
EDGES = sorted({d for k in range(31) for d in ((1 << k) - 1, 1 << k, (1 << k) + 1) if d} | {3, 5, 7, 30, 62, 127, TOP})


def divided(n: int, r: int) -> int:
    """What `over` computes, with Python's numbers."""
    return (2 * n * (r >> 6) >> 32) >> ((r >> 1) & 31)


@pytest.mark.parametrize("d", EDGES)
def test_division_is_exact(d: int) -> None:
    r, random_numbers = reciprocal(d), random.Random(d)
    last = TOP // d * d  # the largest multiple
    numbers = [0, 1, d - 1, d, d + 1, last - 1, last, TOP - 1, TOP]
    numbers += [random_numbers.randrange(TOP) for _ in range(200)]
    numbers += [random_numbers.randrange(1, TOP // d + 1) * d + e for _ in range(200) for e in (-1, 0)]
    for n in (n for n in numbers if 0 <= n <= TOP):
        assert divided(n, r) == n // d, n


def test_a_reciprocal_fits_and_compiles_nothing_anew() -> None:
    for d in EDGES:
        r = reciprocal(d)
        assert 1 << 31 <= r >> 6 < 1 << 32  # 32 bits; and always an int64 to Triton
        assert r % 2 == 1 and r < 1 << 38


@pytest.mark.parametrize("d", [0, -1, 1 << 31])
def test_what_has_no_reciprocal_is_named(d: int) -> None:
    with pytest.raises(ValueError, match=rf"reciprocal of {d}; 1 to 2\^31 - 1"):
        reciprocal(d)


@jit
def _divide_kernel(n, out, inside, r, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(n + at)
    tl.store(out + at, over(x, r))
    tl.store(inside + at, within(x - 5, size).to(tl.int32))


@pytest.mark.skipif(not interpreted, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("d", [1, 2, 3, 30, 31, 256, 65537, TOP])
def test_in_a_kernel(d: int) -> None:
    n = torch.tensor([0, 1, 4, 5, 6, 7, 29, 30, 31, 255, 256, 65536, 65537, TOP - 1, TOP, 12345678], dtype=torch.int32)
    out, inside = torch.empty_like(n), torch.empty_like(n)
    _divide_kernel[(1,)](n, out, inside, reciprocal(d), min(d, 40), BLOCK=16)
    assert torch.equal(out, n // d)
    assert torch.equal(inside.bool(), (n >= 5) & (n - 5 < min(d, 40)))

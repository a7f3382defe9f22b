"""Levels as units, and condition and image side by side: equal to plain torch to the bit."""

import pytest
import torch

from fastpix2pix.data.images import to_unit
from fastpix2pix.kernels._triton import triton
from fastpix2pix.kernels.dispatch import NotSupported, recorded
from fastpix2pix.kernels.levels import BLOCK, side_by_side, units
from tests.kernels.common import DEVICE, DTYPES, IMPLEMENTATIONS

LEVELS = torch.arange(256, dtype=torch.uint8, device=DEVICE)


def levels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).to(DEVICE)


def rounded(x: torch.Tensor, dtype: torch.dtype, impl: str) -> torch.Tensor:
    """x in dtype as a device of that kind makes it: the interpreter cuts bf16 off where hardware rounds."""
    if impl == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        x = (x.view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_level_is_the_unit_of_the_data(impl, dtype):
    assert torch.equal(units(LEVELS, dtype, impl=impl), rounded(to_unit(LEVELS), dtype, impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 3, 32, 32), (3, 1, BLOCK, 1)], ids=str)
def test_memory_format_is_kept(impl, shape):
    x = levels(*shape).to(memory_format=torch.channels_last)
    found = units(x, torch.float16, impl=impl)
    assert found.stride() == x.stride() and torch.equal(found, to_unit(x).half())


def test_units_only_change_their_type():
    x = torch.rand(5, device=DEVICE)
    assert units(x, torch.float32) is x
    assert torch.equal(units(x, torch.bfloat16), x.bfloat16())


ROWS = [(1, 3, 3), (7, 3, 3), (BLOCK, 1, 3), (200, 4, 1), (BLOCK + 1, 3, 3)]  # the last: two programs and a rest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_is", ["levels", "units"])
@pytest.mark.parametrize("conditional", [True, False], ids=["condition", "images alone"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_side_by_side(rows, impl, conditional, target_is, dtype):
    m, before, channels = rows
    condition, fake, target = (to_unit(levels(m, c, seed=c + i)) for i, c in enumerate((before, channels, channels)))
    condition, fake = condition.to(dtype), fake.to(dtype)
    given = levels(m, channels, seed=channels + 2) if target_is == "levels" else target
    wanted = torch.cat((fake, rounded(target, dtype, impl)))
    if conditional:
        wanted = torch.cat((torch.cat((condition, condition)), wanted), 1)
    found = side_by_side(condition if conditional else None, fake, given, impl=impl)
    assert found.is_contiguous() and torch.equal(found, wanted)


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_each_is_one_launch_and_counts_its_bytes():
    x, fake = levels(10, 3), torch.zeros(10, 3, device=DEVICE, dtype=torch.float16)
    with recorded() as tape:
        side_by_side(units(x, torch.float16, impl="triton"), fake, x, impl="triton")
    assert [(t.kernel, t.read, t.written) for t in tape] == [
        ("_units_kernel", 30, 60),
        ("_side_by_side_kernel", 60 + 60 + 30, 240),
    ]


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_refusals_give_every_reason():
    x = levels(4, 3)
    with pytest.raises(NotSupported, match=r"x with strides \(6,\) has gaps; the result is torch.float64"):
        units(x.view(-1)[::6], torch.float64, impl="triton")
    fake = torch.zeros(4, 3, device=DEVICE)
    with pytest.raises(
        NotSupported, match=r"target \(2, 3\) is not shaped like fake \(4, 3\); condition has 4 rows of"
    ):
        side_by_side(fake.half(), fake, x[:2], impl="triton")

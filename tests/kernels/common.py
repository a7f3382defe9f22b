"""What tests of single kernels share."""

import math

import pytest
import torch
from torch import Tensor

from fastpix2pix.kernels._triton import triton
from fastpix2pix.kernels.philox import Noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")
interpreter = pytest.mark.skipif(triton is None or DEVICE != "cpu", reason="replaces parts of a kernel")
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOTH = ("leaky", "relu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def guarded(rows: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN everywhere: a matrix in the right half of a wider one with a row of guard above and below, and all of it."""
    whole = torch.full((rows + 2, 2 * channels + 1), math.nan, dtype=dtype, device=DEVICE)
    return whole[1:-1, channels:-1], whole


def noise(seed: int = 2**35 + 1, per_image: bool = True) -> Noise:
    return Noise(torch.tensor([seed, 4, 9], device=DEVICE), 2, per_image)

"""The interpreter as the tests have it: kernels of kernels are found everywhere, and overflows are seen."""

import pytest
import torch

from fastpix2pix.kernels._triton import interpreted, jit, tl

pytestmark = pytest.mark.skipif(not interpreted, reason="the interpreter's own behaviour")


@jit
def _doubled(x):
    return tl.zeros_like(x) + 2 * x  # of triton.language.standard, which is a module of its own


@jit
def _kernel(out, n):
    tl.store(out, _doubled(n))


def test_functions_within_functions_and_launches_one_after_the_other():
    out = torch.zeros(1, dtype=torch.int32)
    before = tl.load, tl.core.load
    for n in (3, 4):
        _kernel[(1,)](out, n)
        assert out.item() == 2 * n
        assert (tl.load, tl.core.load) == before


def test_an_overflow_is_an_error():
    with pytest.raises(Exception, match="int32 overflow detected"):
        _kernel[(1,)](torch.zeros(1, dtype=torch.int32), 2**30)

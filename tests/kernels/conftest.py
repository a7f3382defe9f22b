"""Single kernels are watched: for what they read or leave unwritten, and for overflows, which takes twice as long."""

from collections.abc import Iterator

import pytest
import torch

from fastpix2pix.kernels._triton import interpreted

if interpreted:
    from tests.interpreter import watch_overflows


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """torch.empty holds NaN: what is read before it is written is seen, and what a kernel forgets to write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def overflows() -> Iterator[None]:
    if interpreted:
        watch_overflows(True)
    yield
    if interpreted:
        watch_overflows(False)

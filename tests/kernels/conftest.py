"""Single kernels are watched for overflows; whole networks of them would take twice as long."""

from collections.abc import Iterator

import pytest

from fastpix2pix.kernels._triton import interpreted


@pytest.fixture(autouse=True)
def overflows() -> Iterator[None]:
    if not interpreted:
        yield
        return
    from tests.interpreter import watch_overflows

    watch_overflows(True)
    yield
    watch_overflows(False)

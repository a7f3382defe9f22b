"""Fixtures and marks shared by the suite."""

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.interpreter import quicken

    quicken()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start what runs in its background without it

ROOT = Path(__file__).resolve().parents[1]
REQUIRE_GPU = os.environ.get("FASTPIX2PIX_REQUIRE_GPU") == "1"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The number of torch's threads is part of what makes training the same bits twice: no test may change it."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before, f"left torch with {after} threads instead of {before}"


@pytest.fixture(scope="session")
def facades() -> Path:
    """The CMP facades as pix2pix has them (left photo, right labels), beside the repository; skips without them."""
    folder = ROOT.parent / "shared" / "data" / "facades"
    if not folder.is_dir():
        pytest.skip(f"no real pairs at {folder}")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or REQUIRE_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_sessionstart(session: pytest.Session) -> None:
    if REQUIRE_GPU and not torch.cuda.is_available():
        pytest.exit("FASTPIX2PIX_REQUIRE_GPU=1, but torch sees no CUDA GPU", returncode=3)

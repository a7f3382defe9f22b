"""Fixtures and marks shared by the suite."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU

ROOT = Path(__file__).resolve().parents[1]
REQUIRE_GPU = os.environ.get("FASTPIX2PIX_REQUIRE_GPU") == "1"


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

"""The extension is there wherever a C++ compiler was; without one its tests skip, unless it was insisted on."""

import importlib.util
import os

import pytest

REQUIRED = os.environ.get("FASTPIX2PIX_REQUIRE_NATIVE") == "1"
if importlib.util.find_spec("fastpix2pix._native") is None:
    if REQUIRED:
        pytest.exit("FASTPIX2PIX_REQUIRE_NATIVE=1, but fastpix2pix._native is not built", returncode=3)
    collect_ignore_glob = [
        "test_pixels*.py",
        "test_frame_runtime*.py",
        "test_interface.py",
        "test_cuda_runtime.py",
        "test_bench_pixels.py",
    ]

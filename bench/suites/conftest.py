"""pytest-benchmark's side of the comparisons: which there are, and on what device.

FASTPIX2PIX_BENCH_DEVICE  auto, cpu, cuda
FASTPIX2PIX_BENCH_ONLY    patterns, one a line: "kernels/*"
FASTPIX2PIX_BENCH_PLANT   "kernels/l1_tanh_loss *=2": ours, made so many times as slow; a test of the gate

With --benchmark-disable, as in `make test`, every way is built and checked on a tiny network and called once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import torch

from bench.comparison import PARTS, all_comparisons
from bench.devices import Setting, bench_setting, facts
from bench.peaks import peaks_of
from bench.roofline import Device
from fastpix2pix.device import resolve_device

DEVICE = os.environ.get("FASTPIX2PIX_BENCH_DEVICE", "auto")
ONLY = os.environ.get("FASTPIX2PIX_BENCH_ONLY", "*").splitlines()
PLANT = os.environ.get("FASTPIX2PIX_BENCH_PLANT", "")


def _setting(config: pytest.Config) -> Setting:
    smoke = config.getoption("benchmark_disable") and not config.getoption("benchmark_enable")
    return bench_setting(resolve_device(DEVICE), "smoke" if smoke else "short")


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comparison" not in metafunc.fixturenames:
        return
    at = _setting(metafunc.config)
    found = [c for c in all_comparisons(at, PARTS) if any(fnmatch(c.what, pattern) for pattern in ONLY)]
    timer = pytest.mark.benchmark(timer=_synchronised if at.device.type == "cuda" else time.perf_counter)
    metafunc.parametrize("comparison", [pytest.param(c, id=c.what, marks=timer) for c in found])


@pytest.fixture(scope="session")
def at(pytestconfig: pytest.Config) -> Iterator[Setting]:
    """Device and size. Timed on one thread on a CPU: a second one waits for whoever else is on its core."""
    at, threads = _setting(pytestconfig), torch.get_num_threads()
    if at.sample_s and at.device.type == "cpu":
        torch.set_num_threads(1)
    yield at
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def peaks(at: Setting) -> Device | None:
    """Of the device, where anything is timed."""
    return peaks_of(at.device, at.sides) if at.sample_s else None


@pytest.fixture
def plant(comparison: Any) -> int:
    """How many times ours does its work."""
    pattern, _, times = PLANT.rpartition("=")
    return int(times) if pattern and fnmatch(comparison.what, pattern) else 1


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["facts"] = facts(resolve_device(DEVICE))

"""Compile the kernels of the checks ahead, in several processes that fill Triton's cache: one alone would need minutes.

python -m bench.precompile cuda 0 8     the first of eight shares; parent: `run`
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import torch

from .devices import ROOT, Setting, setting
from .kernel_cases import DTYPES, Case, cases
from .report import Report, Values

MEMORY_GIB = 4  # that one process may take on the device: a context and one case at batch 16


def run(report: Report, at: Setting) -> None:
    """Start the processes and wait for them, for at most half of the time that the kernels have."""
    if at.device.type == "cuda":
        report.run("kernels", "compiled ahead", lambda: _processes(at, report.left("kernels") / 2))


def share(at: Setting, number: int, of: int) -> list[Case]:
    """Every `of`-th case of the smaller batch sizes: between them they use nearly every kernel."""
    smaller = at.batches[:2]
    every = [case for dtype in DTYPES for batch in smaller for case in cases(at, batch, dtype)]
    return every[number::of]


def _processes(at: Setting, seconds: float) -> Values:
    memory = torch.cuda.get_device_properties(at.device).total_memory >> 30
    count = max(1, min(8, (os.cpu_count() or 1) // 2, memory // MEMORY_GIB // 2))
    command = [sys.executable, "-m", "bench.precompile", str(at.device)]
    end = time.monotonic() + seconds
    started = [
        subprocess.Popen([*command, str(i), str(count)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(count)
    ]
    ended = 0
    for process in started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
            ended += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {"processes": count, "ended in time": ended}


def main(device: str, number: str, of: str) -> None:
    for _, function in share(setting(torch.device(device), False), int(number), int(of)):
        with contextlib.suppress(Exception):  # the check itself, in the parent, will tell
            function()


if __name__ == "__main__":
    main(*sys.argv[1:])

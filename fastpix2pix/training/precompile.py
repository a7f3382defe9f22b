"""Compile the candidates of a step in several processes that fill Triton's cache: one alone would need minutes.

python -m fastpix2pix.training.precompile DEVICE NUMBER OF < config.json     share NUMBER of OF; parent: `compile_ahead`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict

import torch

from ..config import Train, from_record

_MOST = 8
_CONTEXT = 1 << 30  # bytes of GPU memory that a process takes beside its tensors


def compile_ahead(config: Train, device: torch.device, tensors: int, seconds: float) -> None:
    """Start the processes and wait for them, at most `seconds`. `tensors`: bytes of GPU memory that one needs."""
    free, _ = torch.cuda.mem_get_info(device)
    count = min(_MOST, (os.cpu_count() or 1) // 2, free // (tensors + _CONTEXT))
    if count < 2:
        return
    end = time.monotonic() + seconds
    text = json.dumps(asdict(config)).encode()
    started = []
    for number in range(count):
        command = [sys.executable, "-m", __name__, str(device), str(number), str(count)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        process.stdin.write(text)  # less than a pipe holds
        process.stdin.close()
        started.append(process)
    for process in started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(device: str, number: str, of: str) -> None:
    """One share: everything is run once, and what fails is the parent's to find out."""
    from .tune import try_all

    with suppress(Exception):
        try_all(from_record(Train, json.load(sys.stdin)), torch.device(device), int(number), int(of))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Try the candidates of a step in processes of their own: several compile at once, filling Triton's cache, and a kernel
that brings its process down is only found wrong.

python -m fastpix2pix.training.trial_processes DEVICE IMPL < {"config": ..., "names": [...]}    a line around each
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict

import torch

from ..config import Train, from_record
from ..kernels.dispatch import current
from ..tuning.measure import usable
from ..tuning.verdicts import OUT_OF_MEMORY, ended_from_outside

_MOST = 8
_CONTEXT = 1 << 30  # bytes of GPU memory that a process takes beside its tensors
_PEAK = 2  # times the sites' memory: a check takes at most two thirds of it more, and libraries want room to work in
_MODULE = __name__  # "__main__" in the process itself
START, VERDICT = "try", "is"


def process_count(device: torch.device) -> int:
    """How many may run at once, asked where this process holds the sites of the step, as each of them will."""
    if device.type != "cuda":
        return 1
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    one = _PEAK * torch.cuda.memory_allocated(device) + _CONTEXT
    return max(1, min(_MOST, (os.cpu_count() or 1) // 2, free // one))


def verdicts(
    config: Train,
    device: torch.device,
    impl: str,
    names: Sequence[str],  # of trials
    processes: int,
    seconds: float,
    command: Sequence[str] | None = None,  # default: this module
) -> dict[str, str]:
    """For each trial that was reached: "" where its numbers are right, else why it may not be used."""
    found: dict[str, str] = {}
    command = command or [sys.executable, "-m", _MODULE, str(device), impl]
    end = time.monotonic() + seconds
    over = threading.Event()
    with ThreadPoolExecutor(processes) as pool:
        shares = [names[number::processes] for number in range(processes)]
        try:
            for future in [pool.submit(_share, command, config, share, end, over, found) for share in shares]:
                future.result()
        finally:  # Ctrl-C, for one: the pool waits for its threads
            over.set()
    return found


def _share(
    command: Sequence[str],
    config: Train,
    names: Sequence[str],
    end: float,  # of the time, as time.monotonic() has it
    over: threading.Event,  # ends it before
    found: dict[str, str],  # added to
) -> None:
    """One process after the other, until every name has its verdict or there is no more time."""

    def watch(process: subprocess.Popen) -> None:
        over.wait(max(0.0, end - time.monotonic()))
        process.kill()

    left = list(names)
    while left and time.monotonic() < end and not over.is_set():
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        threading.Thread(target=watch, args=(process,), daemon=True).start()
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(json.dumps({"config": asdict(config), "names": left}).encode())
            process.stdin.close()
        trying = None
        for line in process.stdout:
            word, _, rest = line.decode().rstrip("\n").partition(" ")
            if word == START:
                trying = rest
            elif word == VERDICT and trying is not None:
                if rest != OUT_OF_MEMORY:
                    found[trying] = rest
                trying = None
        code = process.wait()
        by_itself = not ended_from_outside(code) and time.monotonic() < end and not over.is_set()
        if trying is not None and by_itself:
            found[trying] = f"its process ended with {code}"
        before, left = left, [name for name in left if name not in found]
        if len(left) == len(before):  # it does not even start: the caller tries nothing
            return


def main(name: str, impl: str) -> None:
    """Try what stdin names."""
    from .tune import try_trials

    given, device = json.load(sys.stdin), torch.device(name)
    config = from_record(Train, given["config"])
    with current(device):
        for trial, verdict in try_trials(config, device, impl, given["names"]):
            print(START if verdict is None else VERDICT, trial if verdict is None else verdict, flush=True)
            if verdict and not usable(device):
                sys.exit(1)  # every trial after this one would fail: the next process goes on
            if verdict is not None and device.type == "cuda":
                torch.cuda.empty_cache()  # the processes beside this one have their peaks at other times


if __name__ == "__main__":
    main(*sys.argv[1:])

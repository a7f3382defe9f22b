"""What measuring a way to compute gives: its milliseconds, or in words why it may not be used."""

from __future__ import annotations

import re
import signal

import torch

GAIN = 0.97  # of the other's time, at most: less is not worth another way
OUT_OF_MEMORY = "out of memory"  # which says nothing about what was tried: others take memory too, or the whole GPU
# By Triton, torch and the driver; by torch on a CPU; by cuDNN and cuBLAS; by a GPU that another process has for itself.
_SAID = re.compile("out of memory|can't allocate memory|alloc(ation)?_failed|busy or unavailable", re.IGNORECASE)
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


def one_line(error: Exception) -> str:
    """What was raised, as such words; OUT_OF_MEMORY for whatever says that there was none."""
    if out_of_memory(error):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def out_of_memory(error: Exception) -> bool:
    """Whether there was no memory, or no GPU to be had. Of these errors only one has a type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _SAID.search(str(error)) is not None


def ended_from_outside(code: int) -> bool:
    """Whether a process was ended by a user or by the system, short of memory: no kernel does that."""
    return code in _FROM_OUTSIDE


def clearly_faster(own: float | str | None, other: float | str | None) -> bool:
    """Whether both were timed, and `own` takes less time by more than a trifle."""
    return isinstance(own, float) and isinstance(other, float) and own <= GAIN * other

"""OpenMP's threads, of which torch on a CPU keeps a team for every thread that computes."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_MAPS = Path("/proc/self/maps")  # Linux
_GNU = re.compile(r"/\S*/libgomp[^/\s]*\.so\S*")
_SOFT = 1  # omp_pause_soft (OpenMP 5.0, 3.2.44): threads end, settings stay


def release_team() -> None:
    """End the idle team of the calling thread; its next parallel operation makes a new one.

    For a thread that hands computing over to another: where all teams together have more threads than the machine has
    cores, GNU's OpenMP lets none of them spin, and every operation waits until its threads are woken.
    """
    if not _MAPS.exists():
        return
    for path in set(_GNU.findall(_MAPS.read_text())):
        pause = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)  # since GCC 9
        if pause is not None:
            pause(_SOFT)

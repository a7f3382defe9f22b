"""OpenMP's threads, of which torch on a CPU keeps a team for every thread that computes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

_MAPS = Path("/proc/self/maps")  # Linux
_GNU = re.compile(r"/\S*/libgomp[^/\s]*\.so\S*")
_SOFT = 1  # omp_pause_soft (OpenMP 5.0, 3.2.44): threads end, settings stay


def release_team() -> None:
    """End the idle team of the calling thread; its next parallel operation makes a new one.

    For a thread that hands computing over to others. GNU's OpenMP lets a team spin for milliseconds after its work,
    which takes cores from who works now; and where all teams together have more threads than there are cores, it lets
    none spin, so that every operation waits until its threads are woken.
    """
    for pause in _pauses():
        pause(_SOFT)


@cache
def _pauses() -> list[Callable[[int], int]]:
    """omp_pause_resource_all of every GNU OpenMP in this process, of GCC 9 or newer; torch's was loaded with torch."""
    loaded = set(_GNU.findall(_MAPS.read_text())) if _MAPS.exists() else ()
    found = (getattr(ctypes.CDLL(path), "omp_pause_resource_all", None) for path in loaded)
    return [pause for pause in found if pause]

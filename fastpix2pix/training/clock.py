"""Where the wall time of a training loop goes: waiting for data, stepping, or neither."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Lap(NamedTuple):
    """Since the last lap, without the time spent away."""

    steps: int
    seconds: float
    loading: float  # seconds of them spent waiting for the loader


class Clock:
    """Laps of a loop; one `loading()` per step, `away()` around what is neither loading nor stepping."""

    def __init__(self) -> None:
        self._restart()

    @contextmanager
    def loading(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._loading += time.perf_counter() - began
        self._steps += 1

    @contextmanager
    def away(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._away += time.perf_counter() - began

    def lap(self) -> Lap:
        """The figures since the last lap; starts a new one."""
        found = Lap(self._steps, time.perf_counter() - self._began - self._away, self._loading)
        self._restart()
        return found

    def _restart(self) -> None:
        self._began, self._loading, self._away, self._steps = time.perf_counter(), 0.0, 0.0, 0

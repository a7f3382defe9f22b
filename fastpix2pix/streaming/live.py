"""Real time: when a picture is due by its source's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction

_JUMP = 1.0  # seconds by which timestamps may run away from the clock before they count as a new beginning
_PERIODS = 2  # that a picture may be late


class Clock:
    """The source's timestamps against the time of day.

    A source that gives its pictures when they come sets the clock by them: the earliest arrival counts, so that jitter
    of a network makes none of them late. A file is read at its own speed.
    """

    def __init__(self, time_base: Fraction, rate: Fraction, live: bool) -> None:
        self._time_base, self._live = float(time_base), live
        self._allowance = _PERIODS / float(rate)
        self._start: float | None = None  # of timestamp 0

    def wait(self, pts: int, stop: Callable[[], bool]) -> None:
        """Of a file: until the picture is due."""
        now, stamp = time.monotonic(), pts * self._time_base
        late = 0.0 if self._start is None else now - stamp - self._start  # negative: early
        if self._start is None or late > _JUMP or (self._live and late < -_JUMP):
            self._start = now - stamp
        if self._live:
            self._start = min(self._start, now - stamp)
            return
        while (left := self._start + stamp - time.monotonic()) > 0 and not stop():
            time.sleep(min(left, 0.1))

    def deadline(self, pts: int) -> float:
        """Seconds from now until which the picture is of use, at least 0."""
        assert self._start is not None
        return max(0.0, self._start + pts * self._time_base + self._allowance - time.monotonic())

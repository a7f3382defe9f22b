"""Real time: when a picture is due by its source's clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from fractions import Fraction

_JUMP = 1.0  # seconds by which timestamps may run away from the clock before they count as a new beginning
_PERIODS = 2  # that a picture may be late
_WINDOW = 10.0  # seconds in which the earliest arrival counts
_SETTLED = 1.0  # seconds in which every picture is late: they are not, the delay is another


class Clock:
    """The source's timestamps against the time of day.

    A source that gives its pictures when they come sets the clock by them (Arrivals). A file is read at its own speed.
    """

    def __init__(self, time_base: Fraction, rate: Fraction, live: bool) -> None:
        self._time_base, self._live = float(time_base), live
        self._allowance = _PERIODS / float(rate)
        self.begin_anew()

    def begin_anew(self) -> None:
        """The next picture is of a new connection."""
        self._start: float | None = None  # of timestamp 0
        self._arrivals = Arrivals(self._allowance)

    def wait(self, pts: int, stop: Callable[[], bool]) -> None:
        """Of a file: until the picture is due."""
        now, stamp = time.monotonic(), pts * self._time_base
        if self._live:
            self._start = self._arrivals(now, stamp)
            return
        if self._start is None or now - stamp - self._start > _JUMP:
            self._start = now - stamp
        while (left := self._start + stamp - time.monotonic()) > 0 and not stop():
            time.sleep(min(left, 0.1))

    def deadline(self, pts: int) -> float:
        """Seconds from now until which the picture is of use, at least 0."""
        assert self._start is not None
        return max(0.0, self._start + pts * self._time_base + self._allowance - time.monotonic())


class Arrivals:
    """When timestamp 0 of a live source was: the earliest arrival of the last seconds counts.

    Jitter of a network makes no picture late then, and a clock that runs slow is followed. So is a delay that rises: at
    once by a jump, else when all pictures were late for a second.
    """

    def __init__(
        self,
        allowance: float,  # seconds that a picture may be late
    ) -> None:
        self._allowance = allowance
        self._lowest: deque[tuple[float, float]] = deque()  # (arrival, start by it), both rising: the first counts
        self._late_since: float | None = None

    def __call__(
        self,
        now: float,  # when a picture comes, seconds
        stamp: float,  # its timestamp, seconds
    ) -> float:
        start = now - stamp
        while self._lowest and self._lowest[-1][1] >= start:
            self._lowest.pop()
        self._lowest.append((now, start))
        late = start - self._lowest[0][1]
        if late < self._allowance:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now
        forgotten = now - _WINDOW
        if late > _JUMP:
            forgotten = now
        elif self._late_since is not None and now - self._late_since >= _SETTLED:
            forgotten, self._late_since = self._late_since, None
        while self._lowest[0][0] < forgotten:
            self._lowest.popleft()
        return self._lowest[0][1]

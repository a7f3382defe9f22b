"""Durations of a stage, counted in buckets: memory does not grow with the length of a stream."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PER_DOUBLING = 16
_SHORTEST = 1e-6  # seconds


class Timing:
    """`with timing(): work`, or `timing.add(seconds)`. One thread writes."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0  # seconds
        self.longest = 0.0
        self._buckets: dict[int, int] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(time.perf_counter() - start)

    def add(self, seconds: float) -> None:
        """One more."""
        bucket = max(0, math.ceil(_PER_DOUBLING * math.log2(max(seconds, _SHORTEST) / _SHORTEST)))
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)

    def quantile(self, q: float) -> float:
        """Seconds; at most 5 % above the true one. 0 where nothing was timed."""
        wanted, seen = math.ceil(q * self.count), 0
        for bucket, count in sorted(self._buckets.items()):
            seen += count
            if seen >= wanted:
                return min(self.longest, _SHORTEST * 2 ** (bucket / _PER_DOUBLING))
        return 0.0

    def as_dict(self) -> dict[str, float]:
        """JSON-ready, in milliseconds, with the sum in seconds."""
        found = {f"p{round(100 * q)}_ms": 1e3 * self.quantile(q) for q in (0.5, 0.95, 0.99)}
        return {"count": self.count, **found, "max_ms": 1e3 * self.longest, "total_s": self.total}

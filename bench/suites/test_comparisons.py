"""Every comparison as a benchmark: ours and the baseline in turns, the ratio beside pytest-benchmark's own figures."""

from __future__ import annotations

from typing import Any

import pytest

from bench.comparison import Comparison, planted, release, rounds_within
from bench.devices import Setting
from bench.report import Skipped
from bench.roofline import Device
from bench.timing import Ratio, Run, calls_for, sample_ms

SECONDS = 5.0  # of timing, about, for a comparison
LEAST = 9  # rounds


def test_comparison(comparison: Comparison, at: Setting, peaks: Device | None, plant: int, benchmark: Any) -> None:
    """What is made has been checked: a way that computes something else fails here, before anything is timed."""
    required = (comparison.ours, comparison.baseline)
    runs: dict[str, Run] = {}
    for name, make in comparison.ways.items():
        if name in comparison.slow or (benchmark.enabled and name not in required):
            continue
        try:
            runs[name] = make()
        except Skipped as reason:
            if name in required:
                pytest.skip(f"{name}: {reason}")
    ours, baseline = planted(runs[comparison.ours], plant), runs[comparison.baseline]
    benchmark.group = comparison.part
    if not benchmark.enabled:
        for name in runs.keys() - {comparison.ours}:
            runs[name]()
        benchmark.pedantic(ours)
    else:
        _time(comparison, at, peaks, ours, baseline, benchmark)
    runs.clear()
    release(at)


def _time(comparison: Comparison, at: Setting, peaks: Device | None, ours: Run, baseline: Run, benchmark: Any) -> None:
    """Rounds of both, the baseline first and last in turns, as setup and teardown of pytest-benchmark's rounds."""
    rounds = max(LEAST, rounds_within([ours, baseline], at, SECONDS))
    calls, their_calls = (calls_for(run, at.device, at.sample_s) for run in (ours, baseline))
    theirs: list[float] = []
    turn = iter(range(2 * rounds))  # one per setup and teardown

    def other() -> None:
        if next(turn) % 4 in (0, 3):  # setup of even rounds, teardown of odd ones
            theirs.append(sample_ms(baseline, their_calls, at.device))

    def several() -> None:
        for _ in range(calls):
            ours()

    benchmark.pedantic(several, setup=other, teardown=other, rounds=rounds)
    mine = [1e3 * seconds / calls for seconds in benchmark.stats.stats.data]
    ratio = Ratio.of(mine, theirs)
    floor = comparison.floor_ms(peaks) if comparison.floor_ms and peaks else None
    benchmark.extra_info.update(
        what=comparison.what, ours=comparison.ours, baseline=comparison.baseline, ratio=ratio._asdict(),
        ours_ms=sorted(mine)[rounds // 2], baseline_ms=sorted(theirs)[rounds // 2], rounds=rounds, floor_ms=floor,
    )  # fmt: skip

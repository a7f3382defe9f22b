"""A comparison: one piece of work, done by this project and by others, proved equal before any of them is timed."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from fastpix2pix.config import BENCH_PARTS

from .devices import Setting
from .report import Mismatch, Skipped, Values
from .roofline import Device
from .timing import Ratio, Run, Timing, interleaved, sample_ms

SECONDS = 5.0  # of timing, about, for a comparison
PARTS = BENCH_PARTS
Make = Callable[[], Run]  # builds one way and proves it right: Mismatch where it is not, Skipped where it cannot be had


@dataclass(frozen=True)
class Comparison:
    """Ways to do the same work; `ours` is held against `baseline`, the others are shown beside them."""

    part: str  # one of PARTS
    name: str
    ways: Mapping[str, Make]
    ours: str
    baseline: str
    images: int = 0  # that one call works on; 0 where it is not a matter of images
    floor_ms: Callable[[Device], float] | None = None  # least time of a call on a device
    slow: frozenset[str] = field(default_factory=frozenset)  # ways that take minutes to build: torch.compile

    @property
    def what(self) -> str:
        """Part and name, as thresholds know it."""
        return f"{self.part}/{self.name}"


def measure(comparison: Comparison, at: Setting, peaks: Device | None, *, slow: bool = True, plant: int = 1) -> Values:
    """One row of a record: {part, name, status, reason, ours, baseline, images, floor_ms, ways}.

    status is "failed" where ours or the baseline computes something else or raises, "skipped" where one of the two
    cannot be had here; another way that fails has its reason in `ways` and stands back. `plant` makes ours
    so many times as slow: a test of whoever reads the row.
    """
    row: Values = {"part": comparison.part, "name": comparison.name, "status": "ok", "reason": ""}
    row |= {"ours": comparison.ours, "baseline": comparison.baseline, "images": comparison.images}
    row["floor_ms"] = comparison.floor_ms(peaks) if comparison.floor_ms and peaks else None
    runs: dict[str, Run] = {}
    ways: dict[str, Values] = {}
    for name, make in comparison.ways.items():
        if name in comparison.slow and not slow:
            ways[name] = {"skipped": "takes minutes to build; --compile includes it"}
            continue
        try:
            runs[name] = planted(make(), plant) if name == comparison.ours else make()
        except Skipped as error:
            ways[name] = {"skipped": str(error)}
        except Exception as error:  # whatever a kernel, a compiler or a driver raises is a result here
            ways[name] = {"failed": _line(error)}
    required = (comparison.ours, comparison.baseline)
    if all(name in runs for name in required):
        ways |= _times(comparison, runs, at)
    runs.clear()
    release(at)
    for status in ("skipped", "failed"):
        if reasons := [f"{name}: {ways[name][status]}" for name in required if status in ways.get(name, {})]:
            row |= {"status": status, "reason": "; ".join(reasons)}
    return row | {
        "ways": {name: ways.get(name, {"skipped": "ours or the baseline is missing"}) for name in comparison.ways}
    }


def _times(comparison: Comparison, runs: dict[str, Run], at: Setting) -> dict[str, Values]:
    found: dict[str, Values] = {}
    rounds = rounds_within(runs.values(), at, SECONDS)
    times = interleaved(runs, at.device, rounds, at.sample_s)
    base = times[comparison.baseline]
    for name, timing in times.items():
        if not isinstance(timing, Timing):
            found[name] = {"failed": _line(timing)}
            continue
        values: Values = {"ms": timing.median, "quartiles_ms": list(timing.quartiles), "samples": timing.samples}
        values["calls"] = timing.calls
        if comparison.images:
            values["images_per_s"] = comparison.images * 1e3 / timing.median
        if isinstance(base, Timing):
            values["ratio"] = Ratio.of(timing.values, base.values)._asdict()
        found[name] = values
    return found


def rounds_within(runs: Iterable[Run], at: Setting, seconds: float) -> int:
    """Rounds over all of the runs that take about so long: 5 at least, at.rounds at most."""
    one = sum(max(sample_ms(run, 1, at.device) / 1e3, at.sample_s) for run in runs)
    return max(min(5, at.rounds), min(at.rounds, int(seconds / one)))


def planted(run: Run, times: int) -> Run:
    """`run`, so many times as slow."""

    def slowed() -> None:
        for _ in range(times):
            run()

    return slowed


def release(at: Setting) -> None:
    """Give memory back: a captured graph is a cycle, and holds its own pool."""
    gc.collect()
    if at.device.type == "cuda":
        torch.cuda.empty_cache()


def require_close(
    what: str,
    got: Any,  # tensor, or several
    wanted: Any,
    tolerance: float,  # of the largest number of `wanted`
) -> None:
    """Mismatch where a number is off by more than the tolerance, or is not finite."""
    pairs = zip(got, wanted, strict=True) if isinstance(got, list | tuple) else [(got, wanted)]
    for number, (a, b) in enumerate(pairs):
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        if a.shape != b.shape:
            raise Mismatch(f"{what} [{number}]: shape {list(a.shape)}, expected {list(b.shape)}")
        off = float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
        if not off <= tolerance:
            raise Mismatch(f"{what} [{number}]: off by {off:.3g} of the largest value, allowed {tolerance:.3g}")


def _line(error: BaseException) -> str:
    """What was raised and where, in one line."""
    where = traceback.extract_tb(error.__traceback__)
    last = f" ({where[-1].filename.rpartition('/')[2]}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{last}"


def all_comparisons(at: Setting, parts: tuple[str, ...]) -> Iterator[Comparison]:
    """Of the parts asked for, in the order of PARTS; nothing is built before a way is made."""
    for part in parts:
        module = import_module(f".comparisons.{part}", __package__)
        yield from module.comparisons(at)

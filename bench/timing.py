"""Honest times: warmed up, synchronised, rounds interleaved between the competitors, median and spread."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Run = Callable[[], object]
_LOOK = 0.002  # seconds
WARM_UP = 6  # calls before the first timing: more than graph.WARM_UP, so that a graph is captured by then


class Timing(NamedTuple):
    """Milliseconds per call over several samples (two at least) of several calls."""

    median: float
    quartiles: tuple[float, float]
    fastest: float
    samples: int
    calls: int  # per sample
    values: tuple[float, ...] = ()  # of every sample, in the order of the rounds

    @classmethod
    def of(cls, samples: Sequence[float], calls: int) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (low, high), min(samples), len(samples), calls, tuple(samples))


class Ratio(NamedTuple):
    """How long one takes in times of another, of samples taken in turns."""

    median: float
    low: float  # the median's confidence interval
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.99) -> Ratio:
        """Of samples round by round: what disturbs a round disturbs both, and cancels.

        The interval is between two order statistics, which assumes nothing about how times are distributed; of fewer
        than 8 rounds it is all there is, and less than 0.99 sure.
        """
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        n, outside, k = len(ratios), 0.0, 0
        while k < (n - 1) // 2 and outside + math.comb(n, k) / 2**n <= (1 - confidence) / 2:
            outside += math.comb(n, k) / 2**n  # P(at most k of n samples lie below the true median)
            k += 1
        k = max(k - 1, 0)
        return cls(statistics.median(ratios), ratios[k], ratios[n - 1 - k])


def sample_ms(run: Run, calls: int, device: torch.device) -> float:
    """Milliseconds per call: CUDA events around `calls` calls on an idle device; perf_counter on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) * 1e3 / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(calls):
        run()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / calls


def calls_for(run: Run, device: torch.device, sample_s: float) -> int:
    """Calls that fill a sample of `sample_s` seconds."""
    if not sample_s:
        return 1
    return min(500, max(1, math.ceil(sample_s * 1e3 / sample_ms(run, 2, device))))


def settle(most: float = 0.3) -> None:
    """Wait until threads that went on spinning after their work sleep, `most` seconds at most: OpenMP's spin for
    milliseconds, ONNX Runtime's for tens of them, and what runs next would have a core less."""
    end = time.perf_counter() + most
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - before < _LOOK / 4:
            return


def rotating(make: Callable[[], Run], copies: int) -> Run:
    """A run that does the same work on other memory each time: with enough copies no cache holds it."""
    runs = itertools.cycle([make() for _ in range(copies)])
    return lambda: next(runs)()


def interleaved(
    runs: dict[str, Run], device: torch.device, rounds: int, sample_s: float
) -> dict[str, Timing | Exception]:
    """Times of all, one sample of each per round, the order turned round every second time.

    A competitor that raises is out; its exception is its result.
    """
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, Timing | Exception] = {}

    def prepare(name: str) -> None:
        for _ in range(WARM_UP if device.type == "cuda" else 1):
            runs[name]()
        calls[name] = calls_for(runs[name], device, sample_s)

    def sample(name: str) -> None:
        if device.type != "cuda" and sample_s:
            settle()
        if calls[name] > 1:  # untimed, while its own threads wake and the data of the one before leave the cache
            runs[name]()
        samples[name].append(sample_ms(runs[name], calls[name], device))

    order = list(runs)
    for action, names in [(prepare, order), *((sample, order[:: -1 if n % 2 else 1]) for n in range(rounds))]:
        for name in names:
            if name not in found:
                try:
                    action(name)
                except Exception as error:
                    found[name] = error
    return {name: found.get(name) or Timing.of(samples[name], calls[name]) for name in runs}


def device_ms(
    runs: Sequence[Run],  # the same work on different memory, so that no cache holds it
    device: torch.device,
    sample_s: float = 0.02,
    samples: int = 5,
) -> Timing:
    """Time of one of `runs` on the device alone: on a GPU, all are captured in one CUDA graph, so no launch gaps."""
    if device.type != "cuda":
        return Timing.of([sample_ms(run, 1, device) for _ in range(2) for run in runs], 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:  # libraries choose their algorithms
            run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    graph.replay()
    replays = calls_for(graph.replay, device, sample_s)
    times = [sample_ms(graph.replay, replays, device) / len(runs) for _ in range(samples)]
    return Timing.of(times, replays * len(runs))

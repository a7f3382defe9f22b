"""How long a few launches take on a device, alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..capture import capturing
from .verdicts import out_of_memory

_REPEATS = 10  # of the work in one graph
_SAMPLES = 5


def device_ms(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of `run`: the median of some samples.

    On a GPU the cache is overwritten before each repetition, as the rest of a step would, and everything is one CUDA
    graph, so that Python's launches do not count; overwriting alone is measured likewise and taken off.
    """
    if device.type != "cuda":
        run()
        return statistics.median(_elapsed(run) for _ in range(3))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flood = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def flooded() -> None:
        flood.zero_()
        run()

    return max(1e-6, _graph_ms(flooded, device) - _graph_ms(flood.zero_, device))


def step_ms(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of something that fills the cache itself, as one CUDA graph on a GPU."""
    if device.type != "cuda":
        run()
        return statistics.median(_elapsed(run) for _ in range(3))
    return _graph_ms(run, device)


def usable(device: torch.device) -> bool:
    """Whether the process can go on with a device after an error: an illegal access, for one, ends CUDA for all of
    it."""
    if device.type != "cuda":
        return True
    try:
        torch.rand((), device=device)
        torch.cuda.synchronize(device)
    except Exception as error:
        return out_of_memory(error) or not torch.cuda.is_available()
    return True


def _elapsed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _graph_ms(run: Callable[[], object], device: torch.device) -> float:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # libraries choose their algorithms, kernels are compiled
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream):
        for _ in range(_REPEATS):
            run()
    graph.replay()
    samples = []
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(_SAMPLES):
        torch.cuda.synchronize(device)
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize(device)
        samples.append(first.elapsed_time(last) / _REPEATS)
    return statistics.median(samples)

"""CUDA graphs, recorded one after the other; torch is put right where a recording breaks off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_lock = threading.RLock()
_depth = 0  # of `recording`, with the lock held
_unused: list[object] = []  # memory to be let go of when nothing is recorded


@contextmanager
def recording() -> Iterator[None]:
    """Keeps other threads from recording: before it records, torch waits for the whole device, which breaks what others
    record. The frame runtime, whose captures are its own, asks for it by name."""
    global _depth
    with _lock:
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            _let_go()


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph,
    stream: torch.cuda.Stream,
    pool: Any = None,  # torch.cuda.graph_pool_handle() of graphs that run one after the other
) -> Iterator[None]:
    """Record what the block starts into a graph, on a stream that is not the default one.

    Other threads (loaders, decoders) may call CUDA meanwhile; if they record too, they wait. Where the recording breaks
    off, which raises RuntimeError, the current stream is what it was, and memory and random numbers can be used as
    before: torch leaves its own stream, an allocator that takes back no memory that another stream has used, and a
    generator that refuses (pytorch/pytorch#180395).
    """
    pool = pool or torch.cuda.graph_pool_handle()
    here = torch.cuda.stream(torch.cuda.current_stream(stream.device))
    with recording():
        try:
            with here, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            _put_right(stream.device, pool)
            raise


def let_go_later(memory: list[object]) -> None:
    """Empty the list, but not while a graph is recorded: torch ends the process where a MemPool goes meanwhile. Nobody
    else may refer to what it holds."""
    while memory:
        _unused.append(memory.pop())
    _let_go()


def _let_go() -> None:
    if _lock.acquire(blocking=False):
        try:
            if not _depth:
                _unused.clear()
        finally:
            _lock.release()


def _put_right(device: torch.device, pool: tuple[int, int]) -> None:
    """Let torch know that a recording is over whose end was not reached."""
    index: int = device.index
    with suppress(RuntimeError, AttributeError):  # it is not recording any more; or the torch to come has no such call
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    with suppress(RuntimeError):
        random = torch.cuda.default_generators[index]
        offset = random.get_offset()
        try:
            torch.rand((), device=device)
            random.set_offset(offset)
        except RuntimeError:
            random.graphsafe_set_state(random.clone_state())  # which is in no recording

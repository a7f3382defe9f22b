"""CUDA graphs, recorded one after the other; torch is put right where a recording breaks off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_recording = threading.Lock()  # before it records, torch waits for the whole device: that breaks what others record
_unused: list[object] = []  # memory to be let go of when nothing is recorded


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Record what the block starts into a graph, on a stream that is not the default one.

    Other threads (loaders, decoders) may call CUDA meanwhile; if they record too, they wait. Where the recording breaks
    off, which raises RuntimeError, the current stream is what it was, and memory and random numbers can be used as
    before: torch leaves its own stream, an allocator that takes back no memory that another stream has used, and a
    generator that refuses (pytorch/pytorch#180395).
    """
    pool = torch.cuda.graph_pool_handle()
    here = torch.cuda.stream(torch.cuda.current_stream(stream.device))
    try:
        with _recording, here, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        _put_right(stream.device, pool)
        raise
    finally:
        _let_go()


def let_go_later(memory: object) -> None:
    """Hold it while a graph is recorded: torch ends the process where a MemPool goes meanwhile."""
    _unused.append(memory)
    _let_go()


def _let_go() -> None:
    if _recording.acquire(blocking=False):
        try:
            _unused.clear()
        finally:
            _recording.release()


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

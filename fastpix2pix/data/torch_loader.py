"""Batches of jittered pairs through Pillow and torch's DataLoader."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import EnvironmentFailed, Fastpix2pixError
from . import jitter
from .batches import CHUNK, Batch, Feed, nchw
from .pairs import read_pair

AHEAD = 2  # chunks per worker in flight (DataLoader's prefetch_factor)
_SHARED = "/dev/shm"  # where chunks travel on Linux
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Chunks(Dataset):
    """Item (lo, hi) is the positions lo .. hi-1: two uint8 tensors [hi - lo, crop, crop, C], or the error itself."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __getitem__(self, positions: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor] | Fastpix2pixError:
        lo, hi = positions
        feed, load, crop = self.feed, self.feed.data.load, self.feed.data.crop_size
        channels = feed.in_channels, feed.out_channels
        images = [np.empty((hi - lo, crop, crop, c), np.uint8) for c in channels]
        try:
            for i, p in enumerate(range(lo, hi)):
                pair, drawn = feed.item(p)
                both = read_pair(pair, feed.data.direction, *channels)
                for rows, image in zip(images, both, strict=True):
                    rows[i] = jitter.apply(image, drawn, load, crop)
        except Fastpix2pixError as error:  # travels as a value: raised here, it would arrive inside a traceback's text
            return error
        return torch.from_numpy(images[0]), torch.from_numpy(images[1])


def _init_worker(_: int) -> None:
    """A signal sent to the whole process group is the trainer's to handle; it ends its workers itself."""
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _start_workers(loader: DataLoader[Any]) -> Any:
    """The loader's iterator; workers are born with the signals blocked that they ignore once they run."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers(iterator: Any) -> None:
    """Now, and not when the garbage is collected; torch offers no public way."""
    with suppress(RuntimeError):  # torch tells of a worker's death once more, from a signal handler, wherever that is
        iterator._shutdown_workers()
    for worker in iterator._workers:
        worker.kill()  # they ignore torch's SIGTERM, and hold nothing worth keeping
        worker.join()


def _chunk_limit(pair_bytes: int, batch: int, workers: int) -> int:
    """Pairs per chunk such that all chunks in flight fit in half of the free shared memory (64 MB in a container).

    workers: of all processes on this machine.
    """
    if not workers or not os.path.isdir(_SHARED):
        return CHUNK
    free = os.statvfs(_SHARED).f_bavail * os.statvfs(_SHARED).f_frsize
    fits = free // 2 // (pair_bytes * workers * AHEAD)
    if fits < batch:
        raise EnvironmentFailed(
            f"{_SHARED} has {free >> 20} MB free, and {workers} loading workers need "
            f"{2 * batch * pair_bytes * workers * AHEAD >> 20} MB; enlarge it (docker: --shm-size) or lower workers "
            f"(0: none)"
        )
    return min(CHUNK, fits)


def training_batches(feed: Feed) -> Generator[Batch, None, None]:
    """loader.training_batches through Pillow and torch's DataLoader."""
    workers = feed.workers
    pair_bytes = feed.data.crop_size**2 * (feed.in_channels + feed.out_channels)
    limit = _chunk_limit(pair_bytes, feed.batch, workers * feed.here)
    loader: DataLoader[Any] = DataLoader(
        _Chunks(feed),
        sampler=feed.chunks(limit),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=feed.device.type == "cuda",
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # or each loader would draw a number from the global one, and move the dropout
    )
    iterator = _start_workers(loader)
    try:
        while True:
            try:
                chunk = next(iterator)
                if isinstance(chunk, Fastpix2pixError):
                    raise chunk
                # Pinned memory is given back only after the copy: torch's host allocator records the stream.
                ready = Batch(*(nchw(x.to(feed.device, non_blocking=True)) for x in chunk))
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # Torch's word for a dead worker, or a connection to it that broke off; the rest is not ours to explain.
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                raise EnvironmentFailed(f"a loading worker died: {error}; too little memory? lower workers") from error
            yield from feed.slices(ready)
    finally:
        if workers:
            _end_workers(iterator)

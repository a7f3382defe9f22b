"""Batches of jittered pairs: the Pillow + torch loader, and the choice between it and DALI."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..config import Data, Direction
from ..errors import EnvironmentFailed, Fastpix2pixError, InputError
from . import jitter
from .check import default_threads
from .pairs import Pair, read_pair

CHUNK = 32  # pairs that travel together from a worker; sliced into training batches
AHEAD = 2  # chunks per worker in flight (DataLoader's prefetch_factor)
_SHARED = "/dev/shm"  # where chunks travel on Linux


class Batch(NamedTuple):
    """Inputs and targets on the training device, channels-last in memory."""

    input: torch.Tensor  # [N, C, H, W] uint8, NHWC storage
    target: torch.Tensor  # [N, C, H, W] uint8, NHWC storage


def workers_of(data: Data) -> int:
    """The number of workers with its default filled in: cores - 1, between 1 and 8."""
    return default_threads() if data.workers is None else data.workers


def chunks(start: int, stop: int, batch: int, most: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Ranges of positions [lo, hi) for batches start .. stop-1, whole batches each, of about `most` pairs.

    They begin with one batch and double, so that the first step waits for one batch only.
    """
    batches = 1
    while start < stop:
        batches = min(batches, stop - start)
        yield start * batch, (start + batches) * batch
        start += batches
        batches = min(2 * batches, max(most // batch, 1))


def slices(chunk: Batch, batch: int) -> Iterator[Batch]:
    """The training batches of a chunk, as views."""
    for i in range(0, len(chunk.input), batch):
        yield Batch(chunk.input[i : i + batch], chunk.target[i : i + batch])


def nchw(
    x: torch.Tensor,  # [N, H, W, C]
) -> torch.Tensor:
    """The same memory seen as [N, C, H, W] in channels-last format."""
    return x.permute(0, 3, 1, 2)


class _Chunks(Dataset):
    """Item (lo, hi) is the positions lo .. hi-1: two uint8 tensors [hi - lo, crop, crop, C], or the error itself."""

    def __init__(self, pairs: Sequence[Pair], data: Data, in_channels: int, out_channels: int, seed: int) -> None:
        self.pairs, self.data, self.seed = pairs, data, seed
        self.channels = in_channels, out_channels

    def __getitem__(self, positions: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor] | Fastpix2pixError:
        lo, hi = positions
        load, crop = self.data.load, self.data.crop_size
        images = [np.empty((hi - lo, crop, crop, c), np.uint8) for c in self.channels]
        try:
            for i, p in enumerate(range(lo, hi)):
                epoch, index = jitter.item(self.seed, p, len(self.pairs))
                drawn = jitter.draw(self.seed, epoch, index, load, crop, self.data.flip)
                both = read_pair(self.pairs[index], self.data.direction, *self.channels)
                for rows, image in zip(images, both, strict=True):
                    rows[i] = jitter.apply(image, drawn, load, crop)
        except Fastpix2pixError as error:  # travels as a value: raised here, it would arrive inside a traceback's text
            return error
        return torch.from_numpy(images[0]), torch.from_numpy(images[1])


_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    """Pairs per chunk such that all chunks in flight fit in half of the free shared memory (64 MB in a container)."""
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


def _torch_batches(
    pairs: Sequence[Pair],
    data: Data,
    *,
    in_channels: int,
    out_channels: int,
    batch: int,
    seed: int,
    start: int,
    stop: int,
    device: torch.device | str,
) -> Generator[Batch, None, None]:
    """training_batches through Pillow and torch's DataLoader."""
    device, workers = torch.device(device), workers_of(data)
    limit = _chunk_limit(data.crop_size**2 * (in_channels + out_channels), batch, workers)
    loader: DataLoader[Any] = DataLoader(
        _Chunks(pairs, data, in_channels, out_channels, seed),
        sampler=chunks(start, stop, batch, limit),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=device.type == "cuda",
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
                ready = Batch(*(nchw(x.to(device, non_blocking=True)) for x in chunk))
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # Torch's word for a dead worker, or a connection to it that broke off; the rest is not ours to explain.
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                raise EnvironmentFailed(f"a loading worker died: {error}; too little memory? lower workers") from error
            yield from slices(ready, batch)
    finally:
        if workers:
            _end_workers(iterator)


def choose_loader(
    data: Data, pairs: Sequence[Pair], device: torch.device | str, in_channels: int, out_channels: int
) -> tuple[str, str]:
    """("torch" or "dali", why). An explicit "dali" that cannot run raises EnvironmentFailed with all the reasons."""
    if data.loader == "torch":
        return "torch", "asked for"
    on_gpu = torch.device(device).type == "cuda"
    if data.loader == "auto" and not on_gpu:
        return "torch", "on a CPU, Pillow is faster than DALI"
    from . import dali

    reasons = dali.not_supported_reasons(pairs, in_channels, out_channels)
    if not reasons:
        return "dali", "decodes on the GPU" if on_gpu else "asked for"
    if data.loader == "dali":
        raise EnvironmentFailed(f"loader = 'dali' cannot run: {'; '.join(reasons)}. Use loader = 'torch' or 'auto'")
    return "torch", f"not DALI: {'; '.join(reasons)}"


def training_batches(
    pairs: Sequence[Pair],
    data: Data,
    *,
    in_channels: int,
    out_channels: int,
    batch: int,
    seed: int,
    start: int,
    stop: int,
    device: torch.device | str,
) -> Generator[Batch, None, None]:
    """Batches start .. stop-1 of the endless training order; batch k is the positions k*batch .. (k+1)*batch - 1.

    What a batch holds depends on pairs, data, seed and k alone: not on start, on workers or on how files travel.
    data.loader chooses who loads (choose_loader). Close the iterator to end its workers at once. Images that cannot be
    used raise InputError naming the file; a lost worker or too little shared memory raises EnvironmentFailed.
    On a GPU, use a batch on the stream that was current when it was asked for.
    """
    if not pairs:
        raise InputError("there are no pairs to train on")
    name, _ = choose_loader(data, pairs, device, in_channels, out_channels)
    if name == "dali":
        from . import dali

        run = dali.training_batches
    else:
        run = _torch_batches
    yield from run(
        pairs,
        data,
        in_channels=in_channels,
        out_channels=out_channels,
        batch=batch,
        seed=seed,
        start=start,
        stop=stop,
        device=device,
    )


def validation_batches(
    pairs: Sequence[Pair],
    direction: Direction,
    in_channels: int,
    out_channels: int,
    size: int,
    batch: int,
    device: torch.device | str,
) -> Generator[Batch, None, None]:
    """Every pair once, in order, whole images resized to size x size, no flip; the last batch may be smaller."""

    def load(pair: Pair) -> list[np.ndarray]:
        both = read_pair(pair, direction, in_channels, out_channels)
        return [jitter.whole(image, size) for image in both]

    threads = default_threads()
    waiting: deque[Future[list[np.ndarray]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            rest = iter(pairs)
            for i in range(0, len(pairs), batch):
                while len(waiting) < batch + 2 * threads and (pair := next(rest, None)) is not None:
                    waiting.append(pool.submit(load, pair))
                rows = [waiting.popleft().result() for _ in range(min(batch, len(pairs) - i))]
                both = [torch.from_numpy(np.stack(images)) for images in zip(*rows, strict=True)]
                yield Batch(*(nchw(x.to(device)) for x in both))
        finally:
            pool.shutdown(cancel_futures=True)

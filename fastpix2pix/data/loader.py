"""Batches for training, by the loader that fits, and for validation."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from ..config import Data, Direction
from ..errors import EnvironmentFailed, InputError
from . import dali, jitter, torch_loader
from .batches import Batch, Feed, nchw
from .check import default_threads
from .pairs import Pair, read_pair


def choose_loader(
    data: Data, pairs: Sequence[Pair], device: torch.device | str, in_channels: int, out_channels: int
) -> tuple[str, str]:
    """("torch" or "dali", why). An explicit "dali" that cannot run raises EnvironmentFailed with all the reasons."""
    if data.loader == "torch":
        return "torch", "asked for"
    on_gpu = torch.device(device).type == "cuda"
    if data.loader == "auto" and not on_gpu:
        return "torch", "on a CPU, Pillow is faster than DALI"
    reasons = dali.not_supported_reasons(pairs, in_channels, out_channels)
    if not reasons:
        return "dali", "decodes on the GPU" if on_gpu else "asked for"
    if data.loader == "dali":
        raise EnvironmentFailed(f"loader = 'dali' cannot run: {'; '.join(reasons)}. Use loader = 'torch' or 'auto'")
    return "torch", f"not DALI: {'; '.join(reasons)}"


def training_batches(
    feed: Feed,
    name: str | None = None,  # "torch" or "dali", where choose_loader said so: it may open every file
) -> Generator[Batch, None, None]:
    """The batches of a feed.

    What a batch holds depends on pairs, data, seed and its number alone: not on start, on workers or on how files
    travel. data.loader chooses who loads (choose_loader). Close the iterator to end its workers at once. Images that
    cannot be used raise InputError naming the file; a lost worker or too little shared memory raises EnvironmentFailed.
    On a GPU, use a batch on the stream that was current when it was asked for.
    """
    if not feed.pairs:
        raise InputError("there are no pairs to train on")
    if name is None:
        name, _ = choose_loader(feed.data, feed.pairs, feed.device, feed.in_channels, feed.out_channels)
    loader = dali if name == "dali" else torch_loader
    yield from loader.training_batches(feed)


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

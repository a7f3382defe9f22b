"""Training batches per second: the loader here against a plain Pillow dataset in torch's DataLoader, equally many
workers; then the whole loop, loader and step together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastpix2pix.config import Train
from fastpix2pix.data import jitter
from fastpix2pix.data.batches import CHUNK, Feed
from fastpix2pix.data.images import to_unit
from fastpix2pix.data.loader import training_batches
from fastpix2pix.data.pairs import find_pairs
from fastpix2pix.data.synthetic import write_demo_set
from fastpix2pix.training.step import build_state

from ..baselines import PlainPairs, StandardStep
from ..comparison import Comparison, Make, require_close
from ..devices import Setting
from ..timing import Run

OURS, PLAIN = "ours", "PIL DataLoader"
PAIRS = 8  # painted; more files would only be more of the same
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # endless; (x, y) [N, 3, H, W] fp32 in [-1, 1] on the device


def comparisons(at: Setting) -> Iterator[Comparison]:
    """Loading alone, in and beside the process; then training from files."""
    batch = at.batches[-1]
    for workers in (0, 2):
        ways: dict[str, Make] = {
            OURS: partial(_loading, at, batch, workers, _checked_ours),
            PLAIN: partial(_loading, at, batch, workers, _plain),
        }
        yield Comparison("loader", f"batch {batch}, {workers} workers", ways, OURS, PLAIN, images=batch * _calls(batch))
    if at.scale == "short":  # loader and step are in it apart
        return
    ways = {
        OURS: lambda: _training(at, _checked_ours(at, batch, 2), standard=False),
        PLAIN: lambda: _training(at, _plain(at, batch, 2), standard=True),
    }
    yield Comparison("loader", f"training from files, batch {batch}, 2 workers", ways, OURS, PLAIN, images=batch)


@cache
def _folder(size: int) -> tuple[Any, Path]:
    """A painted set, which goes away with the process."""
    scratch = tempfile.TemporaryDirectory(prefix="fastpix2pix-bench-")
    return scratch, write_demo_set(Path(scratch.name) / "pairs", train=PAIRS, val=0, size=size)


def _config(at: Setting, batch: int, workers: int) -> Train:
    return at.config(batch, workers=workers, step="explicit" if at.device.type == "cuda" else "modules")


def _feed(at: Setting, batch: int, workers: int) -> Feed:
    config = _config(at, batch, workers)
    pairs = find_pairs(_folder(config.data.crop_size)[1], "train")
    return Feed(
        pairs=pairs, data=config.data, in_channels=3, out_channels=3, batch=batch, seed=0, start=0, stop=10**6,
        device=at.device,
    )  # fmt: skip


def _ours(at: Setting, batch: int, workers: int) -> Batches:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for both in training_batches(_feed(at, batch, workers)):
            yield to_unit(both.input), to_unit(both.target)

    return batches


def _plain(at: Setting, batch: int, workers: int) -> Batches:
    """The same pairs in the same order with the same jitter, so that the pixels can be compared."""
    feed = _feed(at, batch, workers)
    load, crop = feed.data.load, feed.data.crop_size

    class Endless(torch.utils.data.Sampler):
        def __iter__(self) -> Iterator[int]:
            yield from range(10**6)

    class Positions(PlainPairs):
        """Position p of the endless order, as PlainPairs has its files."""

        def __getitem__(self, p: int) -> tuple[Tensor, Tensor]:
            epoch, i = jitter.item(0, p, len(self.files))
            self.draw = lambda index: jitter.draw(0, epoch, index, load, crop, True)
            return super().__getitem__(i)

    files = [pair.a for pair in feed.pairs if isinstance(pair.a, Path)]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        dataset = Positions(files, load, crop, lambda i: (0, 0, False))
        pinned = at.device.type == "cuda"
        loader = DataLoader(dataset, batch, sampler=Endless(), num_workers=workers, pin_memory=pinned)
        for x, y in loader:
            yield x.to(at.device), y.to(at.device)

    return batches


def _checked_ours(at: Setting, batch: int, workers: int) -> Batches:
    """Where Pillow decodes, the first batches are equal to the plain loader's; DALI's are close (its cubic differs)."""
    ours, plain = _ours(at, batch, 0)(), _plain(at, batch, 0)()
    for _ in range(2):
        require_close("batch", next(ours), next(plain), 1e-6 if at.device.type != "cuda" else 0.05)
    ours.close()  # type: ignore[attr-defined]
    return _ours(at, batch, workers)


def _calls(batch: int) -> int:
    """Batches of one measurement: those of a chunk, which the loader here gives away one by one; one at least."""
    return max(1, CHUNK // batch)


def _loading(at: Setting, batch: int, workers: int, batches: Callable[[Setting, int, int], Batches]) -> Run:
    iterator = batches(at, batch, workers)()

    def run() -> None:
        for _ in range(_calls(batch)):
            next(iterator)

    return run


def _training(at: Setting, batches: Batches, *, standard: bool) -> Run:
    """A step on the next batch from files."""
    config = _config(at, at.batches[-1], 2)
    if standard:
        plain = StandardStep(at.config(config.batch, precision="fp32"), at.device, read=True)
    state = plain if standard else build_state(config, at.device)
    iterator, lr = batches(), config.lr

    def step() -> Tensor:
        return state.step(*next(iterator), 0, lr)

    step()
    return step

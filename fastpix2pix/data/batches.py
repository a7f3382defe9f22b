"""What every loader is given and yields: the feed of training and its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..config import Data
from . import jitter
from .check import default_threads
from .pairs import Pair

CHUNK = 32  # pairs that a loader makes at a time; sliced into training batches


class Batch(NamedTuple):
    """Inputs and targets on the training device, channels-last in memory."""

    input: torch.Tensor  # [N, C, H, W] uint8, NHWC storage
    target: torch.Tensor  # [N, C, H, W] uint8, NHWC storage


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Batches start .. stop-1 of the endless training order; batch k is the positions k*batch .. (k+1)*batch - 1.

    Of several processes, each takes its slice of every batch of processes*batch pairs, and counts its own positions.
    """

    pairs: Sequence[Pair]  # all seen once per epoch; the training order is of their indices
    data: Data  # direction, sizes, flip, workers and loader
    in_channels: int  # of the generator's input: 1, 3 or 4
    out_channels: int  # of the target: 1, 3 or 4
    batch: int  # pairs per batch
    seed: int  # of order and jitter
    start: int  # number of the first batch, from 0
    stop: int  # number after the last batch
    device: torch.device  # where the batches lie
    rank: int = 0  # of this process
    processes: int = 1  # that share every step
    here: int = 1  # of them, those on this machine

    @property
    def workers(self) -> int:
        """The number of workers with its default filled in: cores - 1, between 1 and 8."""
        return default_threads(self.here) if self.data.workers is None else self.data.workers

    def item(self, p: int) -> tuple[Pair, jitter.Jitter]:
        """The pair at this process's position p and its jitter."""
        step, i = divmod(p, self.batch)
        position = (step * self.processes + self.rank) * self.batch + i
        epoch, index = jitter.item(self.seed, position, len(self.pairs))
        drawn = jitter.draw(self.seed, epoch, index, self.data.load, self.data.crop_size, self.data.flip)
        return self.pairs[index], drawn

    def chunks(self, most: int = CHUNK) -> Iterator[tuple[int, int]]:
        """Ranges of positions [lo, hi), whole batches each, of about `most` pairs.

        They begin with one batch and double, so that the first step waits for one batch only.
        """
        start, batches = self.start, 1
        while start < self.stop:
            batches = min(batches, self.stop - start)
            yield start * self.batch, (start + batches) * self.batch
            start += batches
            batches = min(2 * batches, max(most // self.batch, 1))

    def slices(self, chunk: Batch) -> Iterator[Batch]:
        """The training batches of a chunk, as views."""
        for i in range(0, len(chunk.input), self.batch):
            yield Batch(chunk.input[i : i + self.batch], chunk.target[i : i + self.batch])


def nchw(
    x: torch.Tensor,  # [N, H, W, C]
) -> torch.Tensor:
    """The same memory seen as [N, C, H, W] in channels-last format."""
    return x.permute(0, 3, 1, 2)

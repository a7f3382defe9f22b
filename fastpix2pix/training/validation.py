"""Validation in every pair of test-time modes, and the pictures that go with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from ..config import Data, Modes, Noise, NormStats
from ..data.batches import Batch
from ..data.images import to_uint8, to_unit
from ..data.loader import validation_batches
from ..data.pairs import Pair
from ..evaluation import evaluate_network
from ..model import Unet
from .report import grid

METRICS = ("l1", "psnr", "ssim", "match")
_LOWER_IS_BETTER = ("l1",)
_CACHED = 2**28  # bytes of decoded validation images kept in memory between validations
_SAMPLES = 6  # rows of a sample grid


def candidates(net: Unet) -> list[Modes]:
    """The test-time modes that make a difference for this network."""
    stats: list[NormStats] = ["image", "running"] if net.config.norm == "batch" else ["image"]
    noises: list[Noise] = ["off"] if net.config.dropout == "none" else ["off", "random"]
    return [Modes(norm_stats=s, noise=n) for n in noises for s in stats]


class GivenUp(Exception):
    """A validation was told to stop."""


class Validation:
    """The validation pairs of a run, resized to `data.crop_size` and decoded once where they fit into memory."""

    def __init__(self, pairs: Sequence[Pair], data: Data, net: Unet, device: torch.device) -> None:
        self.pairs, self.data, self.device = pairs, data, device
        self.channels = (net.config.in_channels, net.config.out_channels)
        self._decoded: list[Batch] | None = None

    def batches(self, stop: Callable[[], bool] = lambda: False) -> Iterable[Batch]:
        """Batches of (input, target), uint8 [N, C, H, W], anew for each call. GivenUp where `stop` is true."""
        if self._decoded is None:
            fresh = validation_batches(
                self.pairs, self.data.direction, *self.channels, self.data.crop_size, batch=1, device=self.device
            )
            if len(self.pairs) * sum(self.channels) * self.data.crop_size**2 > _CACHED:
                return _until(stop, fresh)
            self._decoded = list(_until(stop, fresh))
        return _until(stop, self._decoded)

    def table(self, net: Unet, stop: Callable[[], bool] = lambda: False) -> dict[str, dict[str, float]]:
        """{"image+off": {"l1": ..., "psnr": ..., "ssim": ..., "match": ...}, ...}; GivenUp as of `batches`."""
        rows = {}
        for modes in candidates(net):
            found = evaluate_network(net, self.batches(stop), modes, self.device)
            rows[str(modes)] = {metric: float(getattr(found, metric)) for metric in METRICS}
        return rows

    def samples(self, net: Unet, modes: Modes) -> np.ndarray:
        """input | output | target of the first pairs: uint8 [H, W, 3]"""
        rows = []
        was_training = net.training
        net.eval()
        with torch.inference_mode():
            for i, batch in zip(range(_SAMPLES), self.batches(), strict=False):
                output = to_uint8(net(to_unit(batch.input), modes, first=i).float())
                rows.append([t[0].permute(1, 2, 0).cpu().numpy() for t in (batch.input, output, batch.target)])
        net.train(was_training)
        return grid(rows)


def _until(stop: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if stop():
            raise GivenUp
        yield batch


def best_modes(table: dict[str, dict[str, float]], metric: str) -> tuple[Modes, float]:
    """The best pair of modes of a `Validation.table` and its value, by one metric; the earlier candidate wins a tie."""
    choose = min if metric in _LOWER_IS_BETTER else max
    chosen = choose(table, key=lambda modes: table[modes][metric])
    norm_stats, noise = chosen.split("+")
    return Modes(norm_stats=norm_stats, noise=noise), table[chosen][metric]  # type: ignore[arg-type]


def better(value: float, than: float | None, metric: str) -> bool:
    """Whether `value` is strictly better than the best so far."""
    if than is None:
        return True
    return value < than if metric in _LOWER_IS_BETTER else value > than

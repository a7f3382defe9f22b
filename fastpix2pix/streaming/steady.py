"""Steadiness in time: smoothing of the output, and how much it flickers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STILL = 2.0  # levels of 255 that a pixel's neighbourhood may change by and still count as standing still
_MOVED = 8.0  # levels by which what is kept of the last output has fallen to 1/e
_WINDOW = 5  # pixels of the neighbourhood


class Steady:
    """output = kept * last output + (1 - kept) * output, with kept = share * exp(-(change of the input / 8)^2).

    The change is the largest of the channels' mean absolute change within 5x5 pixels: what moves is never blurred over
    what it uncovers by more than that window.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        input: Tensor,  # [1, C, H, W] float in [-1, 1]
        output: Tensor,  # [1, C', H, W] float
    ) -> Tensor:
        """The steadied output; call it for one picture after the other."""
        if self._last is not None and self._last[0].shape == input.shape:
            kept = self._share * torch.exp(-((_change(input, self._last[0]) / _MOVED) ** 2)).to(output.device)
            output = output + kept * (self._last[1] - output)
        self._last = input.clone(), output.clone()
        return output


@dataclass(frozen=True)
class FlickerFigures:
    """Means over pairs of consecutive pictures, in levels of 255."""

    flicker: float  # output - input; nan where nothing stands still
    output: float  # mean absolute change of the output, where the input stands still
    input: float  # mean absolute change of the input there
    still: float  # share of the pixels that stand still
    frames: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; what is not known is None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


class Flicker:
    """Adds up what FlickerFigures is of."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None
        self._frames = self._pixels = 0
        self._still = self._input = self._output = 0.0

    def __call__(
        self,
        input: Tensor,  # [1, C, H, W] float in [-1, 1]
        output: Tensor,  # [1, C', H, W] float in [-1, 1]
    ) -> Tensor:
        """Take one more pair; the output comes back as it is."""
        if self._last is not None:
            still = _change(input, self._last[0])[0, 0] < _STILL
            self._pixels += still.numel()
            self._still += float(still.sum())
            self._input += _mean_change(input, self._last[0], still)
            self._output += _mean_change(output.cpu(), self._last[1], still)
        self._last = input.clone(), output.cpu().clone()
        self._frames += 1
        return output

    def figures(self) -> FlickerFigures:
        """Of what was taken so far."""
        n = self._still or math.nan
        output, input = self._output / n, self._input / n
        return FlickerFigures(output - input, output, input, self._still / max(1, self._pixels), self._frames)


def _change(now: Tensor, last: Tensor) -> Tensor:  # [1, 1, H, W] levels
    difference = (now - last).abs().mul_(127.5)
    near = F.avg_pool2d(difference, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)
    return near.amax(dim=1, keepdim=True)


def _mean_change(now: Tensor, last: Tensor, where: Tensor) -> float:
    """Sum over the pixels of `where` of the mean over channels, levels."""
    return float(((now - last).abs().mean(dim=1)[0] * where).sum()) * 127.5

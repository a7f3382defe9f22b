"""The generator as what the frame runtime calls: numpy in, numpy out, one picture at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import Stream as Options
from ..errors import InputError
from ..runtime.engine import Engine, TorchEngine
from ..runtime.translator import Translator
from .steady import Steady
from .timing import Timing
from .together import Together

_LUMA = (0.299, 0.587, 0.114)  # BT.601, as image files become gray
Step = Callable[[Tensor, Tensor], Tensor]  # (input, output) -> output, for one picture after the other


class Batches:
    """An engine with the running number of its pictures, which random noise is drawn from."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._count = engine, 0

    def __call__(
        self,
        batch: Tensor,  # [N, C, H, W] float32 in [-1, 1], on the CPU
    ) -> Tensor:  # on the CPU
        output = self._engine.translate(batch.to(self._engine.device), self._count)
        self._count += len(batch)
        return output.cpu()


class Network:
    """`network(input, output)` for a frame runtime on the CPU; `steps` see [1, C, H, W]."""

    def __init__(self, together: Together, engine: Engine, steps: Sequence[Step] = ()) -> None:
        self.timing, self.layout = Timing(), engine.layout
        self.wait = math.inf  # seconds that a picture may wait for those of other streams
        self._together, self._gray, self._steps = together, engine.in_channels == 1, tuple(steps)
        self._weights = torch.tensor(_LUMA)[:, None, None]

    def __call__(
        self,
        input: NDArray[np.float32],  # in [-1, 1]; [H, W, 3] where layout is nhwc, [3, H, W] where it is nchw
        output: NDArray[np.float32],  # likewise; written
    ) -> None:
        with self.timing():
            self._together(input.shape, partial(self._before, input), partial(self._after, output), self.wait)

    def _before(self, input: NDArray[np.float32]) -> Tensor:
        x = self._chw(torch.from_numpy(input))[None]
        return (x * self._weights).sum(1, keepdim=True) if self._gray else x

    def _after(self, output: NDArray[np.float32], x: Tensor, y: Tensor) -> None:
        for step in self._steps:
            y = step(x, y)
        # one channel goes into all three; by NumPy, because torch's threads would spin on while others work
        np.copyto(self._chw(torch.from_numpy(output)).numpy(), y[0].numpy())

    def _chw(self, picture: Tensor) -> Tensor:
        return picture.permute(2, 0, 1) if self.layout == "nhwc" else picture


def check_channels(engine: Engine) -> None:
    """Refuse models whose pictures no video holds."""
    channels = engine.in_channels, engine.out_channels
    if not set(channels) <= {1, 3}:
        raise InputError(f"the model has {channels[0]} and {channels[1]} channels; videos have 1 (gray) or 3")


def for_video(g: Translator, say: Callable[[str], None]) -> Translator:
    """The model, with fixed noise where random noise was not asked for: it would flicker."""
    if g.modes.noise != "random" or g.modes_source.get("noise") == "given":
        return g
    if not isinstance(g.engine, TorchEngine):
        say("noise random, as recorded: the video will flicker; give --noise fixed, or build the file with it")
        return g
    say(f"noise fixed instead of random ({g.modes_source['noise']}): a video would flicker; --noise random insists")
    engine = copy.copy(g.engine)
    engine.modes = replace(engine.modes, noise="fixed")
    return Translator(engine, {**g.modes_source, "noise": "video"}, g.record)


def steps_of(options: Options) -> list[Step]:
    """What sees every picture after the network."""
    return [Steady(options.steady)] if options.steady else []

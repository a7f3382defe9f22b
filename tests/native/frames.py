"""What the tests of the frame runtime share: a small runtime, its frames, and an engine that waits."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from fastpix2pix.runtime.native import FrameRuntime, InputSpec, OutputSpec

SIZE = (6, 10)


def runtime(engine: Callable[..., Any] | None = None, format: str = "rgb", **options: Any) -> FrameRuntime:
    return FrameRuntime(InputSpec(format, SIZE, SIZE), OutputSpec(format, SIZE, SIZE), engine, **options)


def frame(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def check_sum(r: FrameRuntime) -> dict[str, int]:
    frames = dict(r.stats()["frames"])
    assert frames["submitted"] == sum(count for name, count in frames.items() if name != "submitted")
    return frames  # type: ignore[return-value]


class Gate:
    """An engine that copies, once it is let through."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Semaphore(0), threading.Event()

    def __call__(self, input: Any, output: Any) -> None:
        self.entered.release()
        assert self.opened.wait(30)
        output[:] = input

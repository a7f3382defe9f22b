"""The pixel functions and the frame runtime in C++ on the CPU against NumPy, Pillow and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastpix2pix.data.images import to_uint8
from fastpix2pix.errors import EnvironmentFailed

from ..comparison import Comparison
from ..devices import Setting
from ..report import Mismatch, Skipped
from ..timing import Run

OURS, PLAIN = "native", "torch and Pillow"
LEVELS = 1.01  # of 255: Pillow rounds between resizing and normalising
Frame = NDArray[np.uint8]  # [H, W, 3]
FRAMES = 8  # of a call of the runtime


def comparisons(at: Setting) -> Iterator[Comparison]:
    """A picture into a tensor as it is, resized, and back; then frames through the runtime without an engine."""
    size, large = at.config(1).data.crop_size, (720, 1280)
    same = (size, size)
    yield _input("to tensor", same, same)
    yield _input("resized to tensor", large, same)
    ways = {OURS: lambda: _checked_output(same), PLAIN: lambda: _plain_output(_tensor(same))[0]}
    yield Comparison("frames", f"tensor to rgb {size}x{size}", ways, OURS, PLAIN, images=1)
    ways = {OURS: lambda: _runtime(same), PLAIN: lambda: _loop(same)}
    yield Comparison("frames", f"{FRAMES} frames through the runtime {size}x{size}", ways, OURS, PLAIN, images=FRAMES)


def _input(what: str, frame: tuple[int, int], network: tuple[int, int]) -> Comparison:
    def ours() -> Run:
        run, tensor = _native_input(frame, network)
        plain, wanted = _plain_input(_picture(frame), network)
        run()
        plain()
        _require_levels(127.5 * tensor(), 127.5 * wanted())
        return run

    ways = {OURS: ours, PLAIN: lambda: _plain_input(_picture(frame), network)[0]}
    return Comparison("frames", f"rgb {frame[0]}x{frame[1]} {what}", ways, OURS, PLAIN, images=1)


def _native() -> Any:
    try:
        from fastpix2pix.runtime import native
    except EnvironmentFailed as error:
        raise Skipped(str(error)) from None
    return native


def _picture(size: tuple[int, int], seed: int = 0) -> Frame:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def _tensor(size: tuple[int, int]) -> torch.Tensor:
    picture = torch.from_numpy(_picture(size, 1).copy())
    return picture.permute(2, 0, 1).contiguous().float().div(127.5).sub(1).mul(1.02)  # beyond the range here and there


def _require_levels(got: Any, wanted: Any) -> None:
    off = float(np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64)).max())
    if not off <= LEVELS:
        raise Mismatch(f"off by {off:.3g} of 255, allowed {LEVELS}")


def _native_input(frame: tuple[int, int], network: tuple[int, int]) -> tuple[Run, Callable[[], Any]]:
    native = _native()
    plan = native.InputPlan(native.InputSpec("rgb", frame, network), torch.get_num_threads())
    picture, tensor = np.ascontiguousarray(_picture(frame)), np.empty((3, *network), np.float32)
    return lambda: plan.run(tensor, picture), lambda: tensor


def _plain_input(picture: Frame, network: tuple[int, int]) -> tuple[Run, Callable[[], Any]]:
    last: list[torch.Tensor] = []

    def run() -> None:
        scaled = picture
        if picture.shape[:2] != network:
            scaled = np.array(Image.fromarray(picture).resize(network[::-1], Image.Resampling.BICUBIC))
        last[:] = [torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous().float().div(127.5).sub(1)]

    return run, lambda: last[0].numpy()


def _plain_output(tensor: torch.Tensor) -> tuple[Run, Callable[[], Frame]]:
    last: list[Frame] = []

    def run() -> None:
        last[:] = [np.ascontiguousarray(to_uint8(tensor).permute(1, 2, 0).numpy())]

    return run, lambda: last[0]


def _checked_output(size: tuple[int, int]) -> Run:
    native = _native()
    plan = native.OutputPlan(native.OutputSpec("rgb", size, size), torch.get_num_threads())
    tensor, frame = _tensor(size), np.empty((*size, 3), np.uint8)
    array = tensor.numpy()
    plan.run(frame, array)
    plain, wanted = _plain_output(tensor)
    plain()
    _require_levels(frame, wanted())
    return lambda: plan.run(frame, array)


def _runtime(size: tuple[int, int]) -> Run:
    """Frames in and out, in order; the input is the output."""
    native = _native()
    specs = native.InputSpec("rgb", size, size), native.OutputSpec("rgb", size, size)
    runtime = native.FrameRuntime(*specs, None, slots=4, threads=1)
    pictures = [np.ascontiguousarray(_picture(size, seed)) for seed in range(FRAMES)]
    out = [np.empty((*size, 3), np.uint8) for _ in range(FRAMES)]

    def run() -> None:
        taken = 0
        for number, picture in enumerate(pictures):
            runtime.submit(picture, number)
            if number >= 3:
                runtime.collect(out[taken])
                taken += 1
        while taken < FRAMES:
            runtime.collect(out[taken])
            taken += 1

    run()
    for got, wanted in zip(out, pictures, strict=True):
        _require_levels(got, wanted)
    return run


def _loop(size: tuple[int, int]) -> Run:
    """The same conversions, one frame after the other."""
    pictures = [np.ascontiguousarray(_picture(size, seed)) for seed in range(FRAMES)]

    def run() -> None:
        for picture in pictures:
            plain, tensor = _plain_input(picture, size)
            plain()
            _plain_output(torch.from_numpy(tensor()))[0]()

    return run

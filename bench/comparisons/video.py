"""A video file through a generator into another, against a plain loop: decode, convert, translate, convert, encode."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from fractions import Fraction
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastpix2pix.config import Modes
from fastpix2pix.data.images import to_uint8, to_unit
from fastpix2pix.data.synthetic import facade
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.runtime.engine import TorchEngine
from fastpix2pix.runtime.translator import Translator

from ..baselines import plain_translate
from ..comparison import Comparison
from ..devices import Setting
from ..report import Mismatch, Skipped
from ..timing import Run
from .engines import generator

OURS, PLAIN = "Stream", "plain loop"
FRAMES = 24
MEAN = 4.0  # of 255, between the two files' pictures: both are encoded lossily, colours are converted differently
CODEC = {"crf": "20", "preset": "veryfast"}


def comparisons(at: Setting) -> Iterator[Comparison]:
    """A video of the training size, with running statistics: h264 in, h264 out."""
    frames = FRAMES if at.scale == "full" else FRAMES // 3
    size = at.config(1).data.crop_size
    ways = {OURS: lambda: _checked(at, frames), PLAIN: lambda: _plain(at, frames)[0]}
    name = f"{frames} frames of {size}x{size}, file to file"
    yield Comparison("video", name, ways, OURS, PLAIN, images=frames)


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise Skipped("PyAV is not installed (pip install 'fastpix2pix[video]')") from None
    return av


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastpix2pix-bench-")


@cache
def _source(size: int, frames: int) -> Path:
    """A painted facade that moves."""
    path = Path(_scratch().name) / f"source-{size}-{frames}.mp4"
    picture = facade(0, 0, size)[0]
    _write(path, [np.roll(picture, 2 * number, axis=1) for number in range(frames)])
    return path


def _write(path: Path, pictures: list[NDArray[np.uint8]]) -> None:
    av = _av()
    with av.open(str(path), "w") as out:
        height, width = pictures[0].shape[:2]
        stream = out.add_stream("libx264", rate=25, options=CODEC)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = width, height, "yuv420p", Fraction(1, 25)
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        out.mux(stream.encode())


def _read(path: Path) -> list[NDArray[np.uint8]]:
    with _av().open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def _ours(at: Setting, frames: int) -> tuple[Run, Path]:
    _av()
    try:
        from fastpix2pix.streaming.stream import Stream
    except (ImportError, EnvironmentFailed) as error:
        raise Skipped(str(error)) from None
    config = at.config(1)
    source, out = _source(config.data.crop_size, frames), Path(_scratch().name) / "ours.mp4"
    engine = TorchEngine(copy.deepcopy(generator(config.generator)), Modes(norm_stats="running"), at.device)
    translator = Translator(engine, record={"size": config.data.crop_size})

    def run() -> None:
        with redirect_stderr(StringIO()):
            report = Stream(translator, source, out, overwrite=True, audio="none").run()
        if report.frames["out"] != frames:
            raise Mismatch(f"{report.frames['out']} frames came out of {frames}")

    return run, out


def _plain(at: Setting, frames: int) -> tuple[Run, Path]:
    config = at.config(1)
    source, out = _source(config.data.crop_size, frames), Path(_scratch().name) / "plain.mp4"
    translate = plain_translate(generator(config.generator), "running", at.device)

    def picture(given: NDArray[np.uint8]) -> NDArray[np.uint8]:
        x = to_unit(torch.from_numpy(given).to(at.device).permute(2, 0, 1)[None])
        return to_uint8(translate(x))[0].permute(1, 2, 0).cpu().numpy()

    def run() -> None:
        _write(out, [picture(given) for given in _read(source)])

    return run, out


def _checked(at: Setting, frames: int) -> Run:
    """The frames of both files are the same pictures."""
    ours, plain = _ours(at, frames), _plain(at, frames)
    for run, _ in (ours, plain):
        run()
    pairs = list(zip(_read(ours[1]), _read(plain[1]), strict=True))
    if len(pairs) != frames:
        raise Mismatch(f"{len(pairs)} frames, expected {frames}")
    mean = float(np.mean([np.abs(a.astype(int) - b.astype(int)).mean() for a, b in pairs]))
    if not mean <= MEAN:
        raise Mismatch(f"the files' pictures differ by {mean:.3g} of 255 on average, allowed {MEAN}")
    return ours[0]

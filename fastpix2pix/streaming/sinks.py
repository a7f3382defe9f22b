"""Where pictures go besides video files: frames in a folder, raw frames on stdout, nowhere."""

from __future__ import annotations

import os
import re
import select
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config import Stream
from ..data.images import write_image
from ..errors import EnvironmentFailed, InputError
from ..files import make_folder
from .address import VIDEO_SUFFIXES, Kind, sink_kind
from .encoder import Encoder
from .picture import FFMPEG, NATIVE, Media, Planes, new_frame, planes_of


class Sink(Protocol):
    """`open`, then for every picture fill `target` and `write` it, and `close`."""

    name: str  # as shown
    kind: Kind  # what reads a url or pipe may stop reading
    pixels: str  # what the runtime fills: rgb, yuv420, nv12
    even: bool  # takes even sizes only
    whole: str  # a pixel format of its that takes odd ones too; empty where there is none

    def open(self, media: Media) -> None:
        """`media` is of what comes out. Raises InputError, EnvironmentFailed."""

    def target(self) -> Planes:
        """Memory for the next picture."""

    def write(self, pts: int, duration: int) -> None:
        """Take what is in the target."""

    def sound(self, packet: Any) -> None:
        """Copy a packet of sound, or leave it."""

    def close(self) -> None:
        """Finish; may be called twice."""


def sink_of(address: str, options: Stream) -> Sink:
    """The sink that an address of the command line stands for; a folder gets frames."""
    kind = sink_kind(address)
    if kind == "pipe":
        return RawFrames(options)
    if kind == "null":
        return Nowhere()
    if kind == "folder":
        return FrameFolder(Path(address), ".png")
    if kind == "video" and Path(address).suffix.lower() not in VIDEO_SUFFIXES:
        raise InputError(
            f"sink {address}: a video is written as {', '.join(sorted(VIDEO_SUFFIXES))}; for a folder write {address}/"
        )
    if kind == "images":
        raise InputError(f"sink {address}: one image; for the frames of a video give a folder")
    return Encoder(address, options)


class Nowhere:
    """For measuring, and for the preview alone."""

    name, pixels, even, whole = "null:", "yuv420", False, ""
    kind: Kind = "null"

    def open(self, media: Media) -> None:
        self._frame = new_frame(media)
        self._planes = planes_of(self._frame)

    def target(self) -> Planes:
        return self._planes

    def write(self, pts: int, duration: int) -> None:
        pass

    def sound(self, packet: Any) -> None:
        pass

    def close(self) -> None:
        pass


class FrameFolder(Nowhere):
    """000000.png, 000001.png, ... in place of those that are there."""

    pixels = "rgb"
    kind: Kind = "folder"

    def __init__(self, folder: Path, suffix: str) -> None:
        self.name, self._folder, self._suffix, self._count = f"{folder}/", folder, suffix, 0

    def open(self, media: Media) -> None:
        make_folder(self._folder)
        frame = re.compile(r"\d{6,}" + re.escape(self._suffix))
        try:
            for path in self._folder.iterdir():
                if frame.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise EnvironmentFailed(f"cannot replace the frames in {self.name}: {error.strerror}") from None
        self._picture = np.empty((media.height, media.width, 3), np.uint8)

    def target(self) -> Planes:
        return (self._picture.reshape(len(self._picture), -1),)

    def write(self, pts: int, duration: int) -> None:
        write_image(self._folder / f"{self._count:06}{self._suffix}", self._picture)
        self._count += 1


class RawFrames(Nowhere):
    """Frames one after the other on stdout, without any header; BrokenPipeError where the reader went away."""

    name, whole = "stdout", "rgb24"
    kind: Kind = "pipe"

    def __init__(self, options: Stream) -> None:
        if sys.stdout.isatty():
            raise InputError("sink -: stdout is a terminal, and raw frames are for a program; pipe them into one")
        if options.stats == "-":
            raise InputError("stats = -: stdout has the frames; give a file")
        self._format = options.pixel_format or "rgb24"
        if self._format not in FFMPEG.values():
            raise InputError(f"pixel_format = {self._format}: raw frames are {', '.join(FFMPEG.values())}")
        self.pixels = NATIVE[self._format]
        self.even = self.pixels in ("yuv420", "nv12")

    def open(self, media: Media) -> None:
        sizes = [plane.shape for plane in planes_of(new_frame(media))]
        self._memory = bytearray(sum(rows * width for rows, width in sizes))
        self._planes, begin = (), 0
        for rows, width in sizes:
            plane = np.frombuffer(self._memory, np.uint8, rows * width, begin).reshape(rows, width)
            self._planes, begin = (*self._planes, plane), begin + rows * width

    def write(self, pts: int, duration: int) -> None:
        left = memoryview(self._memory)
        while left:
            try:
                left = left[os.write(sys.stdout.fileno(), left) :]
            except BlockingIOError:  # the reader made the pipe so
                select.select([], [sys.stdout], [])

"""Where pictures come from: anything FFmpeg opens, and folders of images. Both yield Picture and Sound, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from ..config import Stream
from ..console import say
from ..data.images import read_image
from ..errors import EnvironmentFailed, InputError
from ..runtime.sources import list_images
from .address import shown, source_kind
from .connection import Aside, Attempts
from .opening import SILENT, Stopped, open_input
from .picture import Colour, Media, Picture, colour_of, on_gpu, pixels_of, planes_of, to_format
from .timeline import Timeline

_PAUSE = 0.01  # seconds until a source is asked again that has nothing yet
_HOPELESS = 200  # broken packets in a row that end a source
# Their packets have the time of decoding only: pts is FFmpeg's guess, wrong where H.264 reorders pictures.
_WITHOUT_PTS = ("avi", "asf")


@dataclass(frozen=True)
class Sound:
    """A packet of a stream that is copied."""

    packet: Any


class Source(Protocol):
    """Opened by `open`, read once."""

    name: str  # as shown
    live: bool  # pictures come when they come, not when they are asked for
    broken: int  # packets or images that could not be decoded, and pictures that the decoder patched
    reconnects: int
    away: bool  # being opened again

    def open(self, stop: Callable[[], bool]) -> Media:
        """Read up to the first picture. Raises InputError or EnvironmentFailed."""

    def __iter__(self) -> Iterator[Picture | Sound]: ...

    def close(self) -> None: ...


def source_of(address: str, options: Stream, device: str = "cpu") -> Source:
    """The source that an address of the command line stands for."""
    return ImageSource(address, options) if source_kind(address) == "images" else FFmpegSource(address, options, device)


class ImageSource:
    """A folder, pattern or list of images as frames of a video, --fps of them a second. Sizes may differ.

    A broken image is named and counted; the picture before it stands in its time.
    """

    live, reconnects, away = False, 0, False

    def __init__(self, address: str, options: Stream) -> None:
        self.name, self.broken = address, 0
        self._paths = list_images(address)
        self._rate = Fraction(options.fps or 25).limit_denominator(1001)

    def open(self, stop: Callable[[], bool]) -> Media:
        self._images = self._read(stop)
        self._first = next(self._images, None)
        if self._first is None:
            if stop():
                raise Stopped
            raise InputError(f"{self.name}: none of {len(self._paths)} images could be read")
        height, width = self._size = self._first[1].shape[:2]
        tag = 1 if height >= 720 else 6
        colour = Colour("bt709" if tag == 1 else "bt601", "limited", (tag, 1, 2, 2))
        return Media(height, width, "rgb", colour, 1 / self._rate, self._rate, self._rate, frames=len(self._paths))

    def __iter__(self) -> Iterator[Picture | Sound]:
        assert self._first is not None
        for number, image in chain([self._first], self._images):
            frame = to_format(av.VideoFrame.from_ndarray(image, format="rgb24"), "rgb", *self._size)
            yield Picture(frame, planes_of(frame), number, 1)

    def close(self) -> None:
        pass

    def _read(self, stop: Callable[[], bool]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(place in time, [H, W, 3]) of every image that can be read."""
        for number, path in enumerate(self._paths):
            if stop():
                return
            try:
                image = read_image(path, 3)
            except InputError as error:
                self.broken += 1
                say(f"left out: {error}")
                continue
            yield number, image


class FFmpegSource:
    """A file, camera, URL or pipe through FFmpeg.

    Broken packets are skipped and counted; pictures that the decoder could patch are counted and shown. Packets of a
    live source before its first picture are no fault: they refer to pictures before them. A network that stalls is
    waited for `timeout` seconds, then opened again, up to `reconnects` times in one outage; timestamps go on.
    """

    def __init__(self, address: str, options: Stream, device: str = "cpu") -> None:
        self.kind = source_kind(address)
        self.name = "stdin" if self.kind == "pipe" else shown(address)
        self._address, self._options = address, options
        self.live = self.kind in ("camera", "url", "pipe")
        self.broken = self.reconnects = 0
        self.away = False
        self._device = device if device.startswith("cuda") else "cuda"
        self._hwaccel = options.hwaccel != "none" and (options.hwaccel == "cuda" or device.startswith("cuda"))
        self._container: Any = None
        self._held: list[Picture | Sound] = []
        self._size: tuple[int, int] | None = None  # height, width as decoded
        self._resized = False
        self._timeline = Timeline()
        self._attempts = Attempts(options.reconnects)
        self._aside: Aside | None = None

    def open(self, stop: Callable[[], bool]) -> Media:
        self._stop = stop
        if self.kind == "url":
            self._aside = Aside()
        try:
            self._connect()
        except (InputError, EnvironmentFailed):
            if stop():  # which ends a pipe in the middle
                raise Stopped from None
            raise
        self._items = self._read()
        for item in self._items:
            self._held.append(item)
            if isinstance(item, Picture):
                return self._media()
        if stop():
            raise Stopped
        raise InputError(
            f"{self.name}: not one picture could be decoded (broken packets: {self.broken}); is it empty, cut or "
            "damaged?"
        )

    def __iter__(self) -> Iterator[Picture | Sound]:
        yield from self._held
        self._held = []
        yield from self._items

    def close(self) -> None:
        container, self._container = self._container, None
        if self._aside is not None:
            self._aside.close(container.close if container else lambda: None)  # FFmpeg may still be reading
        elif container:
            container.close()

    # ---- opening

    def _connect(self) -> None:
        self._container, hardware = open_input(
            self._address, self.kind, self._options, self._hwaccel, self._stop, self._device
        )
        if self._hwaccel and not hardware:
            self._on_the_cpu("NVDEC could not be started")
        videos = self._container.streams.video
        if not videos:
            raise InputError(f"{self.name}: has no video stream")
        wanted = self._options.stream
        if wanted is None:
            self._video = self._container.streams.best("video") or videos[0]
        else:
            found = [video for video in videos if video.index == wanted]
            if not found:
                has = ", ".join(f"{v.index} ({v.codec_context.width}x{v.codec_context.height})" for v in videos)
                raise InputError(f"stream = {wanted}: the video streams of {self.name} are {has}")
            self._video = found[0]
        if self._video.codec_context is None:
            raise InputError(f"{self.name}: PyAV's FFmpeg has no decoder for stream {self._video.index}")
        if self._hwaccel and not self._video.codec_context.is_hwaccel:  # PyAV decodes such a stream on the CPU, unsaid
            self._on_the_cpu(f"PyAV decodes this with {self._video.codec_context.name}, which NVDEC does not do")
        sliced = self.live or self._options.live or self._hwaccel  # a thread per frame adds latency, and NVDEC surfaces
        self._video.thread_type = "SLICE" if sliced else "AUTO"
        audio = self._container.streams.audio if self._options.audio == "all" else ()
        self._sound = tuple(one for one in audio if one.codec_context and one.codec_context.sample_rate)  # with content
        self._joined, self._connected = False, time.monotonic()

    def _on_the_cpu(self, why: str) -> None:
        """Go on without hardware and say so, or refuse where it was asked for by name."""
        if self._options.hwaccel == "cuda":
            raise EnvironmentFailed(f"hwaccel = cuda: {why}; use hwaccel = auto or none")
        say(f"decoding on the CPU: {why}")
        self._hwaccel = False

    def _media(self) -> Media:
        video, colour = self._video, self._colour
        assert self._size is not None
        height, width = self._size[::-1] if self._turn % 180 else self._size
        expected = video.frames or None
        if expected is None and video.duration:
            expected = round(video.duration * video.time_base * self._rate)
        aspect = video.sample_aspect_ratio
        if aspect and self._turn % 180:
            aspect = 1 / aspect
        if colour.guessed:
            say(f"{self.name}: no colour tags; taken as {colour.matrix}, {colour.range} range, by its height")
        return Media(
            height=height,
            width=width,
            pixels=self._pixels,
            colour=colour,
            time_base=video.time_base,
            rate=self._rate,
            grid=video.guessed_rate or self._rate,
            aspect=aspect,
            frames=None if self.live else expected,
            turned=self._turn,
            sound=self._sound,
        )

    # ---- reading

    def _read(self) -> Iterator[Picture | Sound]:
        """Items until the end, a stop, or a network that does not come back."""
        in_a_row, quiet_since = 0, time.monotonic()
        packets = self._demux()
        while not self._stop():
            try:
                packet = next(packets)
                quiet_since = time.monotonic()
                if packet.stream is self._video:
                    for frame in self._decoded(packet):
                        in_a_row, self._joined = 0, True
                        if not self._container.duration:  # a recording has one, and would begin again for ever
                            self._attempts.picture(time.monotonic())
                        self.broken += frame.is_corrupt
                        yield self._picture(frame)
                elif packet.dts is not None and self._timeline.move(packet, self._video.time_base):
                    yield Sound(packet)
                if self._joined or not self.live or time.monotonic() - self._connected < self._options.timeout:
                    continue
                lost = f"no picture could be decoded for {self._options.timeout:g} s"
            except (StopIteration, av.error.EOFError):
                if self._stop() or not (self.live and self._options.live and self._again("the connection ended")):
                    return
                packets = self._demux()
                continue
            except av.error.BlockingIOError:  # nothing yet
                if time.monotonic() - quiet_since < self._options.timeout:
                    time.sleep(_PAUSE)
                    packets = self._demux()
                    continue
                lost = f"nothing came for {self._options.timeout:g} s"
            except SILENT:
                lost = f"nothing came for {self._options.timeout:g} s"
            except av.error.FFmpegError as error:
                if not (isinstance(error, ConnectionError) or (self.kind == "url" and isinstance(error, OSError))):
                    self.broken, in_a_row = self.broken + 1, in_a_row + 1
                    if in_a_row > _HOPELESS:
                        raise InputError(
                            f"{self.name}: {in_a_row} broken packets in a row; the rest cannot be read{self._hint()}"
                        ) from None
                    packets = self._demux()
                    continue
                lost = error.strerror or "the connection broke"
            if not self._again(lost):
                if self._stop():
                    return
                raise EnvironmentFailed(f"{self.name}: {lost}{self._of_no_help()}")
            packets, in_a_row, quiet_since = self._demux(), 0, time.monotonic()

    def _decoded(self, packet: Any) -> Any:
        """Its pictures."""
        try:
            return packet.decode()
        except av.error.InvalidDataError:
            if self._joined or not self.live:
                raise
            return []

    def _of_no_help(self) -> str:
        limits = f"timeout = {self._options.timeout:g}"
        if self.kind == "pipe":
            return f" ({limits})"
        return f", and opening it again did not help ({limits}, reconnects = {self._options.reconnects})"

    def _hint(self) -> str:
        if not Path(self._address).is_file() and "mp4" in self._container.format.name:
            return " (an MP4 with its index at the end cannot be read from a pipe: give the file, or .mkv or .ts)"
        return ""

    def _demux(self) -> Iterator[Any]:
        packets = self._container.demux(self._video, *self._sound)
        return self._aside.each(packets, self._stop) if self._aside else packets

    def _again(self, why: str) -> bool:
        """Open the source once more; False where that is of no use."""
        while self.kind != "pipe" and self.live and not self._stop() and self._attempts.another():
            self.reconnects, self.away = self.reconnects + 1, True
            say(f"{self.name}: {why}; opening it again ({self._attempts.made} of {self._options.reconnects})")
            self._container.close()
            try:
                self._connect()
            except (InputError, EnvironmentFailed) as error:
                why = str(error)
                time.sleep(self._attempts.pause())
                continue
            self._timeline.begin_anew()
            self.away = False
            return True
        return False

    def _picture(self, frame: av.VideoFrame) -> Picture:
        if self._hwaccel and self._video.codec_context.pix_fmt != "cuda":  # the decoder starts at the first packet only
            what = f"{self._video.codec_context.name}, {frame.format.name}, {frame.width}x{frame.height}"
            self._on_the_cpu(f"NVDEC does not take these pictures ({what}), or could not be started")
        if self._size is None:  # the first decides for all
            self._pixels, self._size, self._turn = pixels_of(frame), (frame.height, frame.width), frame.rotation % 360
            self._colour = colour_of(frame)
        if (frame.height, frame.width) != self._size and not self._resized:
            self._resized = True
            say(f"{self.name}: from here on {frame.width}x{frame.height}; scaled to {self._size[1]}x{self._size[0]}")
            if on_gpu(frame):
                raise InputError(f"{self.name}: frames of another size cannot stay on the GPU; use hwaccel = none")
        pts = None if self._container.format.name in _WITHOUT_PTS else frame.pts
        pts = self._timeline.stamp(pts, frame.dts, frame.duration or 0, self._period)
        frame, duration = to_format(frame, self._pixels, *self._size), frame.duration or 0
        return Picture(frame, planes_of(frame, self._turn), pts, duration)

    @property
    def _rate(self) -> Fraction:
        return self._video.average_rate or self._video.guessed_rate or Fraction(25)

    @property
    def _period(self) -> int:
        return max(1, round(1 / (self._rate * self._video.time_base)))


def check_sources(addresses: list[str]) -> None:
    """Refuse files that are not there and single images, before a model is loaded."""
    for address in addresses:
        if source_kind(address) == "images" and len(list_images(address)) < 2:
            raise InputError(
                f"{address}: one image, where a video is wanted; translate images apart, into an image file or a "
                "folder; a folder or pattern of frames is a video"
            )
        if source_kind(address) == "video" and not Path(address).exists():
            raise InputError(f"{address}: no such file")

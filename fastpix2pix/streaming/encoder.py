"""A video file or network stream being written: pictures encoded, sound copied, playable whenever it is cut off."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import av.error
from av.bitstream import BitStreamFilterContext
from av.codec import Codec

from ..config import Stream
from ..errors import EnvironmentFailed, InputError
from ..files import make_folder
from .address import Kind, is_url, shown
from .picture import NATIVE, Media, Planes, new_frame, planes_of

# rate factor, and options for files; those for --live come on top
_CODECS: dict[str, tuple[int, dict[str, str]]] = {
    "libx264": (20, {"preset": "veryfast"}),
    "libx265": (24, {"preset": "veryfast", "x265-params": "log-level=none"}),
    "libsvtav1": (32, {"preset": "10"}),
    "libvpx-vp9": (32, {"deadline": "realtime", "cpu-used": "6", "row-mt": "1", "b:v": "0"}),
}
_LIVE = {"libx264": {"tune": "zerolatency"}, "libx265": {"tune": "zerolatency"}, "libsvtav1": {"preset": "12"}}
# An mp4 in pieces of a second that becomes an ordinary one at the end; flushed, so that a kill leaves a playable file.
# delay_moov keeps the timestamps of sound that begins before 0.
_PIECES = {"movflags": "hybrid_fragmented+delay_moov", "frag_duration": "1000000", "flush_packets": "1"}
_IN_PIECES = {".mp4", ".mov", ".m4v"}
# Pictures are not reordered: across the last piece FFmpeg writes a wrong length then, and .avi and .wmv have no
# presentation times.
_IN_ORDER = _IN_PIECES | {".avi", ".wmv"}
_CONSTANT = {".avi": math.inf, ".y4m": 1}  # of one rate: most periods from a picture to the next
_OFF = Fraction(1, 4)  # periods that a picture may be off its time at that rate
_FEWER = Fraction(1, 10)  # of the pictures at that rate that may be missing
_AUTO = {".webm": "libvpx-vp9", ".y4m": "wrapped_avframe"}  # others: libx264
_FORMATS = {"rtmp": "flv", "rtmps": "flv", "rtsp": "rtsp", "rtsps": "rtsp", "rtp": "rtp_mpegts"}  # others: mpegts
_KEYFRAME_SECONDS = 2


class Encoder:
    """`open`, then for every picture fill `target` and `write` it; `close` flushes and writes the trailer."""

    def __init__(self, address: str, options: Stream) -> None:
        self.name, self._address, self._options = shown(address), address, options
        self.kind: Kind = "url" if is_url(address) else "video"
        self._suffix = "" if self.kind == "url" else Path(address).suffix.lower()
        self.codec = options.codec if options.codec != "auto" else _AUTO.get(self._suffix, "libx264")
        self._format = options.pixel_format or "yuv420p"
        self._check()
        # others are converted by FFmpeg from what the runtime gives
        self.pixels = NATIVE.get(self._format, "rgb")
        self.even = any(word in self._format for word in ("420", "nv12", "422"))
        self.written = 0
        self._last, self._phase = 0, Fraction(0)  # at a constant rate: the last picture's number; periods beside it
        self._container: Any = None

    def _check(self) -> None:
        try:
            codec = Codec(self.codec, "w")
        except ValueError:
            raise InputError(
                f"codec = {self.codec}: PyAV's FFmpeg has no such encoder; there are {', '.join(_CODECS)} and others"
            ) from None
        takes = [format_.name for format_ in codec.video_formats or ()]
        if codec.type != "video" or (takes and self._format not in takes):
            raise InputError(f"pixel_format = {self._format}: {self.codec} takes {', '.join(takes) or 'no pictures'}")
        self.whole = "yuv444p" if not takes or "yuv444p" in takes else ""

    def open(self, media: Media) -> None:
        """Write the header. Raises InputError for what the container does not take, EnvironmentFailed for the disk."""
        url = self.kind == "url"
        os.environ.setdefault("SVT_LOG", "1")  # of libsvtav1, which says a page about itself otherwise: errors alone
        if not url:
            make_folder(Path(self._address).parent)
        format_ = _FORMATS.get(urlsplit(self._address).scheme, "mpegts") if url else None
        try:
            timeout = self._options.timeout if url else None
            options = _PIECES if self._suffix in _IN_PIECES else {}
            self._container = av.open(self._limited(), "w", format=format_, options=options, timeout=timeout)
            self._add_streams(media)
            self._container.start_encoding()
        except (av.error.FFmpegError, InputError) as error:
            self._discard()
            raise (error if isinstance(error, InputError) else self._failed(error)) from None
        self._media = media

    def _limited(self) -> str:
        """The address with --timeout in it where FFmpeg takes one there, because PyAV has none for writing."""
        parts = urlsplit(self._address)
        if parts.scheme != "tcp" or not self._options.live or "timeout=" in parts.query:
            return self._address
        return f"{self._address}{'&' if parts.query else '?'}timeout={round(1e6 * self._options.timeout)}"

    def _add_streams(self, media: Media) -> None:
        factor, settings = _CODECS.get(self.codec, (None, {}))
        if factor is not None:
            factor = self._options.quality if self._options.quality is not None else factor
            settings = {"crf": str(factor), **settings}
        elif self._options.quality is not None:
            raise InputError(f"quality = {self._options.quality}: is for {', '.join(_CODECS)}")
        if self._options.live:
            settings = settings | _LIVE.get(self.codec, {})
        if not self._takes(self.codec):
            raise InputError(f"{self.name}: this container does not take {self.codec}; use .mkv, or another codec")
        rate, self._time_base = media.rate, media.time_base
        if self._suffix in _CONSTANT:
            rate, self._time_base = media.grid, 1 / media.grid
            if abs(media.rate / rate - 1) > _FEWER:
                raise self._variable(f"{float(media.rate):.4g} a second on average, of {float(rate):.4g}")
        video = self._container.add_stream(self.codec, rate=rate, options=settings)
        video.width, video.height, video.pix_fmt = media.width, media.height, self._format
        context = video.codec_context
        context.time_base = self._time_base
        if self._suffix in _IN_ORDER:
            context.max_b_frames = 0
        context.gop_size = max(1, round(_KEYFRAME_SECONDS * media.rate))
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = media.colour.tags
        if media.aspect:
            context.sample_aspect_ratio = media.aspect
        self._video = video
        self._heard: dict[int, int] = {}  # last timestamp by stream
        self._sound: dict[int, tuple[Any, BitStreamFilterContext | None]] = {}
        for stream in media.sound:
            name = stream.codec_context.name
            if not self._takes(name):
                raise InputError(
                    f"{self.name}: the sound ({name}) cannot be copied into this container; use .mkv, or audio = none"
                )
            copied = self._container.add_stream_from_template(stream)
            framed = name == "aac" and not stream.codec_context.extradata and self._container.format.name != "mpegts"
            # AAC of a transport stream has a header in every packet, which other containers have once
            unframe = BitStreamFilterContext("aac_adtstoasc", stream) if framed else None
            self._sound[stream.index] = copied, unframe

    def _takes(self, codec: str) -> bool:
        """Whether the container does; of MPEG's streams FFmpeg names the defaults only."""
        return self._container.format.name in ("mpeg", "mpegts") or codec in self._container.supported_codecs

    def target(self) -> Planes:
        """Memory for the next picture: the encoder may still be reading the last one."""
        self._frame = new_frame(self._media)
        return planes_of(self._frame)

    def write(self, pts: int, duration: int) -> None:
        """Encode what is in the target. Raises EnvironmentFailed where the disk or network fails."""
        frame, tags = self._frame, self._media.colour.tags
        if self._suffix in _CONSTANT:
            pts, duration = self._number(pts), 1
        if self.pixels == "rgb":
            frame = frame.reformat(format=self._format, dst_colorspace=tags[0], dst_color_range=tags[1])
            frame.colorspace, frame.color_range = tags[:2]
        frame.pts, frame.time_base, frame.duration = pts, self._time_base, duration
        self._mux(self._video.encode(frame))
        self.written += 1

    def _number(self, pts: int) -> int:
        """Of a picture at a constant rate. Raises InputError where it has none of its own."""
        exact = pts * self._media.time_base / self._time_base
        if not self.written:  # the first decides where between two periods all are
            self._last, self._phase = round(exact) - 1, exact - round(exact)
        step = exact - self._phase - self._last
        if not 1 <= round(step) <= _CONSTANT[self._suffix] or abs(step - round(step)) > _OFF:
            raise self._variable(f"one at {float(pts * self._media.time_base):.3f} s is not at its time")
        self._last += round(step)
        return self._last

    def _variable(self, what: str) -> InputError:
        return InputError(
            f"{self.name}: {self._suffix} holds pictures of one rate, and the rate of these varies ({what}); use .mkv"
        )

    def sound(self, packet: Any) -> None:
        """Copy a packet."""
        index = packet.stream.index
        if index in self._sound and packet.dts > self._heard.get(index, packet.dts - 1):  # containers refuse others
            self._heard[index] = packet.dts
            stream, unframe = self._sound[index]
            packets = unframe.filter(packet) if unframe else [packet]
            for one in packets:
                one.stream = stream
            self._mux(packets)

    def close(self) -> None:
        """Flush the encoder and write the trailer; a file without one picture is removed."""
        if self._container is None:
            return
        try:
            if self.written:
                self._mux(self._video.encode(None))
                self._container.close()
            else:
                self._discard()
        except av.error.FFmpegError as error:
            raise self._failed(error) from None
        finally:
            self._container = None

    def _mux(self, packets: list[Any]) -> None:
        try:
            for packet in packets:
                self._container.mux(packet)
        except av.error.FFmpegError as error:
            raise self._failed(error) from None

    def _discard(self) -> None:
        if self._container is not None:
            with suppress(av.error.FFmpegError, ValueError):
                self._container.close()
            if self.kind == "video":
                Path(self._address).unlink(missing_ok=True)
        self._container = None

    def _failed(self, error: av.error.FFmpegError) -> Exception:
        what = error.strerror or type(error).__name__
        if isinstance(error, av.error.MuxerNotFoundError | av.error.ArgumentError | av.error.InvalidDataError):
            return InputError(f"{self.name}: cannot be written with {self.codec}: {what}; use .mp4 or .mkv")
        return EnvironmentFailed(f"cannot write {self.name} ({self.codec}): {what}")

"""Decoded pictures as the planes that the frame runtime takes, and what their numbers mean as colours."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from ..errors import InputError

Planes = tuple[Any, ...]  # uint8 [rows, bytes] each, rows at any distance: arrays, or what lies on the GPU

# FFmpeg's pixel formats that the runtime reads as they are; all others become rgb24 first
NATIVE = {"yuv420p": "yuv420", "yuvj420p": "yuv420", "nv12": "nv12", "rgb24": "rgb", "bgr24": "bgr", "rgba": "rgba"}
# and what FFmpeg calls the runtime's formats
FFMPEG = {"yuv420": "yuv420p", "nv12": "nv12", "rgb": "rgb24", "bgr": "bgr24", "rgba": "rgba"}
# AVColorSpace: BT.470BG and SMPTE 170M have the numbers of BT.601
_MATRIX = {1: "bt709", 5: "bt601", 6: "bt601"}
_UNKNOWN = 2
_HIGH = 720  # lines from which an untagged picture counts as BT.709


@dataclass(frozen=True)
class Colour:
    """How a picture's levels stand for colours: what the runtime computes with, and FFmpeg's numbers of it."""

    matrix: str  # bt601 or bt709
    range: str  # limited or full
    tags: tuple[int, int, int, int]  # matrix, range, primaries, transfer: AVColorSpace and so on
    guessed: bool = False  # the source has no tag


def colour_of(frame: av.VideoFrame) -> Colour:
    """By the frame's tags; without them BT.709 from 720 lines, else BT.601, limited unless the format says full."""
    full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
    packed = frame.format.is_rgb
    tag = frame.colorspace if frame.colorspace in _MATRIX else 1 if frame.height >= _HIGH else 6
    known = (frame.color_primaries, frame.color_trc) if frame.colorspace in _MATRIX or packed else (_UNKNOWN, _UNKNOWN)
    if packed:
        full = False  # of what is made from it
    range_ = "full" if full else "limited"
    guessed = not packed and frame.colorspace == _UNKNOWN
    return Colour(_MATRIX[tag], range_, (tag, 2 if full else 1, *known), guessed)


@dataclass
class Picture:
    """One decoded frame."""

    frame: av.VideoFrame  # owns the memory
    planes: Planes  # upright, in the runtime's format
    pts: int  # in the source's time base
    duration: int  # the same; 0 where unknown


@dataclass(frozen=True)
class Media:
    """What is the same for all pictures of a source, known from the first."""

    height: int  # of the upright picture, pixels
    width: int
    pixels: str  # the runtime's format: rgb, bgr, rgba, nv12, yuv420
    colour: Colour
    time_base: Fraction
    rate: Fraction  # pictures per second, average
    grid: Fraction  # the lowest rate at which all of them have a time of their own, as FFmpeg guesses it
    aspect: Fraction | None = None  # of one pixel
    frames: int | None = None  # expected
    turned: int = 0  # degrees counterclockwise that made the picture upright
    sound: tuple[Any, ...] = ()  # av streams to be copied


def on_gpu(frame: av.VideoFrame) -> bool:
    """Whether a frame was decoded by NVDEC and left where it is."""
    return bool(frame.format.name == "cuda")


def pixels_of(frame: av.VideoFrame) -> str:
    """The runtime's format that frames like this one are handed over in."""
    if on_gpu(frame):
        inside = frame.sw_format.name if frame.sw_format else "unknown"
        if inside not in NATIVE or frame.rotation:
            raise InputError(
                f"frames of {inside}, turned by {frame.rotation}: they cannot stay on the GPU; use hwaccel = none"
            )
        if frame.height % 2 or frame.width % 2:  # PyAV hands its chroma over without the last row or column
            raise InputError(
                f"frames of {frame.width}x{frame.height}: only even sizes can stay on the GPU; use hwaccel = none"
            )
        if frame.colorspace not in (*_MATRIX, _UNKNOWN):
            raise InputError(
                f"frames of colour matrix {frame.colorspace} (AVColorSpace; 9 is BT.2020): only those of BT.601 and "
                "BT.709 can stay on the GPU; use hwaccel = none"
            )
        return NATIVE[inside]
    if frame.format.name in NATIVE and (frame.format.is_rgb or frame.colorspace in (*_MATRIX, _UNKNOWN)):
        return NATIVE[frame.format.name]
    return "rgb"


def to_format(frame: av.VideoFrame, pixels: str, height: int, width: int) -> av.VideoFrame:
    """The frame in one of the runtime's formats and a size; itself where it is that already."""
    if on_gpu(frame):
        return frame
    if NATIVE.get(frame.format.name) == pixels and (frame.height, frame.width) == (height, width):
        return frame
    same_kind = (FFMPEG[pixels] in ("yuv420p", "nv12")) and not frame.format.is_rgb
    known = frame.colorspace not in (0, _UNKNOWN)
    matrix = frame.colorspace if known else colour_of(frame).tags[0]  # FFmpeg takes untagged for BT.601
    if same_kind:
        return frame.reformat(width, height, FFMPEG[pixels])
    return frame.reformat(width, height, FFMPEG[pixels], src_colorspace=matrix)


def new_frame(media: Media) -> av.VideoFrame:
    """Memory for one picture, tagged where it is not RGB."""
    frame = av.VideoFrame(media.width, media.height, FFMPEG[media.pixels])
    if not frame.format.is_rgb:
        frame.colorspace, frame.color_range = media.colour.tags[:2]
    return frame


def planes_of(frame: av.VideoFrame, degrees: int = 0) -> Planes:
    """Views of a frame's memory without the padding of its rows; turned counterclockwise, they are copies.

    Of a frame on the GPU its planes as they are, for DLPack.
    """
    if on_gpu(frame):
        return tuple(frame.planes)
    name = frame.format.name
    samples = 3 if name in ("rgb24", "bgr24") else 4 if name == "rgba" else 1
    planes = []
    for number, plane in enumerate(frame.planes):
        each = 2 if name == "nv12" and number == 1 else samples
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)
        if plane.line_size < 0:  # the last row lies first
            rows = rows[::-1]
        view = rows[:, : plane.width * each]
        if degrees:
            turned = np.rot90(view.reshape(plane.height, plane.width, each), degrees // 90)
            view = np.ascontiguousarray(turned).reshape(turned.shape[0], -1)
        planes.append(view)
    return tuple(planes)

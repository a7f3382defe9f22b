"""Small videos made on the spot, and what is needed to look into the results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from fastpix2pix.config import Modes

HEIGHT, WIDTH, FRAMES = 48, 64, 20


class Identity:
    """The engine whose output is its input."""

    in_channels = out_channels = 3
    multiple = 32
    device = torch.device("cpu")

    def __init__(self, norm_stats: str = "image", multiple: int = 32, layout: str = "nhwc") -> None:
        self.modes = Modes(norm_stats)
        self.multiple, self.layout = multiple, layout

    def translate(self, batch: torch.Tensor, first: int = 0) -> torch.Tensor:
        return batch.clone()

    def describe(self) -> dict:
        return {"backend": "identity", "device": "cpu", "precision": "fp32"}


def scene(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:  # [H, W, 3] uint8
    """A smooth picture that moves: what codecs and chroma subsampling keep."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x + 2 * number) / 9 + c) * 50 + np.cos(y / 7 - c) * 40 + 128 for c in range(3)]
    return np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)


def make_video(
    path: Path,
    frames: int = FRAMES,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    stamps: Sequence[int] | None = None,  # milliseconds; default: 25 frames a second
    sound: bool = False,
    turned: int = 0,
    tags: tuple[int, int] = (2, 0),  # matrix, range
    aspect: Fraction | None = None,
    between: int = 0,  # B-frames between two others, of libx264
    time_base: Fraction = Fraction(1, 1000),  # of the encoder, and of what AVI calls its rate
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        x264 = {"crf": "12", "preset": "ultrafast", "x264-params": f"bframes={between}:b-adapt=0"}
        options = x264 if codec == "libx264" else {}
        video = out.add_stream(codec, rate=25, options=options)
        video.height, video.width, video.pix_fmt = *size, pixels
        context = video.codec_context
        context.time_base, context.max_b_frames = time_base, between
        context.colorspace, context.color_range = tags
        if aspect:
            context.sample_aspect_ratio = aspect
        if turned:
            video.set_display_rotation(turned)
        audio = out.add_stream("aac", rate=8000, layout="mono") if sound else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(scene(number, *size), format="rgb24")
            frame = frame.reformat(format=pixels, dst_colorspace=1 if tags[0] == 1 else 5, dst_color_range=tags[1] or 1)
            frame.colorspace, frame.color_range = tags
            frame.pts, frame.time_base = stamps[number] if stamps else 40 * number, Fraction(1, 1000)
            out.mux(video.encode(frame))
        if audio:
            for number in range(frames * 40 * 8 // 1024):
                tone = np.sin(np.arange(1024) / 5 + number)[None].astype(np.float32)
                piece = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = 8000, 1024 * number, Fraction(1, 8000)
                out.mux(audio.encode(piece))
            out.mux(audio.encode(None))
        out.mux(video.encode(None))
    return path


def stamps_of(path: Path) -> list[Fraction]:
    """When each picture is shown, seconds."""
    with av.open(str(path)) as opened:
        video = opened.streams.video[0]
        return [frame.pts * video.time_base for frame in opened.decode(video)]


def pictures_of(path: Path, stream: int = 0, pixels: str = "rgb24") -> list[np.ndarray]:
    with av.open(str(path)) as opened:
        return [frame.to_ndarray(format=pixels) for frame in opened.decode(video=stream)]


def packets_of(path: Path, kind: str) -> list[tuple[Fraction, bytes]]:
    with av.open(str(path)) as opened:
        streams = [s for s in opened.streams if s.type == kind]
        packets = opened.demux(streams) if streams else ()
        return [(p.pts * p.time_base, bytes(p)) for p in packets if p.pts is not None]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def command(*argv: object, **options) -> subprocess.Popen:
    """fastpix2pix in a process of its own."""
    line = [sys.executable, "-m", "fastpix2pix.cli", *map(str, argv)]
    return subprocess.Popen(line, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)

"""The same batches through nvidia.dali: order and jitter come from jitter.py, decoding and resizing are DALI's.

Decoding equals Pillow's on the CPU backend; the cubic resize differs from Pillow's by rounding (a mean of about 0.2 of
255, tests/data/test_dali.py). On a GPU, nvJPEG decodes, which may differ by a few levels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..device import with_index
from ..errors import EnvironmentFailed, InputError
from .batches import CHUNK, Batch, Feed, nchw
from .check import pooled
from .images import MAX_PIXELS, READ_FORMATS, orientation, retried
from .members import File
from .pairs import Pair, first_ten, read_pair

PREFETCH = 2  # chunks DALI works on ahead


def _header(path: File) -> tuple[bytes, Image.Image, Image.Exif, int]:
    """(its first bytes, the closed image, its EXIF block, the orientation that Pillow sees)"""
    with path.open("rb") as file:
        head = file.read(25)
        with Image.open(file, formats=READ_FORMATS) as image:
            turned = Image.Exif()
            turned.load(image.info.get("exif") or b"")
            return head, image, turned, orientation(image)


def _refusal(path: File, side_by_side: bool) -> str | None:
    """Why DALI would not read a file as Pillow does, from its header."""
    try:
        head, image, turned, upright = retried(partial(_header, path), path)
    except EnvironmentFailed:
        raise
    except Exception:  # of any type, as in open_image; the torch loader names what is wrong with the file
        return "not a readable image"
    if image.format not in ("JPEG", "PNG"):
        return f"{image.format} files"
    if image.mode not in ("L", "RGB"):
        return f"{image.mode} images"
    if "transparency" in image.info:
        return f"{image.mode} images with a transparent colour"
    if image.format == "PNG" and head[24] != 8:
        return f"PNG of {head[24]} bits"
    if turned.get(0x0112, 1) != upright:
        return "orientation outside EXIF"
    if image.width * image.height > MAX_PIXELS:
        return "over the pixel limit"
    if side_by_side and (image.height if upright >= 5 else image.width) % 2:
        return "A|B of odd width"
    return None


@lru_cache(maxsize=4)  # the headers are read once per data set
def _file_reasons(pairs: tuple[Pair, ...]) -> tuple[str, ...]:
    refused: dict[str, list[str]] = {}
    files = [(path, pair.b is None) for pair in pairs for path in (pair.a, pair.b) if path is not None]
    for (path, _), reason in zip(files, pooled(lambda one: _refusal(*one), files), strict=True):
        if reason:
            refused.setdefault(reason, []).append(path.name)
    return tuple(f"{reason} ({first_ten(names)})" for reason, names in refused.items())


def not_supported_reasons(pairs: Sequence[Pair], in_channels: int, out_channels: int) -> list[str]:
    """Every reason why DALI cannot load these pairs; empty where it can. Opens each file's header once.

    DALI takes 8-bit JPEG and PNG, gray or RGB, for 3 + 3 channels, either A|B files or A and B files.
    """
    reasons = []
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        reasons.append(f"nvidia.dali cannot be imported ({error}); pip install nvidia-dali-cuda130, or -cuda120")
    if (in_channels, out_channels) != (3, 3):
        reasons.append(f"{in_channels} + {out_channels} channels, it takes 3 + 3")
    if len({pair.b is None for pair in pairs}) > 1:
        reasons.append("A|B files mixed with separate A and B files")
    return reasons + list(_file_reasons(tuple(pairs)))


def _read(path: File) -> np.ndarray:
    try:
        return np.frombuffer(retried(path.read_bytes, path), np.uint8)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _source(feed: Feed, pool: ThreadPoolExecutor) -> Iterator[tuple[Any, ...]]:
    """Per chunk what DALI is fed: the files' bytes (a list of A, and one of B), crop starts [n, 2], flips [n].

    The next chunk's files are read while the present one is worked on.
    """
    ahead: tuple[Any, ...] | None = None
    for lo_hi in chain(feed.chunks(), (None,)):
        ready = ahead
        if lo_hi is not None:
            pairs, drawn = zip(*(feed.item(p) for p in range(*lo_hi)), strict=True)
            files = [[pair.a for pair in pairs]]
            if pairs[0].b is not None:
                files.append([pair.b for pair in pairs])
            starts = np.array([(d.y, d.x) for d in drawn], np.int32)
            flips = np.array([d.flip for d in drawn], np.int32)
            ahead = (*(pool.map(_read, paths) for paths in files), starts, flips)
        if ready is not None:
            yield (*(list(contents) for contents in ready[:-2]), *ready[-2:])


def _pipeline(feed: Feed, source: Iterator[tuple[Any, ...]], most: int, device: torch.device) -> Any:
    """Bytes to [crop, crop, 6], input then target: one crop and one flip serve both images of a pair."""
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.types import DALIImageType, DALIInterpType

    data, files = feed.data, 1 if feed.pairs[0].b is None else 2
    gpu = device.type == "cuda"
    pipe = Pipeline(
        batch_size=most,
        num_threads=max(feed.workers, 1),
        device_id=device.index if gpu else None,
        prefetch_queue_depth=PREFETCH,
    )
    with pipe:
        *encoded, starts, flips = fn.external_source(source=source, num_outputs=files + 2, batch=True)
        images: list[Any] = [
            fn.decoders.image(
                e, device="mixed" if gpu else "cpu", output_type=DALIImageType.RGB, jpeg_fancy_upsampling=True
            )  # adjusts the EXIF orientation by default; Pillow, too, upsamples chroma smoothly
            for e in encoded
        ]
        if files == 1:
            images = [fn.slice(images[0], rel_start=[at], rel_shape=[0.5], axes=[1]) for at in (0.0, 0.5)]
        if data.direction == "BtoA":
            images.reverse()
        images = [
            fn.resize(x, size=[data.load] * 2, interp_type=DALIInterpType.INTERP_CUBIC, antialias=True) for x in images
        ]
        both = fn.slice(fn.cat(*images, axis=2), start=starts, shape=[data.crop_size] * 2, axes=[0, 1])
        pipe.set_outputs(fn.flip(both, horizontal=flips))
    return pipe


def _diagnose(error: RuntimeError, feed: Feed, positions: range) -> Exception:
    """The InputError that Pillow has for one of the pairs in work, else what DALI said."""
    for p in positions:
        try:
            read_pair(feed.item(p)[0], "AtoB", 3, 3)
        except InputError as broken:
            return broken
    return EnvironmentFailed(f"DALI failed, use loader = 'torch': {' '.join(str(error).split())[-400:]}")


def training_batches(feed: Feed) -> Generator[Batch, None, None]:
    """loader.training_batches through DALI: its CPU backend on a CPU, "mixed" (decoding on the GPU) on a GPU.

    On a GPU, the batches are torch's own memory, written on the stream that is current when a chunk is asked for.
    DALI's output is bound to that stream and kept until the copy out of it has run. The pairs are ones for which
    not_supported_reasons gave none.
    """
    device = with_index(feed.device)
    in_use: deque[tuple[Any, torch.cuda.Event]] = deque()
    pool = ThreadPoolExecutor(max(feed.workers, 1))
    try:
        channels = feed.in_channels, feed.out_channels
        most = max(CHUNK // feed.batch, 1) * feed.batch
        pipe = _pipeline(feed, _source(feed, pool), most, device)
        for lo, _ in feed.chunks():
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            try:
                (out,) = pipe.run(stream)
            except RuntimeError as error:
                in_work = range(lo, min(lo + (PREFETCH + 1) * most, feed.stop * feed.batch))
                raise _diagnose(error, feed, in_work) from None
            seen = torch.from_dlpack(out.as_tensor())  # [n, crop, crop, 6], DALI's memory
            chunk = Batch(*(nchw(part.contiguous()) for part in seen.split(channels, dim=3)))
            if stream is not None:
                in_use.append(((out, seen), stream.record_event()))
                if len(in_use) > PREFETCH:  # so old that waiting for it costs nothing, and bounds the memory
                    in_use[0][1].synchronize()
                    in_use.popleft()
            del out, seen
            yield from feed.slices(chunk)
    finally:
        for _, copied in in_use:
            copied.synchronize()
        pool.shutdown(cancel_futures=True)

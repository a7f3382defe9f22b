"""Reading and writing 8-bit images, and the way between uint8 and [-1, 1]."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from ..errors import EnvironmentFailed, InputError
from ..files import written_aside
from .members import File, Member

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

MAX_PIXELS = 2**26  # of one file, 67 megapixels; checked in the header, before anything is decoded
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"))

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
READ_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "TIFF",
    "PPM",
    "GIF",
)  # no others: some of Pillow's formats start programs
_CONVERTIBLE = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))
_WRITE = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".jfif": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"quality": 95}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
    ".ppm": ("PPM", {}),
    ".pgm": ("PPM", {}),
}
_CHANNELS = {"JPEG": (1, 3), "PPM": (1, 3), "BMP": (1, 3)}  # what a format cannot hold; the others hold 1, 3 and 4
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PASSING = {  # errors of network file systems that may be over in a moment; not every system has all names
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "EHOSTDOWN", "ENOTCONN")
    if hasattr(errno, name)
}
_WAITS = (0.1, 1.0, 5.0)  # seconds before a file is read again


def retried(read: Callable[[], T], path: str | File) -> T:
    """What `read` gives, which reads `path`; tried again after an error that may pass.

    EnvironmentFailed where it does not pass; any other error is `read`'s own.
    """
    waits = iter(_WAITS)
    while True:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            if (wait := next(waits, None)) is None:
                reason = f"{error.strerror}, {len(_WAITS) + 1} times"
                raise EnvironmentFailed(f"{path}: {reason}; check the disk or the network it is on") from error
        time.sleep(wait)


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 as far as it has been read; 1 where there is none or the block is damaged."""
    try:
        # The base method: PNG's own decodes the whole image to look for a late block.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block must not cost a good picture; viewers show it unrotated too
        return 1
    return value if value in _UPRIGHT else 1


def to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit gray to "L" by v / 257, rounded; anything that Pillow converts to 8 bit sensibly as it is."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen:
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode not in _CONVERTIBLE:
        kind = {"I": "32-bit integer", "F": "floating point"}.get(image.mode, image.mode)
        raise InputError(f"{kind} images are not supported; convert it to 8-bit gray, RGB or RGBA")
    return image


def open_image(path: str | File, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of a file, fully decoded, upright and 8 bit, in one of Pillow's modes.

    16-bit gray is scaled by v / 257 and rounded; of 16-bit colour Pillow keeps the high byte. Anything that is not
    a whole image of a known format, has over max_pixels, or has 32-bit samples raises InputError naming the file; a
    disk or network that goes on failing raises EnvironmentFailed.
    """
    try:
        return retried(partial(_decoded, path, max_pixels), path)
    except EnvironmentFailed:
        raise
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{path}: over the limit of {max_pixels / 1e6:.4g} megapixels; scale it down") from None
    except MemoryError:
        raise EnvironmentFailed(f"{path}: not enough memory to decode it") from None
    except Exception as error:  # damaged files make Pillow raise nearly every type there is
        missing = isinstance(error, OSError) and error.strerror
        reason = missing or f"not a readable image ({' '.join(str(error).split()) or type(error).__name__})"
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image of a known format ({', '.join(READ_FORMATS)})"
        raise InputError(f"{path}: {reason}") from None


def _decoded(path: str | File, max_pixels: int) -> Image.Image:
    opened = path.open() if isinstance(path, Member) else nullcontext(path)
    with opened as file, Image.open(file, formats=READ_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise InputError(
                f"{width}x{height} pixels are over the limit of {max_pixels / 1e6:.4g} megapixels; scale it down"
            )
        image.load()
        upright = to_8_bit(image)
        turn = _UPRIGHT.get(orientation(image))
        return upright if turn is None else upright.transpose(turn)


def as_array(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 [H, W, channels] of an open image: 1 gray, 3 RGB, 4 RGBA. Alpha is dropped for 1 and 3."""
    if channels not in _MODES:
        raise InputError(f"channels = {channels}: images have 1 (gray), 3 (RGB) or 4 (RGBA)")
    array = np.array(image.convert(_MODES[channels]))
    return array[:, :, None] if channels == 1 else array


def read_image(path: str | Path, channels: int = 3, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image file as uint8 [H, W, channels]; channels 1 is gray (ITU-R 601), 3 RGB, 4 RGBA.

    EXIF orientation is applied, palettes and gray are expanded, alpha is dropped for 1 and 3 channels (not blended)
    and 255 where the file has none. See open_image for 16 bit and for what is refused with InputError.
    """
    if channels not in _MODES:
        raise InputError(f"{path}: channels = {channels}: images have 1 (gray), 3 (RGB) or 4 (RGBA)")
    return as_array(open_image(path, max_pixels), channels)


def natural_channels(image: Image.Image) -> int:
    """The fewest channels that hold an open image: 1 gray, 3 colour, 4 with transparency."""
    if image.has_transparency_data:
        return 4
    return 1 if image.mode in ("1", "L") else 3


def write_image(
    path: str | Path,
    array: np.ndarray,  # [H, W, C] uint8, C = 1, 3 or 4
) -> None:
    """Write an image by the path's suffix; JPEG and WebP are lossy at quality 95.

    It is written aside and renamed, so that a file of that name is always whole. A suffix, shape or place that
    cannot be written raises InputError; a full or failing disk raises EnvironmentFailed and leaves nothing behind.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITE:
        raise InputError(f"{path}: cannot write {path.suffix or 'no suffix'}; allowed are {', '.join(_WRITE)}")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in _MODES or 0 in array.shape:
        raise InputError(f"{path}: an image is uint8 [H, W, 1, 3 or 4], not {array.dtype} {list(array.shape)}")
    kind, options = _WRITE[path.suffix.lower()]
    allowed = (1,) if path.suffix.lower() == ".pgm" else _CHANNELS.get(kind, (1, 3, 4))
    if array.shape[2] not in allowed:
        what = {1: "gray", 3: "colour", 4: "transparent (RGBA)"}[array.shape[2]]
        raise InputError(f"{path}: {path.suffix} cannot hold {what} images; use .png")
    image = Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array))
    with written_aside(path) as aside:
        image.save(aside, kind, **options)


def to_unit(
    x: torch.Tensor,  # any shape, uint8
) -> torch.Tensor:
    """x / 127.5 - 1 in float32: what the networks see, in [-1, 1]."""
    import torch

    if x.dtype != torch.uint8:
        raise InputError(f"to_unit takes uint8, not {x.dtype}")
    return x.to(torch.float32) / 127.5 - 1


def to_uint8(
    x: torch.Tensor,  # any shape, float in [-1, 1]; beyond is clamped
) -> torch.Tensor:
    """(x + 1) * 127.5 rounded to uint8, the inverse of to_unit. junyanz' code truncates: up to one level darker.

    NaN becomes 0 (black) on every device, where torch's own cast is undefined; look for NaN before this call.
    """
    import torch

    if not x.is_floating_point():
        raise InputError(f"to_uint8 takes floats in [-1, 1], not {x.dtype}")
    levels = ((x.to(torch.float32) + 1) * 127.5).round().clamp(0, 255)
    return torch.nan_to_num(levels, nan=0.0).to(torch.uint8)

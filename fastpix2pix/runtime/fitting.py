"""Which part of a picture is translated and at what size: the same of images and of video."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Fitted
from ..data.images import MAX_PIXELS
from ..data.jitter import resize
from ..errors import InputError

Size = tuple[int, int]  # height, width
Box = tuple[int, int, int, int]  # top, left, height, width


def fit_picture(
    source: Size,
    fit: str,  # pad, resize, crop or tile
    size: Size | None,  # asked for
    trained: int,  # side of the pictures that the model was trained on
) -> tuple[Box, Size]:
    """(the part of the source that is used, the size it is scaled to).

    - pad, tile: the whole picture at its own size; with `size`, scaled to lie inside it.
    - resize: the whole picture scaled to `size` (or the training size), whatever its aspect.
    - crop: the largest centred part of the aspect of `size` (or the training size), scaled to it.

    Raises InputError for a size of more than data.images.MAX_PIXELS.
    """
    height, width = source
    if size and size[0] * size[1] > MAX_PIXELS and fit in ("resize", "crop"):
        raise InputError(f"size = {size[0]}x{size[1]}: {size[0] * size[1]} pixels; allowed are {MAX_PIXELS}")
    if fit in ("pad", "tile"):
        return (0, 0, height, width), source if size is None else _inside(source, size)
    picture = size or (trained, trained)
    if fit == "resize":
        return (0, 0, height, width), picture
    tall, wide = _inside(picture, source, grow=True)
    return ((height - tall) // 2, (width - wide) // 2, tall, wide), picture


def size_asked(
    options: Fitted,
    described: dict[str, Any],  # of Engine.describe
) -> Size | None:
    """--size; without one, what is scaled anyway is scaled to what an engine of one size takes."""
    only = {(height, width) for height, width in described.get("sizes", ())}
    return options.sides or (only.pop() if len(only) == 1 and options.fit in ("resize", "crop") else None)


def fit_image(
    image: NDArray[np.uint8],  # [H, W, C], C = 1, 3 or 4
    options: Fitted,
    described: dict[str, Any],  # of Engine.describe
    trained: int,  # side of the pictures that the model was trained on
) -> NDArray[np.uint8]:
    """What of an image is translated, scaled as training scales (Pillow's bicubic)."""
    source = (image.shape[0], image.shape[1])
    (top, left, height, width), size = fit_picture(source, options.fit, size_asked(options, described), trained)
    return resize(image[top : top + height, left : left + width], size)


def _inside(picture: Size, frame: Size, grow: bool = False) -> Size:
    """The largest size of a picture's aspect that fits into a frame; not above its own unless `grow`."""
    scale = min(frame[0] / picture[0], frame[1] / picture[1])
    if not grow:
        scale = min(scale, 1.0)
    return max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale))

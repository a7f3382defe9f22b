"""What a pixel conversion computes, in numpy: the specification of csrc/, slow and plain.

The arguments are those of `_native.InputSpec` and `_native.OutputSpec`. `real` is the precision of every operation:
with float64 the functions are the definition; with float32 they take the same steps in the same order as csrc/, whose
CPU and CUDA code give the same bits.

Conventions: levels are 0..255, units -1..1. The chroma of nv12 and yuv420 stands for its whole 2x2 block: it is
repeated on the way in, and the mean of the block on the way out, where an odd last row or column stands for two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.uint8]  # packed [H, W, C]; nv12 [H, W], [h, w, 2]; yuv420 [H, W], [h, w], [h, w]; h, w halved, up
Floats = NDArray[Any]  # of `real`
Size = tuple[int, int]  # height, width
Box = tuple[int, int, int, int]  # top, left, height, width


def network_input(
    planes: Sequence[Plane],
    *,
    format: str,
    frame: Size,
    network: Size,
    crop: Box | None = None,  # of the frame
    place: Box | None = None,  # of the network's input; the crop is resized to it
    border: str = "reflect",  # around `place`: reflect or constant
    fill: float = 0.0,  # level of a constant border
    filter: str = "bicubic",
    matrix: str = "bt709",
    range: str = "limited",
    layout: str = "nchw",
    dtype: str = "float32",
    real: type = np.float64,
) -> Floats:  # [3, H, W] or [H, W, 3] of dtype, in -1..1
    """The tensor that the network gets for a frame."""
    top, left, height, width = crop or (0, 0, *frame)
    levels: Floats = _components(planes, format, frame)[top : top + height, left : left + width].astype(real)
    top, left, height, width = place or (0, 0, *network)
    levels = _resized(levels, (height, width), filter)
    if _is_yuv(format):
        levels = _rgb_of_yuv(levels, Colour.of(matrix, range, real))
    rows, columns = np.arange(network[0]) - top, np.arange(network[1]) - left
    canvas = levels[_reflected(rows, height)[:, None], _reflected(columns, width)]
    if border == "constant":
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        canvas = np.where(inside[..., None], canvas, real(fill))
    units = _clamped(canvas) / real(127.5) - real(1.0)
    return np.ascontiguousarray(units if layout == "nhwc" else units.transpose(2, 0, 1)).astype(dtype)


def frame_planes(
    output: Floats,  # [3, H, W] or [H, W, 3], nominally in -1..1
    *,
    format: str,
    frame: Size,
    network: Size,
    region: Box | None = None,  # of the network's output; it is resized to the frame
    filter: str = "bicubic",
    matrix: str = "bt709",
    range: str = "limited",
    layout: str = "nchw",
    dtype: str = "float32",
    real: type = np.float64,
) -> list[Plane]:
    """The frame made of a network's output: clamped, rounded to nearest, half to even; NaN is level 0, alpha 255."""
    top, left, height, width = region or (0, 0, *network)
    units: Floats = (output if layout == "nhwc" else output.transpose(1, 2, 0)).astype(real)
    units = _resized(units[top : top + height, left : left + width], frame, filter)
    levels = _clamped((units + real(1.0)) * real(127.5))
    if not _is_yuv(format):
        levels = levels[..., ::-1] if format == "bgr" else levels
        alpha = [np.full((*frame, 1), 255, np.uint8)] if format == "rgba" else []
        return [np.concatenate([_bytes(levels), *alpha], axis=2)]
    colour = Colour.of(matrix, range, real)
    y = _bytes(_clamped(_weighted(levels, colour.y_of, colour.y_offset)))
    even = np.pad(levels, ((0, frame[0] % 2), (0, frame[1] % 2), (0, 0)), mode="edge")
    blocks = (even[::2, ::2] + even[::2, 1::2]) + (even[1::2, ::2] + even[1::2, 1::2])
    mean = blocks * real(0.25)
    u, v = (_bytes(_clamped(_weighted(mean, weights, real(128.0)))) for weights in (colour.u_of, colour.v_of))
    return [y, np.stack([u, v], axis=2)] if format == "nv12" else [y, u, v]


def resize_weights(size: int, out: int, filter: str) -> NDArray[np.float64]:  # [out, size], rows sum to 1
    """How much of each source position is in each output position: Pillow's bilinear and bicubic, and exact overlap.

    When reducing, bilinear and bicubic (Keys, a = -0.5) are stretched by the scale, so that nothing aliases.
    """
    scale = size / out
    edges, positions = np.arange(out)[:, None] * scale, np.arange(size)
    if filter == "area":
        weights = np.minimum(positions + 1.0, edges + scale) - np.maximum(positions, edges)
        weights = np.maximum(weights, 0.0)
    else:
        x = np.abs((positions + 0.5 - (np.arange(out)[:, None] + 0.5) * scale) / max(scale, 1.0))
        if filter == "bilinear":
            weights = np.maximum(1.0 - x, 0.0)
        else:
            near = (1.5 * x - 2.5) * x * x + 1.0
            far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights[np.abs(weights) < 1e-9] = 0.0
    return weights / weights.sum(axis=1, keepdims=True)


class Colour(NamedTuple):
    """Coefficients between R'G'B' and 8-bit Y'CbCr, after ITU-R BT.601-7 and BT.709-6; all of `real`."""

    y_offset: Any
    y_scale: Any
    rgb_of_u: Floats  # [3]
    rgb_of_v: Floats
    y_of: Floats  # [3], of red, green and blue
    u_of: Floats
    v_of: Floats

    @classmethod
    def of(cls, matrix: str, range: str, real: type) -> Colour:
        kr, kb = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[matrix]
        luma, chroma = {"limited": (219 / 255, 224 / 255), "full": (1.0, 1.0)}[range]
        k = np.array([kr, 1.0 - kr - kb, kb])
        u, v = chroma / (2.0 * (1.0 - kb)), chroma / (2.0 * (1.0 - kr))  # U - 128 = u * (blue - luma of the pixel)
        return cls(
            y_offset=real(16.0 if range == "limited" else 0.0),
            y_scale=real(1.0 / luma),
            rgb_of_u=np.array([0.0, -kb / k[1] / u, 1.0 / u]).astype(real),
            rgb_of_v=np.array([1.0 / v, -kr / k[1] / v, 0.0]).astype(real),
            y_of=(luma * k).astype(real),
            u_of=(u * (np.array([0.0, 0.0, 1.0]) - k)).astype(real),
            v_of=(v * (np.array([1.0, 0.0, 0.0]) - k)).astype(real),
        )


def _is_yuv(format: str) -> bool:
    return format in ("nv12", "yuv420")


def _components(planes: Sequence[Plane], format: str, frame: Size) -> Plane:
    """[H, W, 3]: red, green, blue, or Y, U, V with the chroma repeated."""
    if not _is_yuv(format):
        return planes[0][..., 2::-1] if format == "bgr" else planes[0][..., :3]
    chroma = planes[1] if format == "nv12" else np.stack(planes[1:], axis=2)
    chroma = chroma.repeat(2, axis=0).repeat(2, axis=1)[: frame[0], : frame[1]]
    return np.concatenate([planes[0][..., None], chroma], axis=2)


def _resized(x: Floats, size: Size, filter: str) -> Floats:
    """[H, W, C] -> [*size, C]: first the rows, then the columns; nothing where the size is right already."""
    if x.shape[:2] == size:
        return x
    rows = _filtered(x, resize_weights(x.shape[0], size[0], filter).astype(x.dtype))
    return _filtered(rows.swapaxes(0, 1), resize_weights(x.shape[1], size[1], filter).astype(x.dtype)).swapaxes(0, 1)


def _filtered(x: Floats, weights: Floats) -> Floats:
    """Sums over the first axis, one source line after the other, as the order decides the last bit."""
    sums = np.zeros((len(weights), *x.shape[1:]), x.dtype)
    for j in range(len(x)):
        used = weights[:, j] != 0.0  # a NaN that weighs nothing does not spread; csrc/ promises that of rows
        sums[used] += weights[used, j].reshape(-1, *[1] * (x.ndim - 1)) * x[j]
    return sums


def _rgb_of_yuv(yuv: Floats, colour: Colour) -> Floats:
    y = (yuv[..., 0] - colour.y_offset) * colour.y_scale
    u, v = yuv[..., 1] - 128, yuv[..., 2] - 128
    green = (y + colour.rgb_of_u[1] * u) + colour.rgb_of_v[1] * v
    return np.stack([y + colour.rgb_of_v[0] * v, green, y + colour.rgb_of_u[2] * u], axis=-1)


def _weighted(rgb: Floats, weights: Floats, offset: Any) -> Floats:
    return offset + ((weights[0] * rgb[..., 0] + weights[1] * rgb[..., 1]) + weights[2] * rgb[..., 2])


def _clamped(levels: Floats) -> Floats:
    """0..255; NaN becomes 0."""
    levels = np.where(levels > 0, levels, levels.dtype.type(0))
    return np.where(levels < 255, levels, levels.dtype.type(255))


def _bytes(levels: Floats) -> Plane:
    return np.rint(levels).astype(np.uint8)


def _reflected(positions: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """Indices into a line that goes on to and fro without repeating its ends; a line of one is repeated."""
    if size == 1:
        return np.zeros_like(positions)
    positions = positions % (2 * (size - 1))
    return np.minimum(positions, 2 * (size - 1) - positions)

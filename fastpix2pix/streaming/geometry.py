"""How a source's picture gets into the network and what of the network's output is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..runtime.fitting import Box, Size, fit_picture


@dataclass(frozen=True)
class Geometry:
    """crop of the frame -> scaled to `place` in the network's input, reflected around it -> `region` is the output."""

    crop: Box  # of the source's frame
    network: Size
    place: Box  # where the picture lies in the network's input
    region: Box  # what of the network's output is shown; the picture, or one row or column more

    @property
    def output(self) -> Size:
        """Of the pictures that come out."""
        return self.region[2:]


def fit_into(
    source: Size,
    fit: str,  # pad, resize, crop or tile
    size: Size | None,  # asked for
    trained: int,  # side of the pictures that the model was trained on
    multiple: int,  # of pixels, that the network takes
    even: bool,  # the sink takes even sizes only
) -> Geometry:
    """The geometry of a fit: that of `fit_picture`, and what is no multiple is padded by reflection.

    An odd size for a sink that takes even ones is shown with one row or column of that padding: a network's size is
    even, so there is one.
    """
    crop, picture = fit_picture(source, fit, size, trained)
    network = (_up(picture[0], multiple), _up(picture[1], multiple))
    top, left = (network[0] - picture[0]) // 2, (network[1] - picture[1]) // 2
    shown = tuple(side + (side % 2 if even else 0) for side in picture)
    return Geometry(crop, network, (top, left, *picture), (top, left, shown[0], shown[1]))


def check_fixed(geometry: Geometry, source: Size, described: dict[str, Any]) -> None:
    """Refuse what an engine of some sizes does not take, before anything is made."""
    sizes = described.get("sizes")
    if not sizes:
        return
    least, most = sizes[0], sizes[-1]
    if not all(low <= side <= high for low, side, high in zip(least, geometry.network, most, strict=True)):
        takes = " to ".join(dict.fromkeys(f"{width}x{height}" for height, width in (least, most)))
        raise InputError(
            f"{geometry.network[1]}x{geometry.network[0]} (width x height, padded) from a source of {source[1]}x"
            f"{source[0]}: this engine takes {takes}; use fit = resize or crop, or build one with "
            f"size = {geometry.network[0]}x{geometry.network[1]}"
        )


def _up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple

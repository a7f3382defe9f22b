"""Rasterise a facade, a list of parts in unit coordinates, into its label map and into a shaded picture.

The picture is painted as colour, height and glow maps at twice the size; sunlight, cast shadows, edges and ambient
occlusion then come from the height map alone, so that every part is lit by the same sun.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]

# What a label map is made of: every pixel is one of these colours.
PALETTE: dict[str, tuple[int, int, int]] = {
    "sky": (0, 0, 120),
    "brick": (0, 0, 255),
    "ochre": (0, 80, 255),
    "rose": (100, 0, 255),
    "sage": (0, 120, 190),
    "stone": (90, 90, 200),
    "tile": (150, 0, 80),
    "slate": (90, 0, 140),
    "window": (0, 170, 255),
    "trim": (0, 255, 255),  # surrounds, sills and mouldings of windows and doors
    "cornice": (85, 255, 170),
    "deco": (255, 170, 0),  # pediments, keystones, quoins, bands
    "shutter": (255, 255, 0),
    "balcony": (170, 255, 85),
    "door": (255, 85, 0),
    "shop": (255, 0, 0),
    "awning": (255, 0, 150),
    "pillar": (255, 200, 150),
    "plant": (0, 160, 60),
    "trunk": (110, 70, 20),
    "ground": (70, 70, 70),
}
WALLS = ("brick", "ochre", "rose", "sage", "stone")

# Half the width of a part at height v of its box (0 top, 1 bottom), as a fraction; b is the part's bend.
OUTLINES: dict[str, Callable[[Array, float], Array]] = {
    "arch": lambda v, b: np.sqrt(np.clip(1 - np.clip(1 - v / b, 0, None) ** 2, 0, 1)),
    "slope": lambda v, b: b + (1 - b) * v,
    "steps": lambda v, b: np.ceil(np.clip(v, 1e-6, 1) * b) / b,
    "bell": lambda v, b: np.where(v < b, np.sqrt(np.clip(v / b, 0, 1)) * 0.45, 0.45 + 0.55 * ((v - b) / (1 - b)) ** 2),
    "oval": lambda v, b: np.sqrt(np.clip(1 - (2 * v - 1) ** 2, 0, 1)),
}


@dataclass(frozen=True)
class Part:
    """One labelled thing of a facade; later parts cover earlier ones."""

    label: str  # a key of PALETTE
    box: tuple[float, float, float, float]  # left, top, right, bottom as fractions of the picture
    style: str = "stone"  # wall of the house it belongs to: decides its colours
    relief: float = 0.0  # how far it stands out of the wall, as a fraction of the picture
    outline: str = "rect"  # rect or a key of OUTLINES
    bend: float = 1.0  # parameter of the outline

    def inset(self, t: float) -> Part:
        """The same shape, smaller by t on every side."""
        x0, y0, x1, y1 = self.box
        return replace(self, box=(x0 + t, y0 + t, x1 - t, y1 - t))


class Region(NamedTuple):
    """The pixels of a part's box on an n x n grid, and which of them it covers."""

    where: tuple[slice, slice]
    x: Array  # [1, w] pixel centres across the picture, 0..1
    y: Array  # [h, 1] pixel centres down the picture, 0..1
    u: Array  # [1, w] across the box, 0..1
    v: Array  # [h, 1] down the box, 0..1
    inside: Array | bool  # [h, w], or True where it covers the whole box


def region(part: Part, n: int) -> Region:
    """The pixels of an n x n grid whose centres lie in the part."""
    x0, y0, x1, y1 = part.box
    left, top, right, bottom = (min(n, max(0, int(np.ceil(e * n - 0.5)))) for e in part.box)
    x = ((np.arange(left, max(left, right), dtype=np.float32) + 0.5) / n)[None]
    y = ((np.arange(top, max(top, bottom), dtype=np.float32) + 0.5) / n)[:, None]
    u, v = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
    inside = True if part.outline == "rect" else np.abs(2 * u - 1) <= OUTLINES[part.outline](v, part.bend)
    return Region((slice(top, max(top, bottom)), slice(left, max(left, right))), x, y, u, v, inside)


def label_map(parts: list[Part], size: int) -> Array:
    """The label map, uint8 [size, size, 3]: flat colours of PALETTE."""
    index = {label: i for i, label in enumerate(PALETTE)}
    drawn = np.zeros((size, size), np.uint8)
    for part in parts:
        r = region(part, size)
        np.copyto(drawn[r.where], index[part.label], where=r.inside)
    return np.array(list(PALETTE.values()), np.uint8)[drawn]


@functools.cache
def tint(code: str) -> Array:
    """A colour "rrggbb" as linear light, [3, 1, 1]; gamma 2 throughout."""
    return (np.frombuffer(bytes.fromhex(code), np.uint8).astype(np.float32) / 255).reshape(3, 1, 1) ** 2


def smooth(x: Array, low: float, high: float) -> Array:
    """0 below low, 1 above high, a smooth step between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: Array, b: Array, t: Array | float) -> Array:
    return a + (b - a) * t


class Style(NamedTuple):
    """Colours that go with a wall, so that the label of the wall tells them."""

    wall: str
    trim: str
    accent: str  # doors, shutters, shop fronts, awnings
    frame: str  # of windows
    iron: bool  # iron railings, or a stone balustrade


STYLES = {
    "brick": Style("a9563f", "e3d8c3", "2c5a49", "efece2", True),
    "ochre": Style("ddb46c", "f1e8d4", "3a6a86", "e9e2d2", True),
    "rose": Style("d39585", "f2e4da", "55705f", "f0ebe3", False),
    "sage": Style("a4b99c", "efeee0", "8b4335", "f0ece2", True),
    "stone": Style("c6baa2", "dfd6c3", "38465f", "57493d", False),
}


class Canvas:
    """Colour (linear), height and glow (share of light of its own) of a picture being painted, n x n pixels."""

    def __init__(self, n: int, rng: np.random.Generator) -> None:
        self.n = n
        self.colour = np.zeros((3, n, n), np.float32)
        self.height = np.zeros((n, n), np.float32)
        self.glow = np.zeros((n, n), np.float32)
        self.table = rng.random((64, 64), dtype=np.float32)  # one number per brick, tile, slab
        # Noise grids are fixed in number and size, so that a picture's texture is the same at every size.
        self.fine, *octaves = (self._noise(rng, k) for k in (110, 4, 8, 16, 40))
        weights = (0.45, 0.28, 0.17, 0.1)
        self.noise = np.sum([w * octave for w, octave in zip(weights, octaves, strict=True)], axis=0)  # about -0.5..0.5
        self.sun, self.lean, self.steep, self.warmth, self.cloud = rng.random(5).tolist()
        self.hue = rng.uniform(-1, 1, (3, 1, 1)).astype(np.float32)

    def _noise(self, rng: np.random.Generator, cells: int) -> Array:
        grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        return np.asarray(grid.resize((self.n, self.n), Image.Resampling.BICUBIC))

    def put(
        self, r: Region, colour: Array, height: Array | float, glow: Array | float = 0.0, where: Any = True
    ) -> None:
        """Paint a region where it is inside its part and `where` holds."""
        where = r.inside if where is True else where if r.inside is True else r.inside & where
        for plane, value in zip(self.colour, colour, strict=True):
            np.copyto(plane[r.where], value, where=where)
        np.copyto(self.height[r.where], height, where=where)
        np.copyto(self.glow[r.where], glow, where=where)

    def cell(self, r: Region, wide: float, tall: float, shift: float = 0.5) -> tuple[Array, Array, Array]:
        """Courses of bricks: position in the cell across and down, 0..1, and a number 0..1 per cell."""
        down = r.y / tall
        row = np.floor(down).astype(np.intp)
        across = r.x / wide + shift * (row % 2)
        column = np.floor(across).astype(np.intp)
        return across - column, down - row, self.table[row % 64, column % 64]

    def picture(self, rng: np.random.Generator) -> Array:
        """Light the scene and reduce it to uint8 [n / 2, n / 2, 3]."""
        n, h = self.n, self.height
        # Shadows: highest thing between a pixel and the sun, above the ray. A point d higher shades down and right of
        # it by d * (steep, lean); doubling the distance looked back takes log2(reach) steps.
        steep, lean = 0.95 + 0.35 * self.steep, 0.4 + 0.35 * self.lean
        drop, above, k = 1 / (n * steep), h, 1
        while k * drop < 0.06:
            dy, dx = round(k * drop * steep * n), max(1, round(k * drop * lean * n))
            higher = above.copy()
            np.maximum(above[dy:, dx:], above[:-dy, :-dx] - k * drop, out=higher[dy:, dx:])
            above, k = higher, 2 * k
        lit = np.clip(1 - (above - h) / 0.005, 0, 1)
        slope = np.zeros_like(h)
        slope[1:, 1:] = np.clip((h[1:, 1:] - h[:-1, :-1]) * (n * 0.35), -0.4, 0.25)
        solid = Image.fromarray(np.clip(h, -0.012, 0.045))
        coarse = solid.resize((max(8, n // 18),) * 2, Image.Resampling.BOX).resize((n, n), Image.Resampling.BICUBIC)
        occlusion = np.clip(1 - 16 * (np.asarray(coarse) - np.asarray(solid)), 0.55, 1.1)
        direct = lit * (1 + slope) * (0.78 + 0.12 * self.sun)
        sunlight = np.array([1.12, 1.0, 0.86 - 0.1 * self.warmth], np.float32)
        skylight = np.array([0.25, 0.29, 0.36], np.float32)
        for plane, sun, sky in zip(self.colour, sunlight, skylight, strict=True):
            plane *= self.glow + (1 - self.glow) * (sun * direct + sky * occlusion)
        c: Array = self.colour
        c = (c[:, ::2, ::2] + c[:, 1::2, ::2] + c[:, ::2, 1::2] + c[:, 1::2, 1::2]) / 4
        c = np.sqrt(c / (1 + 0.22 * c)) * 0.985 + 0.015
        c += rng.normal(0, 0.008, c.shape[1:]).astype(np.float32)
        return np.ascontiguousarray(np.clip(c * 255 + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))

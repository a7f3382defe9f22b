"""How each labelled part of a facade looks: one painter per label, each a colour, a height and a glow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .facade_canvas import STYLES, Array, Canvas, Part, Region, mix, region, smooth, tint

Painter = Callable[[Canvas, Part, Region, float], None]  # the last: a number 0..1 that is the part's own


def sky(c: Canvas, p: Part, r: Region, k: float) -> None:
    zenith, horizon = mix(tint("4f8ace"), tint("6f9ccb"), c.warmth), mix(tint("bdd8ee"), tint("eadfd0"), c.warmth)
    rows, columns = (np.arange(s.start, s.stop) for s in r.where)
    rows = c.n - 1 - np.abs(c.n - 1 - (2.2 * rows).astype(np.intp))  # mirrored and squeezed: clouds are wide
    puff = c.noise[np.abs(rows)][:, columns]
    cover = smooth(puff, 0.18 - 0.36 * c.cloud, 0.52 - 0.26 * c.cloud) * (0.95 - 0.6 * r.v)
    shade = mix(tint("f6f5f2"), tint("c9d0d9"), smooth(puff, 0.2, 0.75))
    c.put(r, mix(mix(zenith, horizon, smooth(r.v, -0.1, 0.95)), shade, cover), -0.1, 1.0)


def ground(c: Canvas, p: Part, r: Region, k: float) -> None:
    across = (r.x - 0.5) / (0.075 * (0.7 + 0.6 * r.v)) + 0.5 * (r.v > 0.25)  # slabs seen from above, a little
    joint = (across % 1 < 0.06) | (np.abs(r.v - 0.25) < 0.012)
    value = c.table[np.floor(across).astype(np.intp) % 64, (r.v > 0.25).astype(np.intp)]
    slabs = tint("aea89e") * (0.9 + 0.16 * value + 0.2 * c.noise[r.where]) * np.where(joint, 0.72, 1)
    road = tint("5d5f63") * (1 + 0.16 * c.fine[r.where] + 0.25 * c.noise[r.where])
    colour = np.where(r.v < 0.5, slabs, np.where(r.v < 0.6, tint("c2bdb3") * (0.95 + 0.1 * c.fine[r.where]), road))
    c.put(r, colour, np.where(r.v < 0.6, 0.0, -0.006) + 0 * r.u)


def brick(c: Canvas, p: Part, r: Region, k: float) -> None:
    across, down, value = c.cell(r, 0.046, 0.0186)
    joint = (across < 0.08) | (down < 0.2)
    base = tint(STYLES["brick"].wall) * (1 + 0.1 * c.hue)
    bricks = base * (0.72 + 0.56 * value + 0.3 * c.noise[r.where] + 0.1 * c.fine[r.where])
    c.put(r, np.where(joint, tint("b9a794") * 0.8, bricks), p.relief - np.float32(0.0022) * joint)


def stone(c: Canvas, p: Part, r: Region, k: float) -> None:
    across, down, value = c.cell(r, 0.098, 0.044)
    joint = (across < 0.05) | (down < 0.11)
    base = tint(STYLES["stone"].wall) * (1 + 0.06 * c.hue)
    blocks = base * (0.84 + 0.3 * value + 0.3 * c.noise[r.where] + 0.1 * c.fine[r.where])
    c.put(r, blocks * (1 - np.float32(0.38) * joint), p.relief - np.float32(0.004) * joint + 0.001 * value)


def plaster(c: Canvas, p: Part, r: Region, k: float) -> None:
    streak = c.table[7][(r.x * 64).astype(np.intp) % 64] * smooth(c.noise[r.where], -0.3, 0.5)
    damp = 0.22 * smooth(r.v + 0.25 * c.noise[r.where], 0.82, 1.05)
    shade = 1 + 0.17 * c.noise[r.where] + 0.04 * c.fine[r.where] - 0.1 * streak - damp
    base = tint(STYLES[p.label].wall) * (1 + 0.07 * c.hue)
    c.put(r, base * shade, p.relief + 0.0006 * c.fine[r.where])


def roof(c: Canvas, p: Part, r: Region, k: float) -> None:
    curved = p.label == "tile"
    across, down, value = c.cell(r, 0.024 if curved else 0.032, 0.02)
    lip = down - (0.5 * (2 * across - 1) ** 2 if curved else 0)  # tiles end in a curve, slates straight
    base = mix(tint("a8553b"), tint("b9744c"), 0.5 + 0.5 * c.hue[0, 0, 0]) if curved else tint("5d6672")
    shade = 0.74 + 0.44 * value + 0.35 * c.noise[r.where] - 0.3 * (across < 0.1)
    c.put(r, base * shade * (0.72 + 0.4 * smooth(lip, -0.1, 0.7)), p.relief - 0.03 * (1 - r.v) + 0.003 * lip)


def cornice(c: Canvas, p: Part, r: Region, k: float) -> None:
    steps = np.floor(r.v * 4) / 4
    teeth = (r.v > 0.5) & (r.v < 0.76) & (r.x / 0.02 % 1 < 0.45)
    colour = tint(STYLES[p.style].trim) * (0.9 + 0.16 * c.noise[r.where] - 0.08 * steps)
    c.put(r, colour, p.relief * (1 - 0.75 * steps) + 0.006 * teeth)


def moulding(c: Canvas, p: Part, r: Region, k: float) -> None:
    pale = tint(STYLES[p.style].trim) * (0.9 if p.label == "deco" else 1.0)
    edge = smooth(np.minimum(r.v, 1 - r.v), 0.0, 0.3) if p.label == "deco" else 1.0
    c.put(r, pale * (0.92 + 0.16 * c.noise[r.where] + 0.07 * c.fine[r.where]), p.relief * (0.75 + 0.25 * edge))


def pillar(c: Canvas, p: Part, r: Region, k: float) -> None:
    ends = (r.v < 0.05) | (r.v > 0.94)
    round_ = np.sqrt(np.clip(1 - (1.1 * (2 * r.u - 1)) ** 2, 0, 1))
    flutes = 0.0012 * np.cos(r.u * 2 * np.pi * 4)
    shade = np.where(ends, 1.0, 0.72 + 0.32 * np.cos(np.pi * (r.u - 0.36)) + 0.06 * np.cos(r.u * 2 * np.pi * 4))
    colour = tint(STYLES[p.style].trim) * shade * (0.92 + 0.16 * c.noise[r.where])
    c.put(r, colour, p.relief * np.where(ends, 1.25, round_) + flutes)


def _glass(c: Canvas, p: Part, r: Region, k: float) -> Array:
    """What is seen in a pane: room, curtain or blind, and the sky and the houses opposite as reflection."""
    room = tint("2b333d") * (0.7 + 0.5 * r.v) + 0 * r.u
    if k < 0.45:
        drawn = 0.62 - 0.5 * k + 0.1 * np.cos(4 * r.v)
        folds = tint("e8ddc9") * (0.62 + 0.2 * np.cos(38 * r.u) + 0.1 * r.v)
        room = np.where(np.abs(2 * r.u - 1) > drawn, folds, room)
    elif k < 0.62:
        room = np.where(r.v < 1.6 * (k - 0.3), tint("cfc5ae") * (0.85 + 0.15 * np.cos(60 * r.v)), room)
    elif k > 0.94:
        room = tint("e3a552") * (0.5 + 0.6 * r.v + 0.1 * np.cos(9 * r.u))
    roofs = 0.5 + 0.1 * np.floor(3 * c.table[3][(r.x * 9).astype(np.intp) % 64])
    above = smooth(roofs - r.y + 0.06 * c.noise[r.where], -0.06, 0.06)
    seen = mix(tint("4b4a4a"), mix(tint("8fb6dc"), tint("d3e2ee"), smooth(r.y, 0.1, 0.65)), above)
    slant = r.u + 0.55 * r.v
    streak = smooth(slant, 0.42, 0.48) * (1 - smooth(slant, 0.8, 0.86))
    return mix(room, seen, 0.26 + 0.22 * above + 0.2 * streak)


def window(c: Canvas, p: Part, r: Region, k: float) -> None:
    style = STYLES[p.style]
    wood = tint(style.frame)
    wide, tall = p.box[2] - p.box[0], p.box[3] - p.box[1]
    c.put(r, wood * 0.95, p.relief - 0.004)
    pane = p.inset(min(0.0065, 0.16 * wide))
    r = region(pane, c.n)
    c.put(r, _glass(c, p, r, k), p.relief - 0.011, 0.62)
    columns = 1 if wide < 0.03 else 2 if wide < 0.105 else 3
    across = np.abs((r.u * columns + 0.5) % 1 - 0.5) * wide / columns < 0.0024
    if p.style == "brick":  # sash window: a grid of small panes
        rows = max(2, round(tall / 0.036))
        down = np.abs((r.v * rows + 0.5) % 1 - 0.5) * tall / rows < 0.002
    else:  # casement with a transom
        down = np.abs(r.v - 0.32) * tall < 0.0034
    c.put(r, wood, p.relief - 0.006, 0.0, across | down)


def shutter(c: Canvas, p: Part, r: Region, k: float) -> None:
    slat = r.y / 0.0125 % 1
    border = (np.minimum(r.u, 1 - r.u) < 0.16) | (np.minimum(r.v, 1 - r.v) < 0.05) | (np.abs(r.v - 0.5) < 0.03)
    colour = tint(STYLES[p.style].accent) * (1 + 0.08 * c.hue) * 1.25
    shade = np.where(border, 1.0, 0.6 + 0.5 * slat)
    c.put(r, colour * shade * (1 + 0.15 * c.noise[r.where]), p.relief + np.where(border, 0.001, 0.003 * slat - 0.003))


def balcony(c: Canvas, p: Part, r: Region, k: float) -> None:
    style = STYLES[p.style]
    x0, y0, x1, y1 = p.box
    slab, rail = r.v > 1 - 0.013 / (y1 - y0), r.v < 0.007 / (y1 - y0)
    if style.iron:
        step = r.x / 0.0142 % 1
        bars = (np.abs(step - 0.5) < 0.13) | (np.abs(r.v - 0.24) < 0.02)
        bars = bars | (np.abs(np.hypot(step - 0.5, (r.v - 0.55) * (y1 - y0) / 0.0125) - 0.36) < 0.1)
        bars = bars | (np.minimum(r.u, 1 - r.u) * (x1 - x0) < 0.004)
        metal = tint("2a2d31") + 0 * r.u
    else:
        step = np.abs(r.x / 0.021 % 1 - 0.5)
        bars = step < 0.2 + 0.1 * np.cos(2 * np.pi * (1.5 * r.v - 0.05))
        bars = bars | (np.minimum(r.u, 1 - r.u) * (x1 - x0) < 0.012)
        metal = tint(style.trim) * (1.02 - 0.7 * step)
    c.put(r, metal, p.relief * (0.3 if style.iron else 0.9), 0.0, bars | rail)
    c.put(r, tint(style.trim) * (0.9 + 0.16 * c.noise[r.where]), p.relief, 0.0, slab if style.iron else slab | rail)


def door(c: Canvas, p: Part, r: Region, k: float) -> None:
    style = STYLES[p.style]
    c.put(r, tint(style.accent) * 0.75, p.relief - 0.004)
    leaf = p.inset(0.005)
    r = region(leaf, c.n)
    wide, tall = leaf.box[2] - leaf.box[0], leaf.box[3] - leaf.box[1]
    columns = 1 if wide < 0.045 else 2
    light = min(0.4, 0.045 / tall + 0.05)  # height of the window above the leaves
    v = np.clip((r.v - light) / (1 - light), 0, 1)
    across, down = r.u * columns % 1, v * 3 % 1
    panel = (np.abs(across - 0.5) < 0.32) & (np.abs(down - 0.5) < 0.36)
    wood = tint(style.accent) * (1 + 0.1 * c.hue) * (1.15 + 0.2 * c.noise[r.where]) * np.where(panel, 1.15, 1.0)
    gap = np.abs((r.u * columns + 0.5) % 1 - 0.5) * wide < 0.0016 * columns if columns > 1 else np.zeros_like(r.u, bool)
    c.put(r, wood * np.where(gap, 0.45, 1), p.relief - 0.009 - 0.003 * panel)
    c.put(r, _glass(c, p, r, 0.7), p.relief - 0.011, 0.6, r.v < light - 0.012 / tall)
    knob = np.hypot((r.u - (0.5 + 0.14 / columns)) * wide, (v - 0.55) * tall) < 0.0045
    c.put(r, tint("d8b45a"), p.relief - 0.004, 0.0, knob)


def shop(c: Canvas, p: Part, r: Region, k: float) -> None:
    accent = tint(STYLES[p.style].accent) * (1 + 0.08 * c.hue)
    wide = p.box[2] - p.box[0]
    c.put(r, accent * (1.1 + 0.15 * c.noise[r.where]), np.where(r.v < 0.2, p.relief + 0.004, p.relief) + 0 * r.u)
    letter = c.table[(11 + int(40 * k)) % 64][(r.x / 0.0085).astype(np.intp) % 64]
    sign = (np.abs(r.v - 0.105) < 0.042) & (np.abs(r.u - 0.5) < 0.36) & (letter > 0.22) & (r.x / 0.0085 % 1 > 0.25)
    c.put(r, tint("ecd9a0"), p.relief + 0.005, 0.1, sign)
    lamp = np.abs(r.x / 0.06 % 1 - 0.5)
    room = mix(tint("edc98a"), tint("4a3828"), smooth(r.v + 0.25 * lamp, 0.22, 0.85))
    ware = c.table[(29 + int(30 * k)) % 64][(r.x / 0.022).astype(np.intp) % 64]
    goods = np.stack([c.table[(20 + 3 * i) % 64][(r.x / 0.022).astype(np.intp) % 64] for i in range(3)]) * 0.5 + 0.08
    room = np.where(
        (r.v > 0.82 - 0.36 * ware) & (np.abs(r.x / 0.022 % 1 - 0.5) < 0.36), goods * (0.7 + 0.4 * lamp), room
    )
    slant = (r.u * wide + 0.3 * r.v * 0.2) / 0.09 % 1
    room = mix(room, tint("a9bccb"), 0.1 + 0.2 * smooth(slant, 0.3, 0.36) * (1 - smooth(slant, 0.62, 0.68)))
    posts = np.abs((r.u * max(1, round(wide / 0.085)) + 0.5) % 1 - 0.5) * wide / max(1, round(wide / 0.085)) < 0.0035
    pane = (
        (r.v > 0.24) & (r.v < 0.84) & ~posts & (np.minimum(r.u, 1 - r.u) * wide > 0.007) & (np.abs(r.v - 0.36) > 0.012)
    )
    c.put(r, room, p.relief - 0.008, 0.7, pane)
    c.put(r, accent * 0.8, p.relief - 0.002, 0.0, (r.v > 0.88) & (r.v < 0.97) & (np.abs(r.x / 0.06 % 1 - 0.5) < 0.4))


def awning(c: Canvas, p: Part, r: Region, k: float) -> None:
    wide = p.box[2] - p.box[0]
    stripes = max(3, 2 * round(wide / 0.04) + 1)
    fan = 0.5 + (r.u - 0.5) / (0.92 + 0.08 * r.v)  # stripes spread with the cloth
    cream = np.floor(np.clip(fan, 0, 0.999) * stripes) % 2 == 1
    cloth = np.where(cream, tint("eee6d2"), tint(STYLES[p.style].accent) * (1.3 + 0.15 * c.hue))
    hem = r.v > 0.8
    scallop = r.v > 0.86 + 0.14 * np.abs(np.cos(np.pi * (np.clip(fan, 0, 1) * stripes - 0.5))) ** 0.6
    shade = np.where(hem, 0.75, 0.98 - 0.2 * r.v) * (1 + 0.12 * c.noise[r.where])
    c.put(r, cloth * shade, p.relief * (0.25 + 0.75 * np.minimum(r.v / 0.8, 1)) + 0 * r.u, 0.12, ~scallop)


def plant(c: Canvas, p: Part, r: Region, k: float) -> None:
    dome = 1.0 if p.outline == "rect" else np.sqrt(np.clip(1 - ((2 * r.u - 1) ** 2 + (2 * r.v - 1) ** 2), 0, 1))
    twice = [np.arange(2 * i.start, 2 * i.stop, 2) % c.n for i in r.where]
    leaf = 0.55 * c.fine[r.where] + 0.75 * c.fine[twice[0]][:, twice[1]]
    bright = np.clip(0.4 + 0.36 * leaf + 0.2 * (1 - 2 * r.v) + 0.14 * (1 - 2 * r.u), 0, 1)
    colour = mix(mix(tint("2f5326"), tint("264d33"), k), mix(tint("9bb850"), tint("84b05e"), k), bright)
    c.put(r, colour, p.relief * (0.75 + 0.25 * dome) + 0.006 * leaf)
    if p.box[3] - p.box[1] < 0.035:  # a flower box: blossoms among the leaves
        bloom = np.roll(c.fine, (17, 31), (0, 1))[r.where] > 0.3
        c.put(r, tint(("d8506a", "e9e2e0", "e08a3c")[int(2.99 * k)]), p.relief, 0.1, bloom)


def trunk(c: Canvas, p: Part, r: Region, k: float) -> None:
    bark = c.fine[r.where] + 0.3 * np.cos(r.u * 14)
    c.put(r, tint("6d5a48") * (0.65 + 0.5 * np.cos(np.pi * (r.u - 0.3)) + 0.2 * bark), p.relief + 0.002 * bark)


_named = (sky, ground, brick, stone, cornice, pillar, window, shutter, balcony, door, shop, awning, plant, trunk)
PAINTERS: dict[str, Painter] = {painter.__name__: painter for painter in _named}
PAINTERS |= {"tile": roof, "slate": roof, "trim": moulding, "deco": moulding}
PAINTERS |= {"ochre": plaster, "rose": plaster, "sage": plaster}


def paint(parts: list[Part], size: int, rng: np.random.Generator) -> Array:
    """The picture of a facade, uint8 [size, size, 3], anti-aliased."""
    canvas = Canvas(2 * size, rng)
    for part, own in zip(parts, rng.random(len(parts)), strict=True):
        r = region(part, canvas.n)
        if r.x.size and r.y.size:
            PAINTERS[part.label](canvas, part, r, float(own))
    return canvas.picture(rng)

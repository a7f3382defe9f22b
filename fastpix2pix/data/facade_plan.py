"""Invent a house or a tree: its parts in unit coordinates, back to front."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .facade_canvas import Array, Part

GRID = 128  # edges lie on this grid, so that labels and pictures are crisp at 128 pixels and its multiples
U = 1 / GRID


def snap(x: float) -> float:
    return round(x * GRID) / GRID


class Plan:
    """The parts so far, and the dice."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.parts: list[Part] = []
        self.style = "stone"  # wall of the house being drawn
        self.depth = 0.0  # how far the piece of wall being drawn on stands out

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def chance(self, p: float) -> bool:
        return float(self.rng.random()) < p

    def pick(self, *of: str) -> str:
        return of[int(self.rng.random() * len(of))]

    def add(
        self,
        label: str,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        relief: float = 0,
        shape: str = "rect",
        bend: float = 1,
    ) -> None:
        x0, y0 = snap(x0), snap(y0)
        box = (x0, y0, max(x0 + U, snap(x1)), max(y0 + U, snap(y1)))
        self.parts.append(Part(label, box, self.style, self.depth + relief, shape, bend))


def opening(
    plan: Plan, x: float, top: float, bottom: float, wide: float, shape: str, dress: str, label: str = "window"
) -> None:
    """A window or door centred at x with its surround, sill and ornament."""
    wide, top, bottom = max(snap(wide), 3 * U), snap(top), snap(bottom)
    x0 = snap(x - wide / 2)
    x1 = x0 + wide
    outline = "rect" if shape == "rect" else "arch"
    bend = min(0.9, (wide / 2 if shape == "arch" else wide / 6) / max(U, bottom - top))
    if dress != "sill":
        below = 0 if label == "door" else U
        plan.add("trim", x0 - U, top - U, x1 + U, bottom + below, 0.005, outline, bend)
    if dress in ("gable", "bow"):
        y, hood = top - U, ("slope", 0.0) if dress == "gable" else ("arch", 1.0)
        plan.add("deco", x0 - 2 * U, y - 4 * U, x1 + 2 * U, y, 0.014, *hood)
        plan.add("deco", x0 - 2 * U, y, x1 + 2 * U, y + U, 0.018)
    plan.add(label, x0, top, x1, bottom, 0, outline, bend)
    if dress == "key":
        half = (1.5 if round(wide * GRID) % 2 else 1) * U
        middle = (x0 + x1) / 2
        plan.add("deco", middle - half, top - 2 * U, middle + half, top + 2 * U, 0.01)
    if label == "window":
        plan.add("trim", x0 - 2 * U, bottom, x1 + 2 * U, bottom + (U if dress == "sill" else 2 * U), 0.014)


def storey(
    plan: Plan, edges: Array, top: float, bottom: float, shape: str, dress: str, extra: str, fill: float, oriel: int
) -> None:
    """A row of windows between the edges of the bays; `extra` is what else each has; bay `oriel` stands out."""
    tall, bays = bottom - top, len(edges) - 1
    for i, (a, b) in enumerate(pairwise(edges.tolist())):
        x, bay = (a + b) / 2, b - a
        plan.depth = 0.02 if i == oriel else 0.0
        has_balcony = extra in ("balcony", "gallery") or (extra == "middle" and abs(2 * i + 1 - bays) <= 1)
        low = bottom - (0.05 if has_balcony else 0.25) * tall
        high = top + (0.3 if dress in ("gable", "bow") else 0.2) * tall
        wide = snap(min(fill * bay, 0.95 * (low - high)))
        if extra == "shutter":
            wide = snap(min(wide, 0.42 * bay))
            leaf, x = snap(0.46 * wide), snap(x - wide / 2) + wide / 2
            for left in (x - wide / 2 - U - leaf, x + wide / 2 + U):
                plan.add("shutter", left, high, left + leaf, low, 0.007)
        opening(plan, x, high, low, wide, "rect" if extra == "shutter" else shape, dress)
        if has_balcony and extra != "gallery":
            x, half = snap(x - wide / 2) + wide / 2, min(wide / 2 + 3 * U, bay / 2 - U)
            plan.add("balcony", x - half, low - 7 * U, x + half, low + 2 * U, 0.034)
        elif extra == "flower":
            x0 = snap(x - wide / 2)
            plan.add("plant", x0, low - 2 * U, x0 + wide, low + U, 0.022)
    plan.depth = 0.0
    if extra == "gallery":
        y = snap(bottom - 0.05 * tall)
        plan.add("balcony", edges[0] + U, y - 7 * U, edges[-1] - U, y + 2 * U, 0.036)


def ground_floor(plan: Plan, x0: float, x1: float, edges: Array, top: float, bottom: float) -> None:
    kind = plan.pick("shops", "shops", "shops", "arcade", "house", "house")
    tall, bays = bottom - top, len(edges) - 1
    entrance = bays // 2 if plan.chance(0.6) else int(plan.between(0, bays - 0.01))
    if kind == "arcade":
        plan.add("stone", x0, top, x1, bottom, 0.004)
    elif kind == "house" or plan.style != "brick":
        plan.add("stone", x0, bottom - 6 * U, x1, bottom, 0.006)
    if kind == "shops":
        awnings, pillars = plan.chance(0.75), plan.chance(0.5)
        for run in (range(entrance), range(entrance + 1, bays)):
            for i in range(run.start, run.stop, 2):
                a, b = snap(edges[i]) + 2 * U, snap(edges[min(i + 2, run.stop)]) - 2 * U
                plan.add("shop", a, top + 0.14 * tall, b, bottom - U, 0.004)
                if awnings:
                    y = top + 0.3 * tall
                    plan.add("awning", a - U, y, b + U, y + 0.26 * tall, 0.055, "slope", 0.94)
                if pillars:
                    for x in (a - 3 * U, b + U):
                        plan.add("pillar", x, top + U, x + 2 * U, bottom, 0.014)
    shape = "arch" if kind == "arcade" else plan.pick("rect", "segment")
    for i, (a, b) in enumerate(pairwise(edges.tolist())):
        high = top + 0.24 * tall
        if i == entrance:
            x, wide = (a + b) / 2, snap(min(0.11, 0.56 * (b - a)))
            dress = "key" if kind == "arcade" else plan.pick("frame", "gable", "bow", "key")
            plan.add("stone", x - wide * 0.8, bottom - 2 * U, x + wide * 0.8, bottom, 0.022)
            opening(plan, x, high, bottom - 2 * U, wide, shape, dress, "door")
        elif kind != "shops":
            wide = min(0.6 * (b - a), 0.12)
            opening(plan, (a + b) / 2, high, bottom - 0.27 * tall, wide, shape, "key" if kind == "arcade" else "frame")


def roof(plan: Plan, x0: float, x1: float, top: float, kind: str, height: float, edges: Array, dormers: bool) -> None:
    """What is above the wall's upper edge."""
    wide = x1 - x0
    if kind in ("tile", "slate"):
        for near in (0.12, 0.6) if plan.chance(0.6) else (0.35,):
            x, y = x0 + plan.between(near, near + 0.22) * wide, top - height - plan.between(0.02, 0.045)
            plan.add("brick", x, y, x + 6 * U, top - 0.5 * height, -0.01)
            plan.add("deco", snap(x) - U, y - U, snap(x) + 7 * U, y, -0.004)
        plan.add(kind, x0 - 2 * U, top - height, x1 + 2 * U, top, 0, "slope", 0.86 if kind == "tile" else 0.94)
        hood = plan.pick("slope", "arch")
        for a, b in pairwise(edges.tolist()) if dormers else ():
            x, half, y = snap((a + b) / 2), snap(min(0.25 * (b - a), 0.032)), snap(top - 0.7 * height)
            plan.add("trim", x - half - U, y, x + half + U, top - U, 0.002)
            plan.add("deco", x - half - 2 * U, y - 4 * U, x + half + 2 * U, y + U, 0.012, hood, float(hood == "arch"))
            plan.add("window", x - half, y + 2 * U, x + half, top - 3 * U, 0.002)
    elif kind != "flat":
        half, x = snap(min(wide, 0.9 if kind == "gable" else 0.62) / 2), snap((x0 + x1) / 2)
        if 2 * half < wide - 0.1:
            plan.add(plan.pick("tile", "slate"), x0, top - 0.62 * height, x1, top, 0, "slope", 0.96)
        outline, bend = {"steps": ("steps", 5.0), "bell": ("bell", 0.35), "gable": ("slope", 0.0)}[kind]
        plan.add("deco", x - half - U, top - height - 2 * U, x + half + U, top, 0.006, outline, bend)
        plan.add(plan.style, x - half + U, top - height + U, x + half - U, top, 0, outline, bend)
        opening(plan, x, top - 0.44 * height, top - 0.14 * height, 0.075, "arch", "frame")


def turret(plan: Plan, x: float, kind: str, top: float, bottom: float) -> None:
    """A slim tower on the roof."""
    x, half = snap(x), 8 * U
    plan.add(plan.style, x - half, top + 0.11, x + half, bottom, 0.012)
    opening(plan, x, top + 0.14, bottom - 5 * U, 0.05, "arch", "frame")
    plan.add("cornice", x - half - U, top + 0.1, x + half + U, top + 0.12, 0.026)
    plan.add(kind, x - half - U, top, x + half + U, top + 0.102, 0.03, "slope", 0.0)


def house(plan: Plan, x0: float, x1: float, ground: float, high: float, kind: str) -> None:
    """A house between x0 and x1 from the ground up to the height `high`, roof included."""
    x0, x1 = snap(x0), snap(x1)
    low_roof = {"flat": (0.0, 0.0), "tile": (0.1, 0.16), "slate": (0.11, 0.17)}
    height = plan.between(*low_roof.get(kind, (0.18, 0.24)))
    turrets = kind in ("tile", "slate") and x1 - x0 > 0.5 and plan.chance(0.25)
    top = snap(high + height + 0.06 * turrets)
    storeys = max(2, round((ground - top) / plan.between(0.155, 0.23)))
    bays = max(1, round((x1 - x0) / plan.between(0.14, 0.24)))
    widths, margin = np.ones(bays), 3 * U if x1 - x0 > 0.3 else U
    if bays % 2 and bays > 1 and plan.chance(0.5):
        widths[bays // 2] = plan.between(1.15, 1.5)
    edges = x0 + margin + (x1 - x0 - 2 * margin) * np.concatenate([[0], np.cumsum(widths) / widths.sum()])
    roof(plan, x0, x1, top, kind, height, edges, not turrets and plan.chance(0.75))
    plan.add(plan.style, x0, top, x1, ground)

    first = snap(ground - (ground - top - 0.02) / storeys * 1.12)  # the ground floor is a little higher
    shape = plan.pick("rect", "rect", "segment", "arch")
    dress = plan.pick("sill", "frame", "frame", "key", "gable", "bow")
    fill, corner = plan.between(0.4, 0.58), plan.pick("quoins", "pilasters", "plain", "plain")
    habit = plan.pick("none", "shutter", "balcony", "mixed", "mixed", "flower")
    if corner == "pilasters" and habit != "shutter":
        for e in np.clip(edges, x0 + 2 * U, x1 - 2 * U).tolist():
            x = snap(e - 1.5 * U)
            plan.add("pillar", x, top + U, x + 3 * U, first, 0.012)
    oriel = bays // 2 if bays % 2 and bays > 1 and corner == "plain" and habit in ("none", "flower") else -1
    if oriel >= 0:
        a, b = edges[oriel] + U, edges[oriel + 1] - U
        plan.add("deco", a - U, top, b + U, first, 0.016)
        plan.add(plan.style, a, top, b, first, 0.02)
    bands = plan.chance(0.45) and corner != "pilasters"
    for i, (a, b) in enumerate(pairwise(np.linspace(top + 0.02, first, storeys).tolist())):
        extra = plan.pick("none", "balcony", "middle", "gallery", "flower", "none") if habit == "mixed" else habit
        storey(plan, edges, a, b, shape, dress, extra, fill, oriel)
        if bands and i:
            plan.add("deco", x0, a - U, x1, a + U, 0.008)
    ground_floor(plan, x0, x1, edges, first, ground)
    plan.add("cornice", x0 - U, first - 2 * U, x1 + U, first + U, 0.018)
    if corner == "quoins":
        for j in range(int((first - top - 4 * U) / (5 * U))):
            y, long = top + (4 + 5 * j) * U, (5 if j % 2 else 3) * U
            plan.add("deco", x0, y, x0 + long, y + 4 * U, 0.005)
            plan.add("deco", x1 - long, y, x1, y + 4 * U, 0.005)
    plan.add("cornice", x0 - 2 * U, top - 2 * U, x1 + 2 * U, top + 2 * U, 0.03)
    if turrets:
        for x in (x0 + 9 * U, x1 - 9 * U) if plan.chance(0.4) else ((x0 + x1) / 2,):
            turret(plan, x, kind, max(0.015, top - 0.26), top + U)


def tree(plan: Plan, x: float, ground: float, tall: float) -> None:
    x = snap(x) + U / 2
    plan.add("trunk", x - 1.5 * U, ground - 0.6 * tall, x + 1.5 * U, ground, 0.03)
    kind = plan.pick("round", "round", "poplar", "fir")
    if kind == "fir":
        for low, wide in ((0.12, 0.26 * tall), (0.36, 0.21 * tall), (0.6, 0.15 * tall)):
            y = ground - low * tall
            plan.add("plant", x - wide, y - 0.4 * tall, x + wide, y, 0.05, "slope", 0.0)
    elif kind == "poplar":
        plan.add("plant", x - 0.16 * tall, ground - tall, x + 0.16 * tall, ground - 0.14 * tall, 0.05, "oval")
    else:
        for dx, dy, r in (
            (-0.24, 0.6, 0.25),
            (0.25, 0.62, 0.24),
            (0, 0.55, 0.27),
            (-0.12, 0.8, 0.24),
            (0.13, 0.82, 0.23),
        ):
            cx, cy, r = x + dx * tall, ground - dy * tall, r * tall * plan.between(0.85, 1.1)
            plan.add("plant", cx - r, cy - 0.8 * r, cx + r, cy + 0.8 * r, 0.05, "oval")

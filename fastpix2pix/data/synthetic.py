"""Paired pictures out of nothing: label maps of building facades and the facades they describe.

For trying the library out, for demonstrations and for tests. The picture follows the labels closely (walls of each kind
have their own label, and with it their colours), so that a small network shows visible results within minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError
from ..files import written_aside
from .facade_canvas import PALETTE, WALLS, Array, Part, label_map
from .facade_paint import paint
from .facade_plan import Plan, U, house, snap, tree

__all__ = ["PALETTE", "facade", "write_demo_set"]

_VAL_FIRST = 1_000_000  # index of the first facade of val/: the same ones, however many there are in train/


def _street(rng: np.random.Generator) -> list[Part]:
    """One picture: sky, ground, a house with or without neighbours, and what grows in front of it."""
    plan = Plan(rng)
    ground = snap(plan.between(0.9, 0.935))
    plan.add("sky", 0, 0, 1, ground)
    wall, left, right = (WALLS[i] for i in np.argsort(rng.random(len(WALLS)))[:3])
    setting = plan.pick("terrace", "corner", "free", "free")
    if setting == "corner":
        x0 = plan.between(0.08, 0.2) * plan.chance(0.5)
        x1 = 1.0 if x0 else 1 - plan.between(0.1, 0.24)
    else:
        x0 = plan.between(0.07, 0.15)
        x1 = 1 - x0
    if setting == "terrace":
        for plan.style, a, b in ((left, x0 - 0.2, x0), (right, x1, x1 + 0.2)):
            house(plan, a, b, ground, plan.between(0.1, 0.36), plan.pick("flat", "tile", "slate"))
    elif plan.chance(0.6):
        plan.add("plant", 0, ground - plan.between(0.05, 0.1), 1, ground, -0.02)  # a hedge
    plan.style = wall
    kinds = ["flat", "tile", "slate", "tile", "slate"] + ["steps", "bell", "gable"] * (x1 - x0 < 0.9)
    house(plan, x0, x1, ground, plan.between(0.07, 0.17), plan.pick(*kinds))
    plan.add("ground", 0, ground, 1, 1)
    for side, free in ((x0 / 2, x0), ((1 + x1) / 2, 1 - x1)):
        if setting != "terrace" and free > 0 and plan.chance(0.75):
            tree(plan, side, ground + U, plan.between(0.28, 0.45))
    if plan.chance(0.2):
        tree(plan, plan.between(x0 + 0.05, x1 - 0.05), ground + 4 * U, plan.between(0.26, 0.36))
    return plan.parts


def facade(seed: int, index: int, size: int) -> tuple[Array, Array]:
    """Label map and picture of facade number `index`, both uint8 [size, size, 3].

    The same three numbers give the same pixels, and the building is the same at every size (at least 32 pixels). The
    label map holds colours of PALETTE only. Raises InputError for a smaller size or a negative number.
    """
    if size < 32:
        raise InputError(f"size = {size}: must be at least 32 pixels")
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise InputError(f"{name} = {value}: must not be negative")
    parts = _street(np.random.default_rng([seed, index, 0]))
    return label_map(parts, size), paint(parts, size, np.random.default_rng([seed, index, 1]))


def write_demo_set(
    out: Path,
    *,
    train: int = 200,  # pairs in out/train
    val: int = 24,  # pairs in out/val: other facades than those in train
    size: int = 128,  # side of each half in pixels
    seed: int = 0,  # of the facades
    overwrite: bool = False,  # replace an earlier set
    progress: Callable[[int, int], None] | None = None,  # called with pairs written and pairs in all
) -> Path:
    """Write A|B pairs (label left, picture right) as out/train/0001.png ... and out/val/0001.png ...; returns out.

    The folder appears, or is replaced, only when the set is complete. Raises InputError where it exists and is not
    empty; with overwrite, where it holds anything but train and val. EnvironmentFailed where the disk fails.
    """
    out = Path(out).resolve()
    if not 1 <= train <= _VAL_FIRST:
        raise InputError(f"train = {train}: allowed are 1 to {_VAL_FIRST} pairs")
    if val < 0:
        raise InputError(f"val = {val}: must not be negative")
    _check_free(out, overwrite)
    with written_aside(out) as aside:
        done = 0
        for folder, first, count in (("train", 0, train), ("val", _VAL_FIRST, val)):
            if count:
                (aside / folder).mkdir(parents=True)
            for i in range(count):
                pair = np.concatenate(facade(seed, first + i, size), axis=1)
                Image.fromarray(pair).save(aside / folder / f"{i + 1:04d}.png")
                done += 1
                if progress is not None:
                    progress(done, train + val)
    return out


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file: give a folder")
    inside = {entry.name for entry in out.iterdir()}
    if inside and not overwrite:
        raise InputError(f"{out} exists and is not an empty folder: choose another, or overwrite it")
    if other := sorted(inside - {"train", "val"}):
        raise InputError(f"{out} also holds {', '.join(other[:3])}: only a folder of train and val is overwritten")

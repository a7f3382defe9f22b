"""Finding the pairs of a data folder, and reading one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ..config import Direction
from ..errors import InputError
from .images import IMAGE_SUFFIXES, as_array, open_image
from .members import File, Member, members

SPLITS = ("train", "val", "test", "valid")
LAYOUTS = (
    "ROOT/<split>/*.jpg or ROOT/*.jpg (A|B side by side), ROOT/<split>/A + ROOT/<split>/B, ROOT/A + ROOT/B, "
    "ROOT/A/<split> + ROOT/B/<split>, or tar archives ROOT/<split>-*.tar, ROOT/<split>/*.tar, ROOT/*.tar; a split is "
    "train or val (or test, valid)"
)
_SIDE = re.compile(r"(.+)\.(ab|a|b)", re.IGNORECASE)  # stems inside an archive; without a side, a file is A|B
_FOLDERS = {"val": ("val", "test", "valid")}  # folders looked for, in this order


@dataclass(frozen=True)
class Pair:
    """One training example."""

    name: str  # file name without suffix, unique in its split
    a: File  # image A, or A|B side by side where b is None: left half A, right half B
    b: File | None  # image B


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file or folder."""

    path: File
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def first_ten(items: list[str], separator: str = ", ") -> str:
    """Up to ten items, and how many more there are."""
    more = f"{separator}and {len(items) - 10} more" if len(items) > 10 else ""
    return separator.join(items[:10]) + more


def _natural(name: str) -> tuple:
    """Sort key: numbers in a name count as numbers; the name itself decides between 1 and 01."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(p), "") if k % 2 else (0, p) for k, p in enumerate(parts)], name


def _images(folder: Path) -> tuple[dict[str, Path], list[Problem]]:
    """Image files of a flat folder by name, hidden ones left out; the problems are names that occur twice."""
    found: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or path.is_dir():
            continue
        if path.stem in found:
            problems.append(Problem(path, f"same name as {found[path.stem].name}; keep one of them"))
        else:
            found[path.stem] = path
    return found, problems


def _sides(folder: Path) -> tuple[Path, Path | None]:
    """(A, B) of a folder that has them, else (folder of A|B files, None)."""
    a, b = folder / "A", folder / "B"
    if a.is_dir() != b.is_dir():
        there, missing = (a, b) if a.is_dir() else (b, a)
        raise InputError(f"{there} has no counterpart {missing}; accepted: {LAYOUTS}")
    if not a.is_dir():
        return folder, None
    if loose := sorted(path.name for path in _images(folder)[0].values()):
        raise InputError(f"{folder} has A/ and B/ and images beside them ({first_ten(loose)}); keep one of the two")
    return a, b


def _locate(root: Path, split: str) -> tuple[Path, Path | None]:
    """Where a split lies: (A, B), or (folder of A|B files, None)."""
    if not root.is_dir():
        raise InputError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; accepted: {LAYOUTS}")
    names = _FOLDERS.get(split, (split,))
    for name in names:
        if (root / name).is_dir():
            return _sides(root / name)
        a, b = root / "A" / name, root / "B" / name
        if a.is_dir() and b.is_dir():
            return a, b
        if a.is_dir() or b.is_dir():
            there, missing = (a, b) if a.is_dir() else (b, a)
            raise InputError(f"{there} has no counterpart {missing}; accepted: {LAYOUTS}")
    if split == "train":
        return _sides(root)
    raise InputError(f"{root}: no {split} pairs: looked for {', '.join(names)}; accepted: {LAYOUTS}")


def match(a: Path, b: Path | None) -> tuple[list[Pair], list[Problem]]:
    """All pairs of two folders, or of one folder of A|B files, and every file without a partner or with a twin.

    Raises InputError where a folder has no images at all.
    """
    images, problems = _images(a)
    others, more = _images(b) if b is not None else (images, [])
    problems += more
    for folder, found in ((a, images), (b, others)):
        if folder is not None and not found:
            below = sorted(path.name for path in folder.iterdir() if path.is_dir())
            hint = f", only sub-folders ({first_ten(below)}), which are not searched" if below else ""
            raise InputError(f"{folder}: no images{hint}; accepted: {LAYOUTS}")
    if b is not None:
        problems += [Problem(images[k], f"no partner in {b}") for k in sorted(images.keys() - others, key=_natural)]
        problems += [Problem(others[k], f"no partner in {a}") for k in sorted(others.keys() - images, key=_natural)]
    names = sorted(images.keys() & others.keys(), key=_natural)
    return [Pair(k, images[k], others[k] if b is not None else None) for k in names], problems


def archives(root: Path, split: str) -> list[Path]:
    """The tar archives of a split: <split>-*.tar, those in a folder of its name, or for train those without a split."""
    for name in _FOLDERS.get(split, (split,)):
        if found := sorted([*root.glob(f"{name}-*.tar"), *(root / name).glob("*.tar")]):
            return found
    ours = sorted(root.glob("*.tar")) if split == "train" else []
    return [path for path in ours if path.name.partition("-")[0] not in SPLITS]


def match_members(tars: Sequence[Path]) -> tuple[list[Pair], list[Problem]]:
    """match, of files in archives: <name>.a.jpg and <name>.b.jpg, or <name>.ab.jpg or <name>.jpg that is A|B."""
    found: dict[str, dict[str, Member]] = {}
    problems: list[Problem] = []
    for member in (member for tar in tars for member in members(tar)):
        path = PurePosixPath(member.name)
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        stem = str(path.with_suffix(""))
        name, side = (parts[1], parts[2].lower()) if (parts := _SIDE.fullmatch(stem)) else (stem, "ab")
        twin = found.setdefault(name, {}).setdefault(side, member)
        if twin is not member:
            problems.append(Problem(member, f"same name as {twin}; keep one of them"))
    if not found:
        raise InputError(f"{first_ten([str(tar) for tar in tars])}: no images inside; accepted: {LAYOUTS}")
    pairs = []
    for name in sorted(found, key=_natural):
        sides = found[name]
        if sides.keys() == {"a", "b"}:
            pairs.append(Pair(name, sides["a"], sides["b"]))
        elif sides.keys() == {"ab"}:
            pairs.append(Pair(name, sides["ab"], None))
        elif "ab" in sides:
            problems += [
                Problem(sides[side], f"same name as {sides['ab']}; keep one") for side in sides.keys() - {"ab"}
            ]
        else:
            ((side, member),) = sides.items()
            problems.append(Problem(member, f"no partner {name}.{'b' if side == 'a' else 'a'}"))
    return pairs, problems


def scan(root: str | Path, split: str) -> tuple[list[Pair], list[Problem]]:
    """find_pairs without its last refusal: the pairs there are, and the files that are in none."""
    root = Path(root)
    if tars := archives(root, split):
        if beside := [path.name for path in tars if _images(path.parent)[0]]:
            raise InputError(f"{root} has archives ({first_ten(beside)}) and images beside them; keep one of the two")
        return match_members(tars)
    return match(*_locate(root, split))


def find_pairs(root: str | Path, split: str) -> list[Pair]:
    """The pairs of a split in natural order of their names (2 before 10); nothing is opened.

    Layouts: ROOT/<split>/*.jpg and ROOT/*.jpg hold A|B files; ROOT/<split>/A + B, ROOT/A + ROOT/B and ROOT/A/<split> +
    ROOT/B/<split> match by name. ROOT without split folders is the train split; val is the first of val, test, valid
    that exists. Folders are flat; hidden files and files that are not images are passed over. Tar archives are
    described at match_members; of these, the headers are read. A missing or empty folder, a name with two files and a
    file without a partner raise InputError.
    """
    pairs, problems = scan(root, split)
    if problems:
        raise InputError(f"{root}: {len(problems)} files in no pair: {first_ten([str(p) for p in problems], '; ')}")
    return pairs


def splits(root: str | Path) -> tuple[str, ...]:
    """The splits find_pairs can be asked for: train, val (also where its folder is test or valid), other folders."""
    root = Path(root)
    if not root.is_dir():
        _locate(root, "train")  # raises
    found = [name for name in SPLITS if any((root / side / name).is_dir() for side in (".", "A", "B"))]
    found += [name for name in SPLITS if name not in found and any(root.glob(f"{name}-*.tar"))]
    if "val" not in found and (alias := next((name for name in found if name != "train"), None)):
        found[found.index(alias)] = "val"
    loose = any(_images(d)[0] for d in (root, root / "A", root / "B") if d.is_dir())
    if "train" not in found and (loose or archives(root, "train")):
        found.insert(0, "train")
    return tuple(found)


def read_pair(pair: Pair, direction: Direction, in_channels: int, out_channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(input, target) as uint8 [H, W, in_channels] and [H, W, out_channels]; AtoB: A is the input.

    Channels and refusals are read_image's; an A|B file of odd width raises InputError naming it.
    """
    a = open_image(pair.a)
    if pair.b is None:
        if a.width % 2:
            raise InputError(f"{pair.a}: A|B side by side needs an even width, not {a.width}")
        half = a.width // 2
        a, b = a.crop((0, 0, half, a.height)), a.crop((half, 0, a.width, a.height))
    else:
        b = open_image(pair.b)
    source, target = (a, b) if direction == "AtoB" else (b, a)
    return as_array(source, in_channels), as_array(target, out_channels)


def hold_out(pairs: Sequence[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, val): count pairs chosen by a hash of seed and name, both parts in their order.

    A pair's rank depends on its own name alone, so pairs added later move few between the parts.
    """
    if not 0 <= count < len(pairs):
        raise InputError(f"holdout = {count}: there are {len(pairs)} pairs, and training needs at least one")
    ranked = sorted(pairs, key=lambda p: hashlib.sha256(f"{seed}:{p.name}".encode(errors="surrogateescape")).digest())
    held = set(ranked[:count])
    return [p for p in pairs if p not in held], [p for p in pairs if p in held]

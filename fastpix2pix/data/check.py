"""Decode every file before training and name all that is wrong; combine two folders into A|B files."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import check_new_folder, written_aside
from .images import MAX_PIXELS, as_array, natural_channels, open_image, write_image
from .pairs import SPLITS, Pair, Problem, first_ten, match, scan, splits

Progress = Callable[[int, int], None]  # (done, total), called from the calling thread
Size = tuple[int, int]  # width, height of image A, pixels
_AHEAD = 16  # items per thread in work or done before they are asked for


@dataclass(frozen=True)
class Report:
    """What check_pairs found."""

    counts: dict[str, int]  # pairs per split, sound or not
    smallest: Size | None  # of the sound pairs' A images, by pixels; None where there are none
    largest: Size | None
    problems: tuple[Problem, ...]  # every one, by split and name

    @property
    def ok(self) -> bool:
        return not self.problems

    def summary(self) -> str:
        """One line: pairs per split, sizes and the number of problems."""
        parts = [f"{count} {split} pairs" for split, count in self.counts.items()]
        if self.smallest and self.largest:
            texts = dict.fromkeys("{}x{}".format(*size) for size in (self.smallest, self.largest))
            parts.append(f"images {' to '.join(texts)}")
        return ", ".join([*parts, f"{len(self.problems)} problems"])


def default_threads(processes: int = 1) -> int:
    """Cores this process may use, shared by so many, less one for the caller, between 1 and 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // processes - 1, 1), 8)


def pooled(work: Callable, items: Sequence, threads: int | None = None, progress: Progress | None = None) -> Iterator:
    """work(item) of each item, in order, on threads (Pillow decodes outside the GIL); few of them are ahead."""
    threads = threads or default_threads()
    rest = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            waiting = deque(pool.submit(work, item) for item in islice(rest, _AHEAD * threads))
            for done in range(1, len(items) + 1):
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(rest, 1))
                if progress is not None:
                    progress(done, len(items))
                yield result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _examine(pair: Pair, min_size: int, max_pixels: int) -> tuple[list[Problem], Size | None]:
    """Problems of one pair and the size of its A image, everything decoded."""
    problems, sizes = [], []
    for path in (pair.a, pair.b):
        if path is None:
            continue
        try:
            width, height = open_image(path, max_pixels).size
        except InputError as error:
            problems.append(Problem(path, str(error).removeprefix(f"{path}: ")))
            continue
        if pair.b is None and width % 2:
            problems.append(Problem(path, f"odd width {width}: A|B side by side needs an even one"))
        width = width // 2 if pair.b is None else width
        if min(width, height) < min_size:
            problems.append(Problem(path, f"{width}x{height} is too small: the shorter side is under {min_size}"))
        sizes.append((width, height))
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        texts = ["{}x{}".format(*size) for size in sizes]
        problems.append(Problem(pair.a, f"A is {texts[0]} but B ({pair.b}) is {texts[1]}"))
    return problems, sizes[0] if sizes and not problems else None


def _examine_all(
    pairs: Iterable[Pair], min_size: int, max_pixels: int, threads: int | None, progress: Progress | None
) -> tuple[list[Problem], list[Size]]:
    results = list(pooled(lambda p: _examine(p, min_size, max_pixels), list(pairs), threads, progress))
    return [problem for found, _ in results for problem in found], [size for _, size in results if size]


def check_files(
    pairs: Iterable[Pair],
    *,
    min_size: int = 1,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Problem]:
    """Decode the files of these pairs; what is wrong with them, for `refuse`."""
    return _examine_all(pairs, min_size, max_pixels, threads, progress)[0]


def refuse(problems: Sequence[Problem]) -> None:
    """InputError names the first ten problems and says how many there are; none where there are none."""
    if problems:
        raise InputError(f"{len(problems)} broken pairs: {first_ten([str(p) for p in problems], '; ')}")


def check_pairs(
    root: str | Path,
    *,
    min_size: int = 64,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Decode every file of every split of a data folder and report all problems, not only the first.

    Found are: files without a partner or with a twin of the same name, unreadable, truncated and unsupported files,
    more than max_pixels pixels, A|B files of odd width, A and B of different size, and images whose shorter side (of
    a half, in an A|B file) is under min_size pixels. A root that has no layout of pairs raises InputError.
    """
    pairs: list[Pair] = []
    problems: list[Problem] = []
    counts: dict[str, int] = {}
    names = splits(root) or ("train",)
    for split in names:
        try:
            found, unpaired = scan(root, split)
        except InputError as error:
            if len(names) == 1:
                raise
            found, unpaired = [], [Problem(Path(root), str(error))]
        counts[split] = len(found)
        pairs += found
        problems += unpaired
    broken, sizes = _examine_all(pairs, min_size, max_pixels, threads, progress)
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return Report(counts, by_area[0] if by_area else None, by_area[-1] if by_area else None, (*problems, *broken))


def _join(pair: Pair, out: Path) -> Problem | None:
    """Write a pair as one A|B file, with the channels that hold both."""
    images = []
    for path in (pair.a, pair.b):
        assert path is not None
        try:
            images.append(open_image(path))
        except InputError as error:
            return Problem(path, str(error).removeprefix(f"{path}: "))
    a, b = images
    if a.size != b.size:
        return Problem(pair.a, f"{a.width}x{a.height}, but {pair.b} is {b.width}x{b.height}")
    channels = max(natural_channels(a), natural_channels(b))
    write_image(out, np.concatenate((as_array(a, channels), as_array(b, channels)), axis=1))
    return None


def combine(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write A|B PNG files to out for the files of folder a and folder b that have the same name; returns how many.

    Where a and b have split folders (train, val, test, valid), out gets the same ones. Partners of different size,
    files without a partner and broken files raise InputError naming them, and then nothing is written. So does an
    out that is not empty; overwrite replaces the folder as a whole, once the new one is complete.
    """
    a, b, out = Path(a), Path(b), Path(out).resolve()
    for folder in (a, b):
        if not folder.is_dir():
            raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    check_new_folder(out, overwrite, (a, b))
    jobs, problems = _jobs(a, b)
    with written_aside(out) as aside:
        for below, _ in jobs:
            (aside / below).mkdir(parents=True, exist_ok=True)
        results = pooled(lambda j: _join(j[1], aside / j[0] / f"{j[1].name}.png"), jobs, threads, progress)
        problems += [problem for problem in results if problem]
        if problems:
            raise InputError(f"{len(problems)} files cannot be combined: {first_ten([str(p) for p in problems], '; ')}")
    return len(jobs)


def _jobs(a: Path, b: Path) -> tuple[list[tuple[str, Pair]], list[Problem]]:
    """(split folder or ".", pair) of everything to combine, and the files that have no partner."""
    names = [name for name in SPLITS if (a / name).is_dir() or (b / name).is_dir()]
    jobs: list[tuple[str, Pair]] = []
    problems: list[Problem] = []
    for name in names or ["."]:
        for side in (a, b):
            if not (side / name).is_dir():
                raise InputError(f"{side}: has no {name} folder, but its counterpart has; give both the same splits")
        pairs, unpaired = match(a / name, b / name)
        jobs += [(name, pair) for pair in pairs]
        problems += unpaired
    return jobs, problems

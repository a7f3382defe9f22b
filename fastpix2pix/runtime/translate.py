"""Translate image files: read ahead, translate, write behind."""

from __future__ import annotations

import copy
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import Fitted, Infer
from ..data.images import as_array, read_image, write_image
from ..data.pairs import Pair, Problem, first_ten, read_pair
from ..errors import InputError
from .fitting import fit_image
from .sources import Job, jobs_of
from .tiles import TiledEngine, check_tiles
from .translator import Translator

Picture = NDArray[np.uint8]  # [H, W, C]
A = TypeVar("A")
B = TypeVar("B")

_THREADS = 2  # that read ahead and write behind
_UNCHANGED = Fitted()  # whole pictures at their own size


@dataclass(frozen=True)
class Summary:
    """What translate_files did; fewer outputs than sources where it was stopped or images are broken."""

    count: int  # images translated and written
    seconds: float  # wall time, files included
    outputs: tuple[Path, ...]  # in the order of the sources
    broken: tuple[Problem, ...] = ()  # images left out because they could not be read
    pairs: str = ""  # what there is to say of images that could be A|B pairs and were translated whole


def translate_files(
    translator: Translator,
    sources: Sequence[str | Path],  # image files, folders of images, glob patterns ("**" is any depth), mixed
    sink: str | Path,  # image file (of exactly one source image), or folder (made if missing)
    options: Infer,  # batch, direction, side_by_side, suffix, overwrite
    progress: Callable[[int, int], None] | None = None,  # called with (images done, images in all)
    stop: Callable[[], bool] | None = None,  # asked before every batch; True ends with what is written
    fitted: Fitted = _UNCHANGED,
) -> Summary:
    """Translate every source image into `sink`; a folder gets `<stem>.<suffix>` (sources.jobs_of says where exactly).

    Each is fitted into the network as `fitted` says, and its output has the size that this gives: its own by default.
    Folders are read flat, in the order of names; what is no image in a folder or among a pattern's matches is left out.
    `options.batch` images in a row are translated together where their sizes are equal. Outputs are complete or absent.

    A broken image is left out and named in the summary; the others are translated all the same.

    Raises InputError for missing images, none at all, none that can be read, two outputs of one name, outputs that
    exist (without overwrite) or are a source themselves; EnvironmentFailed for a sink that cannot be written. All but
    broken images are found before the first translation.
    """
    _check_channels(translator)
    check_tiles(translator.engine, fitted)
    jobs = jobs_of(sources, sink, options)
    channels = translator.engine.in_channels
    described, trained = translator.engine.describe(), int(translator.record.get("size") or 256)
    if fitted.fit == "tile":
        translator = copy.copy(translator)
        translator.engine = TiledEngine(translator.engine, fitted.tile)
    start = time.perf_counter()
    outputs: list[Path] = []
    broken: list[Problem] = []
    shapes: Counter[tuple[int, ...]] = Counter()

    def read(job: Job) -> Picture | Problem:
        try:
            if options.direction is None:
                image = read_image(job.source, channels)
            else:
                image, _ = read_pair(Pair(job.source.stem, job.source, None), options.direction, channels, channels)
        except InputError as error:
            return Problem(job.source, str(error).removeprefix(f"{job.source}: "))
        return fit_image(image, fitted, described, trained)

    def write(done: tuple[Job, Picture, Picture]) -> Path:
        job, picture, output = done
        if options.side_by_side:
            output = np.concatenate([_with_channels(picture, output.shape[-1]), output], axis=1)
        write_image(job.output, output)  # makes the folder only now, so that bad input leaves no empty one
        return job.output

    def count() -> None:
        if progress:
            progress(len(outputs) + len(broken), len(jobs))

    def whole() -> Iterator[tuple[Job, Picture]]:
        for job, picture in zip(jobs, _ahead(pool, read, jobs, options.batch), strict=True):
            if isinstance(picture, Problem):
                broken.append(picture)
                count()
            else:
                shapes[picture.shape[:2]] += 1
                yield job, picture

    def translated() -> Iterator[tuple[Job, Picture, Picture]]:
        for group in _equal_sized(whole(), options.batch):
            if stop and stop():
                return
            batch = translator(np.stack([picture for _, picture in group]))
            yield from ((job, picture, output) for (job, picture), output in zip(group, batch, strict=True))

    with ThreadPoolExecutor(_THREADS) as pool:
        for path in _ahead(pool, write, translated(), options.batch):
            outputs.append(path)
            count()
    if len(broken) == len(jobs):
        named = first_ten([str(problem) for problem in broken], "; ")
        raise InputError(named if len(jobs) == 1 else f"none of {len(jobs)} images could be read: {named}")
    pairs = ""
    whole_pictures = options.direction is None and fitted.fit == "pad" and fitted.size is None
    if whole_pictures and (double := shapes[trained, 2 * trained]):
        direction = translator.record.get("direction") or "AtoB or BtoA"
        pairs = (
            f"{double} of {shapes.total()} images could be A|B pairs ({2 * trained}x{trained}): direction = "
            f"{direction} translates their input half"
        )
    return Summary(len(outputs), time.perf_counter() - start, tuple(outputs), tuple(broken), pairs)


def _check_channels(translator: Translator) -> None:
    channels = translator.engine.in_channels, translator.engine.out_channels
    if not set(channels) <= {1, 3, 4}:
        raise InputError(f"the model has {channels[0]} and {channels[1]} channels; image files have 1, 3 or 4")


def _with_channels(picture: Picture, channels: int) -> Picture:
    """The picture as a file of it would be read with that many channels."""
    if picture.shape[-1] == channels:
        return picture
    return as_array(Image.fromarray(picture[:, :, 0] if picture.shape[-1] == 1 else picture), channels)


def _equal_sized(pictures: Iterable[tuple[Job, Picture]], most: int) -> Iterator[list[tuple[Job, Picture]]]:
    """Up to `most` pictures in a row, all of one size."""
    group: list[tuple[Job, Picture]] = []
    for job, picture in pictures:
        if group and group[0][1].shape != picture.shape:
            yield group
            group = []
        group.append((job, picture))
        if len(group) == most:
            yield group
            group = []
    if group:
        yield group


def _ahead(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """map(function, items) in order, with up to `depth` + 1 calls running or waiting in the pool."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

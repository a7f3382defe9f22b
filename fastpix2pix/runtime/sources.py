"""What is translated and where it goes: sources listed, the sink checked, every refusal made before any work."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..config import Infer
from ..data.images import IMAGE_SUFFIXES
from ..errors import InputError
from ..files import check_writable

_NAMED = 5  # files named in an error before "and N more"
_WRITABLE = IMAGE_SUFFIXES - {".gif"}  # what write_image writes
_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))
_WRITABLE_SUFFIXES = ", ".join(sorted(_WRITABLE))


@dataclass(frozen=True)
class Job:
    """One source image and the file it becomes."""

    source: Path
    output: Path


def jobs_of(sources: str | Path | Sequence[str | Path], sink: str | Path, options: Infer) -> list[Job]:
    """The images to translate and where each goes, every refusal made; touches no file.

    In a folder sink, matches of a pattern keep the folders that its wildcards stand for, and images of one folder whose
    names differ in the suffix alone keep it: a.jpg and a.png become a.jpg.png and a.png.png.
    """
    images: list[tuple[Path, Path]] = []  # each with the folder below the sink that it goes to
    for source in [sources] if isinstance(sources, str | Path) else sources:
        try:
            images += [(image, _below(source, image)) for image in list_images(source)]
        except OSError as error:
            raise InputError(f"{source}: cannot be listed: {error.strerror or error}") from error
    if not images:
        raise InputError("no sources: give image files, folders or patterns")
    jobs: list[Job] = []
    if is_file_sink(sink):
        if options.suffix:
            raise InputError(f"suffix = {options.suffix}: is of the files in a folder; the sink is the file {sink}")
        if len(images) > 1:
            raise InputError(f"{len(images)} source images and the file {sink} as sink: several need a folder as sink")
        jobs = [Job(image, Path(sink)) for image, _ in images]
    else:
        suffix = "." + (options.suffix or "png").lower().removeprefix(".")
        if suffix not in _WRITABLE:
            raise InputError(f"suffix = {options.suffix!r}: allowed are {_WRITABLE_SUFFIXES}")
        alike = Counter(image.with_suffix("") for image in {image for image, _ in images})
        for image, below in images:
            name = image.stem if alike[image.with_suffix("")] == 1 else image.name
            jobs.append(Job(image, Path(sink, below, name + suffix)))
    _check_outputs(jobs, options.overwrite)
    for folder in {job.output.parent for job in jobs}:
        check_writable(folder)
    return jobs


def list_images(source: str | Path) -> list[Path]:
    """The images of one source, sorted by name: a file itself, a folder's (flat), a pattern's ("**" is any depth)."""
    path, text = Path(source), str(source)
    if path.is_file():
        if not _is_image(path):
            raise InputError(f"{text}: not an image file; allowed are {_SUFFIXES}")
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file() and _is_image(p) and not p.name.startswith("."))
        if not found:
            raise InputError(
                f"{text}: no images in this folder ({_SUFFIXES}); for those in folders below use {text}/**"
            )
        return found
    if not glob.has_magic(text):
        raise InputError(f"{text}: no such file or folder")
    matches = glob.glob(text, recursive=True)
    found = sorted(p for p in map(Path, matches) if p.is_file() and _is_image(p))
    if not found:
        raise InputError(f"{text}: the pattern matches no {f'image ({_SUFFIXES})' if matches else 'file'}")
    return found


def _below(source: str | Path, image: Path) -> Path:
    """The folder of an image below its source: of a pattern's match, what stands for wildcards; else none."""
    if Path(source).exists():
        return Path()
    fixed = takewhile(lambda part: not glob.has_magic(part), Path(source).parts)
    return image.relative_to(Path(*fixed)).parent


def is_file_sink(sink: str | Path) -> bool:
    """Whether a sink is one image file rather than a folder; refuses what is neither."""
    path, text = Path(sink), str(sink)
    if path.is_dir() or text.endswith(("/", os.sep)):
        return False
    if path.suffix.lower() in _WRITABLE:
        return True
    if path.exists():
        raise InputError(f"sink {text}: exists and is neither a folder nor an image file ({_WRITABLE_SUFFIXES})")
    if path.suffix:
        raise InputError(
            f"sink {text}: images are written as {_WRITABLE_SUFFIXES}, not {path.suffix}; for a folder of this name "
            f"write {text}/"
        )
    return False


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _check_outputs(jobs: Sequence[Job], overwrite: bool) -> None:
    sources = {job.source.resolve() for job in jobs}
    writer: dict[Path, Path] = {}
    for job in jobs:
        output = job.output.resolve()
        if output in sources:
            raise InputError(f"{job.output}: is a source itself; choose another sink")
        if output in writer:
            raise InputError(f"{writer[output]} and {job.source} would both become {job.output}; translate them apart")
        writer[output] = job.source
    folders = [job.output for job in jobs if job.output.is_dir()]
    if folders:
        raise InputError(f"{folders[0]}: is a folder where an output would go; choose another sink")
    existing = [str(job.output) for job in jobs if job.output.exists()]
    if existing and not overwrite:
        more = f" and {len(existing) - _NAMED} more" if len(existing) > _NAMED else ""
        raise InputError(f"outputs exist: {', '.join(existing[:_NAMED])}{more}; use overwrite = True or another sink")

"""Files that are complete or absent: written aside, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import EnvironmentFailed, InputError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` for the caller to make, a file or folder, and puts it in place at the end.

    What `path` was before is replaced then, a file by a file and a whole folder by a folder. On any error the sibling
    and the folders made for it are removed and `path` is as before; a failing disk becomes EnvironmentFailed. Where
    `path` is a device or a pipe, it is written itself: a rename would replace it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with _disk_errors(path):
            yield path
        return
    made = [folder for folder in path.parents if not folder.exists()]
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        make_folder(path.parent)
        with _disk_errors(path):
            yield aside
            _replace(path, aside)
    except BaseException:
        _remove(aside)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder; renamed first, so that an interruption leaves no half of one under its name."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one rename."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """`path` and its parents, where they are not there yet; InputError where a file stands in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path}: a file is in the way of this folder; choose another") from None
    except OSError as error:
        raise environment_failed(path, error) from error


def check_writable(folder: Path) -> None:
    """Refuse a folder that could not be written or made; asked is the nearest one above it that exists."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"{folder}: {there} is a file, not a folder; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise EnvironmentFailed(f"{folder}: no permission to write in {there}; choose another folder")


def check_new_folder(out: Path, overwrite: bool, reads: Sequence[Path], ours: Sequence[str] = ("*",)) -> None:
    """Refuse a folder to be written that is not empty, or that holds or lies in one that is read.

    With overwrite it may be replaced, where all in it is `ours`, patterns of names.
    """
    place = out.resolve()
    for folder in reads:
        inside = folder.resolve().is_relative_to(place)  # overwrite would delete what is read
        if inside or place.is_relative_to(folder.resolve()):
            raise InputError(
                f"{out}: {'holds' if inside else 'lies in'} {folder}, which is read; choose another folder"
            )
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise InputError(f"{out}: exists and is not an empty folder; choose another, or overwrite to replace it")
    others = sorted(path.name for path in out.iterdir() if not any(map(path.match, ours))) if out.exists() else []
    if others:
        what = " or ".join(ours)
        raise InputError(f"{out}: overwrite would delete {others[0]}, which is no {what}; choose another folder")


def cache_folder(name: str) -> Path:
    """$FASTPIX2PIX_CACHE/name, else $XDG_CACHE_HOME/fastpix2pix/name, else ~/.cache/fastpix2pix/name."""
    if given := os.environ.get("FASTPIX2PIX_CACHE"):
        return Path(given) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastpix2pix" / name


def environment_failed(path: Path, error: OSError) -> EnvironmentFailed:
    """A disk error in one line, with what to do."""
    what = error.strerror or str(error)
    todo = {errno.ENOSPC: "free some space", errno.EACCES: "check its permissions", errno.EROFS: "write elsewhere"}
    return EnvironmentFailed(f"cannot write {path}: {what}; {todo.get(error.errno or 0, 'check the disk')}")


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise environment_failed(path, error) from error


def _replace(path: Path, aside: Path) -> None:
    if not (path.is_dir() and aside.is_dir()):
        os.replace(aside, path)  # a file never replaces a folder: that raises
        return
    old = path.with_name(f"{aside.name}.old")  # a rename cannot replace a folder that is not empty
    try:
        os.replace(path, old)
        os.replace(aside, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()

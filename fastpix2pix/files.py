"""Files that are complete or absent: written aside, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import EnvironmentFailed, InputError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` for the caller to make, a file or folder, and renames it at the end.

    On any error the sibling is removed and `path` is as before; a failing disk becomes EnvironmentFailed. Where `path`
    is a device or a pipe, it is written itself: a rename would replace it.
    """
    special = path.exists() and not path.is_file() and not path.is_dir()
    aside = path if special else path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        make_folder(path.parent)
        yield aside
        if not special:
            os.replace(aside, path)
    except BaseException as error:
        if not special:
            _remove(aside)
        if isinstance(error, OSError):
            raise environment_failed(path, error) from error
        raise


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


def environment_failed(path: Path, error: OSError) -> EnvironmentFailed:
    """A disk error in one line, with what to do."""
    what = error.strerror or str(error)
    todo = {errno.ENOSPC: "free some space", errno.EACCES: "check its permissions", errno.EROFS: "write elsewhere"}
    return EnvironmentFailed(f"cannot write {path}: {what}; {todo.get(error.errno or 0, 'check the disk')}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()

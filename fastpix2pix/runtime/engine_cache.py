"""Engines built on the way: kept in a folder that only their owner can read, the least used removed first."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two processes may build the same engine at once
    fcntl = None  # type: ignore[assignment]

from ..errors import EnvironmentFailed, InputError
from ..files import cache_folder, make_folder
from .plan import SUFFIX, read_plan

_IN_USE = 60.0  # seconds after its last use in which an engine is not removed
_ABANDONED = 3600.0  # seconds after which a file that is still being written is one of a killed process
_POLL = 0.1  # seconds between two tries of a lock that another process holds


def key_of(**parts: Any) -> str:
    """The name of an engine: a hash of everything that decides about its bytes (JSON values)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class EngineCache:
    """`path = EngineCache(folder, limit).get(key, make)`.

    The folder is made with mode 0700, and refused where others can write to it: engines hold native code. One process
    at a time looks into it; one that is killed leaves nothing that is taken for an engine.
    """

    def __init__(
        self,
        folder: Path | None = None,  # default: engines/ in the cache (files.cache_folder)
        limit: int = 4 << 30,  # bytes kept; what was used in the last minute stays even where it is larger
    ) -> None:
        self.folder = folder or cache_folder("engines")
        self.limit = limit

    def get(
        self,
        key: str,
        make: Callable[[Path], object],  # builds the engine and its sidecar at the path
        waiting: Callable[[], object] = lambda: None,  # called again and again while another process builds
    ) -> Path:
        """The engine of this key: the one kept, where its files are sound, else a new one."""
        self._secure()
        with _locked(self.folder / ".lock", waiting):
            path = self.folder / f"{key}{SUFFIX}"
            try:
                read_plan(path)
            except InputError:  # none yet, or damaged
                _remove(path)
                make(path)
            os.utime(path)  # used now
            self._evict()
        return path

    def size(self) -> int:
        """Bytes of all files kept."""
        return sum(_bytes(file) for file in self.folder.iterdir())

    def _secure(self) -> None:
        make_folder(self.folder.parent)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if not hasattr(os, "getuid"):
            return
        found = self.folder.stat()
        if found.st_uid != os.getuid():
            raise EnvironmentFailed(
                f"{self.folder} belongs to another user, who could put native code into engines; "
                "set FASTPIX2PIX_CACHE to a folder of your own, or use cache = False"
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            self.folder.chmod(0o700)

    def _evict(self) -> None:
        """Remove the least used, and what a killed build left; not what another process may be about to load."""
        now = time.time()
        for file in self.folder.glob(".*.tmp-*"):
            if now - _modified(file) > _ABANDONED:
                file.unlink(missing_ok=True)
        engines = sorted(self.folder.glob(f"*{SUFFIX}"), key=_modified)
        total = self.size()
        for path in engines:
            if total > self.limit and now - _modified(path) > _IN_USE:
                total -= _remove(path)


@contextmanager
def _locked(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold a file lock, which ends with the process that holds it."""
    if fcntl is None:
        yield
        return
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(_POLL)
        yield


def _remove(path: Path) -> int:
    """Delete an engine and what lies beside it (sidecar, compiled kernels); returns its bytes."""
    freed = 0
    for file in path.parent.glob(f"{path.name}*"):
        freed += _bytes(file)
        file.unlink(missing_ok=True)
    return freed


def _bytes(file: Path) -> int:
    """Of a file that may just be renamed: another process writes measurements beside its engine."""
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def _modified(file: Path) -> float:
    with suppress(FileNotFoundError):
        return file.stat().st_mtime
    return time.time()

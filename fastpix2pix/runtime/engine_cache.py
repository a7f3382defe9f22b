"""Engines built on the way: kept in a folder that only their owner can read, the least used removed first."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import EnvironmentFailed, InputError
from ..files import cache_folder, make_folder
from .plan import SUFFIX, read_plan


def default_folder() -> Path:
    """engines/ in the cache (files.cache_folder)."""
    return cache_folder("engines")


def key_of(**parts: Any) -> str:
    """The name of an engine: a hash of everything that decides about its bytes (JSON values)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class EngineCache:
    """`path = EngineCache(folder, limit).get(key, make)`.

    The folder is made with mode 0700, and refused where others can write to it: engines hold native code.
    """

    def __init__(
        self,
        folder: Path | None = None,  # default: default_folder()
        limit: int = 4 << 30,  # bytes kept; the newest engine stays even where it is larger
    ) -> None:
        self.folder = folder or default_folder()
        self.limit = limit

    def get(
        self,
        key: str,
        make: Callable[[Path], object],  # builds the engine and its sidecar at the path
    ) -> Path:
        """The engine of this key: the one kept, where its files are sound, else a new one."""
        self._secure()
        path = self.folder / f"{key}{SUFFIX}"
        try:
            read_plan(path)
        except InputError:  # none yet, or damaged
            _remove(path)
            make(path)
        os.utime(path)  # used now
        self._evict(path)
        return path

    def size(self) -> int:
        """Bytes of all files kept."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())

    def _secure(self) -> None:
        make_folder(self.folder.parent)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if not hasattr(os, "getuid"):
            return
        found = self.folder.stat()
        if found.st_uid != os.getuid():
            raise EnvironmentFailed(
                f"{self.folder} belongs to another user, who could put native code into engines; "
                "set FASTPIX2PIX_CACHE to a folder of your own, or use --no-cache"
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            self.folder.chmod(0o700)

    def _evict(self, newest: Path) -> None:
        engines = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
        total = self.size()
        for path in engines:
            if total <= self.limit:
                return
            if path != newest:
                total -= _remove(path)


def _remove(path: Path) -> int:
    """Delete an engine and what lies beside it (sidecar, compiled kernels); returns its bytes."""
    freed = 0
    for file in path.parent.glob(f"{path.name}*"):
        freed += file.stat().st_size
        file.unlink()
    return freed

"""Files inside tar archives, read in any order."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from io import BufferedReader, FileIO, RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar archive; it stands where a Path stands that is only read."""

    archive: Path
    name: str  # inside the archive
    offset: int  # of its first byte in the archive
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    @property
    def suffix(self) -> str:
        """As of a Path."""
        return PurePosixPath(self.name).suffix

    def read_bytes(self) -> bytes:
        """All of it; each call opens the archive, so that processes and threads share no position."""
        with self.archive.open("rb") as archive:
            archive.seek(self.offset)
            return archive.read(self.size)

    def open(self, mode: str = "rb") -> BufferedReader:
        """As of a Path; only what is asked for is read."""
        assert mode == "rb"
        return BufferedReader(_Part(self.archive.open("rb", buffering=0), self.offset, self.size))


class _Part(RawIOBase):
    """Bytes of an open archive as a file of their own, which closes it."""

    def __init__(self, archive: FileIO, first: int, size: int) -> None:
        self._archive, self._first, self._size = archive, first, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._archive.seek(self._first + self._at)
        count = self._archive.readinto(memoryview(buffer)[: max(0, self._size - self._at)])
        self._at += count
        return count

    def close(self) -> None:
        self._archive.close()
        super().close()


File = Path | Member


def members(archive: Path) -> list[Member]:
    """The regular files of a tar archive in their order; only its headers are read.

    Raises InputError for what is no whole, uncompressed tar archive: inside a compressed one nothing can be found.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            files = [item for item in tar if item.isreg()]
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{archive}: not a whole, uncompressed tar archive ({reason})") from None
    if sparse := next((item.name for item in files if item.issparse()), None):
        raise InputError(f"{archive}: {sparse} is stored as a sparse file; write the archive again without --sparse")
    return [Member(archive, item.name.removeprefix("./"), item.offset_data, item.size) for item in files]

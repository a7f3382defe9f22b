"""Files inside tar archives, read in any order."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

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

    def open(self, mode: str = "rb") -> BytesIO:
        """As of a Path; all of it is in memory."""
        assert mode == "rb"
        return BytesIO(self.read_bytes())


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

"""Pairs written into tar archives of about one size: few large files instead of many small ones."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from io import BytesIO
from itertools import count
from pathlib import Path

from ..errors import InputError
from ..files import check_new_folder, written_aside
from .pairs import Pair, find_pairs, splits


def write_shards(
    root: str | Path,  # a data folder of any layout
    out: str | Path,  # folder for the shards
    *,
    megabytes: int = 256,  # size of a shard at which the next one is begun
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,  # called with (pairs written, pairs in all)
) -> int:
    """Write every split's pairs to out/<split>-000000.tar and so on, files as they are; returns the number of shards.

    A|B files become <name>.ab.<suffix>, others <name>.a.<suffix> and <name>.b.<suffix> beside each other, which is
    WebDataset's form. The same pairs give the same bytes. Raises InputError for what find_pairs refuses, and for an
    out that is not empty; overwrite replaces a folder of archives as a whole, once the new one is complete.
    """
    root, out = Path(root), Path(out).resolve()
    found = {split: find_pairs(root, split) for split in splits(root) or ("train",)}
    if megabytes < 1:
        raise InputError(f"megabytes = {megabytes}: must be at least 1")
    check_new_folder(out, overwrite, (root,), ours=("*.tar",))
    total, done, shards = sum(map(len, found.values())), count(1), 0

    def added(tar: tarfile.TarFile, pair: Pair) -> int:
        size = _add(tar, pair)
        if progress:
            progress(next(done), total)
        return size

    with written_aside(out) as aside:
        aside.mkdir()
        for split, pairs in found.items():
            rest = iter(pairs)
            for number, first in enumerate(rest):
                with tarfile.open(aside / f"{split}-{number:06d}.tar", "w") as tar:
                    size = added(tar, first)
                    while size < megabytes * 10**6 and (pair := next(rest, None)):
                        size += added(tar, pair)
                shards += 1
    return shards


def _add(tar: tarfile.TarFile, pair: Pair) -> int:
    """The bytes added: of the files, without headers."""
    sides = {"ab": pair.a} if pair.b is None else {"a": pair.a, "b": pair.b}
    size = 0
    for side, file in sides.items():
        try:
            contents = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}") from None
        header = tarfile.TarInfo(f"{pair.name}.{side}{file.suffix.lower()}")
        header.size = len(contents)
        tar.addfile(header, BytesIO(contents))
        size += len(contents)
    return size

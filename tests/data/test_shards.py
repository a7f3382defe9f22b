"""Pairs in tar archives: the same pairs, batches and refusals as in folders."""

import io
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix.config import Data
from fastpix2pix.data import dali
from fastpix2pix.data.batches import Feed
from fastpix2pix.data.images import open_image
from fastpix2pix.data.loader import training_batches
from fastpix2pix.data.members import Member, members
from fastpix2pix.data.pairs import find_pairs, read_pair, scan, splits
from fastpix2pix.data.shards import write_shards
from fastpix2pix.errors import InputError

NAMES = ["2", "10", "a.b", "é"]


def fill(root: Path, layout: str) -> Path:
    """Pairs of noise in train and val, as A|B files or as A and B."""
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in NAMES:
            a, b = draws.integers(0, 256, (2, 40, 36, 3), np.uint8)
            files = {f"{split}/{name}.png": np.concatenate((a, b), axis=1)}
            if layout == "A and B":
                files = {f"{split}/A/{name}.png": a, f"{split}/B/{name}.PNG": b}
            for path, picture in files.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(root / path)
    return root


def archive(path: Path, names: list[str], contents: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = len(contents)
            tar.addfile(header, BytesIO(contents))
    return path


@pytest.fixture(params=["A|B", "A and B"])
def both(request, tmp_path) -> tuple[Path, Path]:
    """The same pairs as files and as shards."""
    folder = fill(tmp_path / "folder", request.param)
    assert write_shards(folder, tmp_path / "shards") == 2
    return folder, tmp_path / "shards"


def test_shards_hold_the_pairs_of_the_folder(both):
    folder, shards = both
    assert sorted(path.name for path in shards.iterdir()) == ["train-000000.tar", "val-000000.tar"]
    assert splits(shards) == splits(folder) == ("train", "val")
    for split in ("train", "val"):
        files, inside = find_pairs(folder, split), find_pairs(shards, split)
        assert [pair.name for pair in inside] == [pair.name for pair in files]
        for one, other in zip(files, inside, strict=True):
            for a, b in zip(read_pair(one, "AtoB", 3, 3), read_pair(other, "AtoB", 3, 3), strict=True):
                assert np.array_equal(a, b)


@pytest.mark.parametrize("loader", ["torch", "dali"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same(both, loader, workers):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    data = Data(crop_size=32, loader=loader, workers=workers)
    options = {"data": data, "in_channels": 3, "out_channels": 3, "batch": 2, "seed": 3, "start": 1, "stop": 5}
    found = [
        list(training_batches(Feed(pairs=find_pairs(root, "train"), **options, device=torch.device("cpu"))))
        for root in both
    ]
    assert len(found[0]) == len(found[1]) == 4
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.input, other.input) and torch.equal(one.target, other.target)


def test_a_new_archive_is_begun_at_the_limit_and_bytes_repeat(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(5):
        (folder / f"{k}.png").write_bytes(bytes(600_000))
    write_shards(folder, tmp_path / "one", megabytes=1)
    assert [len(members(path)) for path in sorted((tmp_path / "one").iterdir())] == [2, 2, 1]
    write_shards(folder, tmp_path / "two", megabytes=1)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert [pair.name for pair in find_pairs(tmp_path / "one", "train")] == list("01234")


def test_archives_of_other_programs(tmp_path):
    """GNU tar's ./, folders, hidden files and files that are no images; long and other names."""
    long = "n" * 120
    for name in ("x.a.jpg", "x.b.png", f"deep/{long}.ab.png", "plain.png", "y.json", "._x.a.jpg"):
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    subprocess.run(["tar", "-cf", tmp_path / "set.tar", "-C", tmp_path / "files", "."], check=True)
    pairs = find_pairs(tmp_path, "train")
    assert [(pair.name, pair.b is None) for pair in pairs] == [(f"deep/{long}", True), ("plain", True), ("x", False)]
    assert pairs[2].a.read_bytes() == b"x.a.jpg" and pairs[2].b.open().read() == b"x.b.png"
    assert splits(tmp_path) == ("train",)


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-0.tar", "train"), ("test-0.tar", "val"), ("val/x.tar", "val"), ("x.tar", "train"), ("valid-1.tar", "val")],
)
def test_layouts(name, split, tmp_path):
    archive(tmp_path / name, ["1.png"])
    (pair,) = find_pairs(tmp_path, split)
    assert isinstance(pair.a, Member) and pair.a.archive == tmp_path / name
    assert split in splits(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x.a.png", "y.a.png", "y.b.png"], "x.a.png: no partner x.b"),
        (["x.png", "x.ab.jpg"], "same name as .*x.png"),
        (["x.png", "x.a.png"], "same name as .*x.png"),
        (["x.json"], "no images inside"),
    ],
)
def test_files_in_no_pair_are_named(names, message, tmp_path):
    archive(tmp_path / "train-0.tar", names)
    with pytest.raises(InputError, match=message):
        find_pairs(tmp_path, "train")


def test_names_are_unique_over_archives(tmp_path):
    for number in (0, 1):
        archive(tmp_path / f"train-{number}.tar", ["x.png"])
    _, problems = scan(tmp_path, "train")
    assert [str(p.path) for p in problems] == [f"{tmp_path}/train-1.tar/x.png"]


def test_what_cannot_be_read_at_random_is_refused(tmp_path):
    path = archive(tmp_path / "train-0.tar", ["x.png", "y.png"], bytes(5000))
    whole = path.read_bytes()
    path.write_bytes(whole[:7000])
    with pytest.raises(InputError, match=r"train-0\.tar: not a whole, uncompressed tar"):
        find_pairs(tmp_path, "train")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "x.png")
    with pytest.raises(InputError, match="uncompressed"):
        find_pairs(tmp_path, "train")
    path.write_bytes(whole)
    (tmp_path / "z.png").touch()
    with pytest.raises(InputError, match="images beside them"):
        find_pairs(tmp_path, "train")


def test_a_broken_member_is_named(tmp_path):
    archive(tmp_path / "train-0.tar", ["x.png"], b"no image")
    with pytest.raises(InputError, match=r"train-0\.tar/x\.png: not an image"):
        read_pair(find_pairs(tmp_path, "train")[0], "AtoB", 3, 3)


def test_writing_refuses_what_it_would_destroy(both, tmp_path):
    folder, shards = both
    with pytest.raises(InputError, match="not an empty folder"):
        write_shards(folder, shards)
    with pytest.raises(InputError, match="which is read"):
        write_shards(folder / "train", folder, overwrite=True)
    with pytest.raises(InputError, match=r"sub: lies in .*which is read"):
        write_shards(folder, folder / "sub")
    write_shards(folder, shards, overwrite=True)
    (shards / "notes.txt").touch()
    with pytest.raises(InputError, match=r"overwrite would delete notes\.txt, which is no \*\.tar"):
        write_shards(folder, shards, overwrite=True)
    (shards / "notes.txt").unlink()
    with pytest.raises(InputError, match="megabytes = 0"):
        write_shards(folder, tmp_path / "new", megabytes=0)
    assert write_shards(shards, tmp_path / "again") == 2  # shards are a layout like the others
    for path in shards.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_member_opens_like_a_file_of_its_own(tmp_path):
    """Every way to read and seek, against the same bytes in memory; the archive goes on behind the member."""
    content = bytes(np.random.default_rng(0).integers(0, 256, 30_000, np.uint8))
    archive(tmp_path / "train-0.tar", ["x.png", "y.png"], content)
    (member, _) = members(tmp_path / "train-0.tar")
    expected = BytesIO(content)
    with member.open("rb") as found:
        for offset, whence, count in (
            (0, 0, 25),
            (5, 1, 9000),
            (-7, 2, 100),
            (29_990, 0, -1),
            (40_000, 0, 5),
            (3, 0, -1),
        ):
            assert found.seek(offset, whence) == expected.seek(offset, whence) == found.tell()
            assert found.read(count) == expected.read(count)
        raw = found.raw._archive
    assert raw.closed


def test_a_header_in_an_archive_costs_no_whole_file(tmp_path, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8))
    image.save(file := BytesIO(), "PNG")
    archive(tmp_path / "train-0.tar", ["x.png"], file.getvalue())
    (pair,) = find_pairs(tmp_path, "train")
    read, readinto = [], io.FileIO.readinto

    class Counted(io.FileIO):
        def readinto(self, buffer):
            read.append(readinto(self, buffer))
            return read[-1]

    opened = []
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: opened.append(Counted(path)) or opened[-1])
    assert dali._refusal(pair.a, True) is None
    assert 0 < sum(read) < 50_000 < pair.a.size
    assert np.array_equal(open_image(pair.a), image)
    assert len(opened) == 2 and all(one.closed for one in opened)

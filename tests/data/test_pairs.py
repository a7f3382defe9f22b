"""Layouts, names and refusals on real folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpix2pix.data.pairs import Pair, find_pairs, hold_out, read_pair, scan, splits
from fastpix2pix.errors import InputError

NAMES = ["2", "10", "01", "1", "b 3", "é", "<b>x<", "²", "a.b"]
ORDER = ["01", "1", "2", "10", "<b>x<", "a.b", "b 3", "²", "é"]  # numbers as numbers, then by code point


def fill(folder: Path, names=("2", "10", "1"), suffix="png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.{suffix}").touch()  # found by name; nothing is opened


LAYOUTS = [  # folders with images, split asked for, where A and B are then, why
    (["train"], "train", ("train", None), "split folders"),
    (["train", "val"], "val", ("val", None), "split folders"),
    (["."], "train", (".", None), "no split folders"),
    ([".", "val"], "train", (".", None), "val folder beside the images"),
    (["train", "."], "train", ("train", None), "a split folder wins over loose images"),
    (["train/A", "train/B"], "train", ("train/A", "train/B"), "A and B in the split"),
    (["A", "B"], "train", ("A", "B"), "A and B, no split"),
    (["A/train", "B/train", "A/val", "B/val"], "train", ("A/train", "B/train"), "splits in A and B"),
    (["A/train", "B/train", "A/test", "B/test"], "val", ("A/test", "B/test"), "splits in A and B, val is test"),
    (["train", "val", "test", "valid"], "val", ("val", None), "val first"),
    (["train", "test", "valid"], "val", ("test", None), "then test"),
    (["train", "valid"], "val", ("valid", None), "then valid"),
    (["train", "val", "test"], "test", ("test", None), "any folder by its name"),
]


@pytest.mark.parametrize(("folders", "split", "where", "why"), LAYOUTS)
def test_layouts(tmp_path, folders, split, where, why):
    for folder in folders:
        fill(tmp_path / folder, suffix="JPG" if "B" in folder else "png")
    a, b = where
    expected = [Pair(n, tmp_path / a / f"{n}.png", b and tmp_path / b / f"{n}.JPG") for n in ("1", "2", "10")]
    assert find_pairs(tmp_path, split) == expected
    assert find_pairs(str(tmp_path), split) == expected
    assert split in splits(tmp_path)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["."], ("train",)),
        (["A", "B"], ("train",)),
        (["train"], ("train",)),
        (["train", "val"], ("train", "val")),
        (["train", "test"], ("train", "val")),
        (["train", "valid", "test"], ("train", "val", "valid")),
        (["train", "val", "test"], ("train", "val", "test")),
        (["A/train", "B/train", "A/val", "B/val"], ("train", "val")),
        ([".", "val"], ("train", "val")),
        (["val"], ("val",)),
        (["other"], ()),
    ],
)
def test_splits(tmp_path, folders, expected):
    for folder in folders:
        fill(tmp_path / folder)
    assert splits(tmp_path) == expected
    for split in expected:
        assert len(find_pairs(tmp_path, split)) == 3


def test_odd_names_and_files_that_are_none(tmp_path):
    fill(tmp_path, NAMES)
    for other in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (tmp_path / other).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in find_pairs(tmp_path, "train")] == ORDER


REFUSED = [  # files, split, message, why
    ([], "train", r"no images; accepted: ROOT/<split>/\*\.jpg", "empty folder"),
    (["x/1.png", "y/1.png"], "train", r"no images, only sub-folders \(x, y\), which are not searched", "nested"),
    (["train/x/1.png"], "train", r"train: no images, only sub-folders \(x\)", "nested in the split"),
    (["train/1.png"], "val", r"no val pairs: looked for val, test, valid; accepted", "no such split"),
    (["train/1.png"], "extra", r"no extra pairs: looked for extra; accepted", "no such split"),
    (["A/1.png"], "train", r"A has no counterpart .*B; accepted", "A without B"),
    (["train/B/1.png"], "train", r"B has no counterpart .*A; accepted", "B without A, in a split"),
    (["A/train/1.png", "B/1.png"], "train", r"A/train has no counterpart .*B/train", "split in A only"),
    (["A/1.png", "B/notes.txt"], "train", r"B: no images; accepted", "nothing in B"),
    (["A/1.png", "B/1.png", "2.png"], "train", r"has A/ and B/ and images beside them \(2\.png\)", "two layouts"),
    (["A/1.png", "B/1.png", "A/2.png"], "train", r"1 files in no pair: .*A/2\.png: no partner in .*B", "unmatched"),
    (["A/1.png", "B/1.png", "B/2.png"], "train", r"1 files in no pair: .*B/2\.png: no partner in .*A", "unmatched"),
    (["A/1.png", "B/2.png"], "train", r"2 files in no pair: .*A/1\.png.*; .*B/2\.png", "nothing matches"),
    (["1.png", "1.jpg"], "train", r"1\.png: same name as 1\.jpg; keep one", "twins"),
    (["A/1.png", "A/1.jpg", "B/1.png"], "train", r"A/1\.png: same name as 1\.jpg", "twins in A"),
    (["A/1.png", "B/1.png", "B/1.webp"], "train", r"B/1\.webp: same name as 1\.png", "twins in B"),
]


@pytest.mark.parametrize(("files", "split", "message", "why"), REFUSED)
def test_refused(tmp_path, files, split, message, why):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(InputError, match=message):
        find_pairs(tmp_path, split)


def test_missing_root(tmp_path):
    for call in (lambda root: find_pairs(root, "train"), splits):
        with pytest.raises(InputError, match=r"nowhere: no such folder; accepted: ROOT"):
            call(tmp_path / "nowhere")
    (tmp_path / "file.png").touch()
    with pytest.raises(InputError, match=r"file\.png: not a folder"):
        find_pairs(tmp_path / "file.png", "train")


def test_many_unmatched_are_named_up_to_ten_and_all_scanned(tmp_path):
    fill(tmp_path / "A", [str(k) for k in range(1, 14)])
    fill(tmp_path / "B", ["1"])
    with pytest.raises(InputError, match=r"12 files in no pair: .*A/2\.png: .*A/11\.png: .*B; and 2 more$"):
        find_pairs(tmp_path, "train")
    pairs, problems = scan(tmp_path, "train")
    assert [p.name for p in pairs] == ["1"]
    assert [p.path.stem for p in problems] == [str(k) for k in range(2, 14)]


LEFT, RIGHT = (np.random.default_rng(k).integers(0, 256, (6, 4, 3), np.uint8) for k in (1, 2))


@pytest.mark.parametrize("separate", [False, True])
def test_read_pair(tmp_path, separate):
    if separate:
        Image.fromarray(LEFT).save(tmp_path / "a.png")
        Image.fromarray(RIGHT).save(tmp_path / "b.png")
        pair = Pair("x", tmp_path / "a.png", tmp_path / "b.png")
    else:
        Image.fromarray(np.concatenate((LEFT, RIGHT), axis=1)).save(tmp_path / "ab.png")
        pair = Pair("x", tmp_path / "ab.png", None)
    for direction, first, second in (("AtoB", LEFT, RIGHT), ("BtoA", RIGHT, LEFT)):
        source, target = read_pair(pair, direction, 3, 3)
        np.testing.assert_array_equal(source, first)
        np.testing.assert_array_equal(target, second)
        source, target = read_pair(pair, direction, 1, 4)
        np.testing.assert_array_equal(source[:, :, 0], np.asarray(Image.fromarray(first).convert("L")))
        np.testing.assert_array_equal(target[:, :, :3], second)
        assert target.shape == (6, 4, 4)


def test_read_pair_refusals(tmp_path):
    Image.fromarray(LEFT[:, :3]).save(tmp_path / "odd.png")
    pair = Pair("odd", tmp_path / "odd.png", None)
    with pytest.raises(InputError, match=r"odd\.png: A\|B side by side needs an even width, not 3"):
        read_pair(pair, "AtoB", 3, 3)
    with pytest.raises(InputError, match=r"channels = 2"):
        read_pair(Pair("x", tmp_path / "odd.png", tmp_path / "odd.png"), "AtoB", 2, 3)
    with pytest.raises(InputError, match=r"gone\.png: No such file"):
        read_pair(Pair("x", tmp_path / "odd.png", tmp_path / "gone.png"), "AtoB", 3, 3)


def test_hold_out():
    pairs = [Pair(f"p{k}", Path(f"{k}.png"), None) for k in range(50)]
    train, val = hold_out(pairs, 7, seed=3)
    assert [p.name for p in val] == ["p12", "p13", "p18", "p21", "p27", "p28", "p46"]  # frozen: resume depends on it
    assert sorted(train + val, key=pairs.index) == pairs
    assert [pairs.index(p) for p in train] == sorted(pairs.index(p) for p in train)
    assert hold_out(pairs, 7, seed=4)[1] != val
    assert hold_out(pairs, 0, seed=3) == (pairs, [])
    _, fewer = hold_out(pairs[1:], 7, seed=3)
    assert len(set(fewer) & set(val)) >= 6  # a pair's rank is its own
    for count in (50, 51, -1):
        with pytest.raises(InputError, match=rf"holdout = {count}: there are 50 pairs"):
            hold_out(pairs, count, seed=3)


def test_facades(facades):
    assert splits(facades) == ("train", "val")
    assert [p.name for p in find_pairs(facades, "train")] == [str(k) for k in range(1, 401)]
    assert len(find_pairs(facades, "val")) == 100
    photo, labels = read_pair(find_pairs(facades, "train")[0], "AtoB", 3, 3)
    assert photo.shape == labels.shape == (256, 256, 3)
    reversed_pair = read_pair(find_pairs(facades, "train")[0], "BtoA", 3, 3)
    np.testing.assert_array_equal(reversed_pair[0], labels)
    np.testing.assert_array_equal(reversed_pair[1], photo)

"""The painted pairs: what labels and pictures are made of, that they repeat, and that a set is written whole."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpix2pix.data.facade_canvas import OUTLINES, WALLS, Part, label_map
from fastpix2pix.data.facade_paint import PAINTERS
from fastpix2pix.data.pairs import find_pairs, read_pair
from fastpix2pix.data.synthetic import PALETTE, facade, write_demo_set
from fastpix2pix.errors import InputError

COLOURS = np.array(list(PALETTE.values()), np.uint8)
Pairs = list[tuple[np.ndarray, np.ndarray]]


def codes(image: np.ndarray) -> np.ndarray:
    """One number per colour, [H, W]."""
    return image.astype(np.int64) @ [1 << 16, 1 << 8, 1]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return [facade(0, i, 128) for i in range(50)]


def test_every_label_has_its_own_colour_and_painter() -> None:
    assert len(np.unique(COLOURS, axis=0)) == len(PALETTE)
    assert PAINTERS.keys() == PALETTE.keys()
    distance = np.abs(COLOURS[:, None].astype(int) - COLOURS[None]).max(-1)
    assert distance[~np.eye(len(PALETTE), dtype=bool)].min() >= 40, "labels a network can tell apart"


def test_labels_are_palette_colours_and_all_of_them_occur(pairs: Pairs) -> None:
    seen = np.unique(np.concatenate([np.unique(codes(label)) for label, _ in pairs]))
    np.testing.assert_array_equal(seen, np.sort(codes(COLOURS[None])[0]))


def test_pictures_are_neither_clipped_nor_flat(pairs: Pairs) -> None:
    for label, picture in pairs:
        assert label.shape == picture.shape == (128, 128, 3)
        assert label.dtype == picture.dtype == np.uint8
        assert ((picture >= 5) & (picture <= 250)).all(-1).mean() > 0.97
        assert picture.std() > 25


def test_the_label_decides_most_of_the_picture(pairs: Pairs) -> None:
    """The mean colour of each label, from 40 pairs, fits 10 others about twice as well as one colour."""
    labels, pictures = (np.stack(part) for part in zip(*pairs, strict=True))
    table = {int(c): pictures[:40][codes(labels[:40]) == c].mean(0) for c in np.unique(codes(labels[:40]))}
    guess = np.zeros(pictures[40:].shape)
    for code, colour in table.items():
        guess[codes(labels[40:]) == code] = colour
    error = np.square(guess - pictures[40:]).mean()
    blind = np.square(pictures[:40].mean((0, 1, 2)) - pictures[40:]).mean()
    assert error < 0.55 * blind


def test_the_light_comes_from_above(pairs: Pairs) -> None:
    """A cornice shades the wall right below it, and no longer the wall 14 pixels below."""
    ratios = []
    for label, picture in pairs:
        wall = np.isin(codes(label), codes(np.array([PALETTE[name] for name in WALLS])))
        cornice, bright = codes(label) == codes(np.array(PALETTE["cornice"])), picture.mean(-1)
        near, far = (bright[d:][wall[d:] & cornice[:-d]].mean() for d in (1, 14))
        ratios.append(near / far)
    assert max(ratios) < 0.95
    assert np.mean(ratios) < 0.75


def test_same_numbers_same_pixels_other_numbers_another_house() -> None:
    for a, b in zip(facade(3, 5, 64), facade(3, 5, 64), strict=True):
        np.testing.assert_array_equal(a, b)
    label = facade(3, 5, 64)[0]
    for seed, index in ((3, 6), (4, 5), (5, 3)):
        assert (codes(facade(seed, index, 64)[0]) != codes(label)).mean() > 0.05


@pytest.mark.parametrize("index", range(4))
def test_the_house_does_not_depend_on_the_size(index: int) -> None:
    label, picture = facade(0, index, 128)
    large_label, large_picture = facade(0, index, 256)
    nearest = np.asarray(Image.fromarray(large_label).resize((128, 128), Image.Resampling.NEAREST))
    assert (codes(nearest) == codes(label)).mean() > 0.97
    smaller = np.asarray(Image.fromarray(large_picture).resize((128, 128), Image.Resampling.BOX))
    assert np.abs(smaller.astype(int) - picture).mean() < 10


@pytest.mark.parametrize(
    ("size", "why"),
    [(32, "the least"), (33, "odd"), (97, "prime: no multiple of the layout's grid"), (300, "larger than the grid")],
)
def test_any_size(size: int, why: str) -> None:
    label, picture = facade(1, 2, size)
    assert label.shape == picture.shape == (size, size, 3)
    assert np.isin(codes(label), codes(COLOURS[None])).all()
    assert 60 < picture.mean() < 220


@pytest.mark.parametrize("outline", OUTLINES)
def test_outlines_fill_their_box_and_are_symmetric(outline: str) -> None:
    part = Part("door", (0.25, 0.25, 0.75, 0.75), outline=outline, bend=0.5 if outline != "steps" else 4.0)
    door = codes(label_map([part], 64)) == codes(np.array(PALETTE["door"]))
    rows, columns = np.nonzero(door)
    assert rows.min() <= 18
    assert rows.max() == 47
    assert 16 <= columns.min() <= 17
    np.testing.assert_array_equal(door, door[:, ::-1])
    assert door[16].sum() < door[16:48].sum(1).max(), "narrower at the top"


@pytest.mark.parametrize(
    ("seed", "index", "size", "message"),
    [
        (0, 0, 31, "size = 31: must be at least 32"),
        (-1, 0, 64, "seed = -1: must not be negative"),
        (0, -2, 64, "index = -2: must not be negative"),
    ],
)
def test_refused_numbers(seed: int, index: int, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        facade(seed, index, size)


def test_a_set_is_label_left_picture_right(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = write_demo_set(tmp_path / "new" / "set", train=3, val=2, size=48, seed=7, progress=lambda *c: calls.append(c))
    assert out == tmp_path / "new" / "set"
    files = sorted(str(f.relative_to(out)) for f in out.rglob("*.*"))
    assert files == ["train/0001.png", "train/0002.png", "train/0003.png", "val/0001.png", "val/0002.png"]
    assert calls == [(i, 5) for i in range(1, 6)]
    assert [p.name for p in out.parent.iterdir()] == ["set"], "nothing left beside it"
    label, picture = facade(7, 1, 48)
    a, b = read_pair(find_pairs(out, "train")[1], "AtoB", 3, 3)
    np.testing.assert_array_equal(np.asarray(a), label)
    np.testing.assert_array_equal(np.asarray(b), picture)
    assert len({f.read_bytes() for f in out.rglob("*.png")}) == 5, "no facade twice, none of val in train"


def test_val_does_not_change_with_the_size_of_train(tmp_path: Path) -> None:
    small, large = (write_demo_set(tmp_path / str(n), train=n, val=1, size=32) for n in (1, 3))
    assert (small / "val/0001.png").read_bytes() == (large / "val/0001.png").read_bytes()


def test_overwriting(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    write_demo_set(out, train=2, val=0, size=32)
    assert not (out / "val").exists()
    with pytest.raises(InputError, match="is not an empty folder: choose another, or overwrite"):
        write_demo_set(out, train=1, val=1, size=32)
    write_demo_set(out, train=1, val=1, size=32, overwrite=True)
    assert sorted(f.name for f in out.rglob("*.png")) == ["0001.png", "0001.png"]
    (out / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"also holds thesis\.tex"):
        write_demo_set(out, train=1, val=1, size=32, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train = 0: allowed are 1 to"),
        ({"train": 1_000_001}, "train = 1000001: allowed"),
        ({"val": -1}, "val = -1: must not be negative"),
        ({"size": 16}, "size = 16: must be at least 32"),
        ({"seed": -1}, "seed = -1: must not be negative"),
    ],
)
def test_refused_sets_leave_nothing(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_demo_set(tmp_path / "set", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set").touch()
    with pytest.raises(InputError, match="is a file: give a folder"):
        write_demo_set(tmp_path / "set", overwrite=True)


def test_an_interruption_leaves_what_was_there(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo_set(tmp_path / "set", train=3, val=1, size=32, progress=stop)
    assert list(tmp_path.iterdir()) == []

    before = write_demo_set(tmp_path / "set", train=1, val=1, size=32) / "train" / "0001.png"
    pixels = before.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_demo_set(tmp_path / "set", train=3, val=1, size=40, overwrite=True, progress=stop)
    assert before.read_bytes() == pixels
    assert [p.name for p in tmp_path.iterdir()] == ["set"]

"""Every planted defect is named in one run; combine writes all or nothing."""

import threading

import numpy as np
import pytest
from PIL import Image

from fastpix2pix.data.check import check_files, check_pairs, combine, pooled, refuse
from fastpix2pix.data.images import read_image
from fastpix2pix.data.pairs import find_pairs
from fastpix2pix.errors import EnvironmentFailed, InputError

RNG = np.random.default_rng(0)


def save(path, width, height, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (height, width, len(mode)), np.uint8)
    Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels).save(path)
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reasons(report):
    return {problem.path.name: problem.reason for problem in report.problems}


def test_every_defect_of_side_by_side_files(tmp_path):
    train = tmp_path / "train"
    save(train / "good.png", 160, 80)
    save(train / "best.jpg", 200, 90)
    save(train / "odd.png", 161, 80)
    save(train / "small.png", 126, 80)
    save(train / "low.png", 160, 63)
    save(train / "big.png", 400, 200)
    truncate(save(train / "cut.jpg", 160, 80))
    save(train / "twin.png", 160, 80)
    save(train / "twin.jpg", 160, 80)
    (train / "empty.png").touch()
    (train / "text.jpg").write_text("text")
    Image.fromarray(RNG.random((80, 160), np.float32)).save(train / "float.tif")
    truncate(save(tmp_path / "val" / "cut.png", 160, 80))
    (tmp_path / "test").mkdir()

    report = check_pairs(tmp_path, max_pixels=50_000, threads=2)
    found = {str(p.path.relative_to(tmp_path)): p.reason for p in report.problems}
    expected = {
        "train/odd.png": "odd width 161",
        "train/small.png": "63x80 is too small: the shorter side is under 64",
        "train/low.png": "80x63 is too small",
        "train/big.png": "400x200 pixels are over the limit of 0.05 megapixels",
        "train/cut.jpg": "not a readable image (image file is truncated",
        "train/twin.png": "same name as twin.jpg",
        "train/empty.png": "not an image of a known format",
        "train/text.jpg": "not an image of a known format",
        "train/float.tif": "floating point images are not supported",
        "val/cut.png": "not a readable image",
        ".": "no images; accepted",  # the empty folder test
    }
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name]
    assert not report.ok
    assert report.counts == {"train": 11, "val": 1, "test": 0}
    assert (report.smallest, report.largest) == ((80, 80), (100, 90))
    assert report.summary() == "11 train pairs, 1 val pairs, 0 test pairs, images 80x80 to 100x90, 11 problems"
    assert "odd.png: odd width 161" in str(report.problems[[p.path.name for p in report.problems].index("odd.png")])


def test_every_defect_of_folders(tmp_path):
    for side in "AB":
        save(tmp_path / side / "good.png", 70, 80)
        save(tmp_path / side / "small.png", 70, 60)
    save(tmp_path / "A" / "left.png", 70, 80)
    save(tmp_path / "B" / "right.png", 70, 80)
    save(tmp_path / "A" / "sizes.png", 70, 80)
    save(tmp_path / "B" / "sizes.jpg", 71, 80)
    save(tmp_path / "A" / "cut.png", 70, 80)
    truncate(save(tmp_path / "B" / "cut.tif", 70, 80))
    save(tmp_path / "A" / "gray.png", 65, 81, "L")  # gray beside colour and odd widths are fine here
    save(tmp_path / "B" / "gray.png", 65, 81)
    report = check_pairs(tmp_path)
    found = reasons(report)
    assert found.keys() == {"left.png", "right.png", "sizes.png", "cut.tif", "small.png"}
    assert "no partner in" in found["left.png"]
    assert "no partner in" in found["right.png"]
    assert "A is 70x80 but B (" in found["sizes.png"]
    assert "71x80" in found["sizes.png"]
    assert "70x60 is too small" in found["small.png"]
    assert len(report.problems) == 6  # small in A and in B
    assert report.counts == {"train": 5}


def test_clean_and_progress(tmp_path):
    for k in range(5):
        save(tmp_path / f"{k}.png", 128, 64)
    seen = []
    report = check_pairs(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.problems == ()
    assert report.summary() == "5 train pairs, images 64x64, 0 problems"
    assert seen == [(k, 5) for k in range(1, 6)]
    check_files(find_pairs(tmp_path, "train"), progress=lambda done, total: seen.append((done, total)))
    assert seen[5:] == seen[:5]


def test_no_layout(tmp_path):
    with pytest.raises(InputError, match="no images"):
        check_pairs(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        check_pairs(tmp_path / "nowhere")


def test_check_files_names_ten_and_the_count(tmp_path):
    for k in range(14):
        path = save(tmp_path / f"{k:02}.png", 12, 6)
        if k >= 2:
            truncate(path)
    pairs = find_pairs(tmp_path, "train")
    with pytest.raises(InputError, match=r"12 broken pairs: .*02\.png: .*11\.png: [^;]*; and 2 more$"):
        refuse(check_files(pairs))
    refuse(check_files(pairs[:2]))  # small is no reason not to train
    with pytest.raises(InputError, match="too small"):
        refuse(check_files(pairs[:2], min_size=7))


def test_work_on_threads_keeps_its_order_and_few_items_ahead():
    started = []
    go_on = threading.Event()

    def work(item: int) -> int:
        started.append(item)
        if item == 0:
            assert go_on.wait(60)  # the others are done long before
        return -item

    results = pooled(work, range(1000), threads=2)
    threading.Timer(0.2, go_on.set).start()
    for number, result in enumerate(results):
        assert result == -number
        assert len(started) <= number + 40


def test_an_error_in_progress_ends_the_check(tmp_path):
    for k in range(5):
        save(tmp_path / f"{k}.png", 128, 64)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_pairs(tmp_path, progress=interrupt)


def test_facades_are_clean(facades):
    report = check_pairs(facades)
    assert report.ok
    assert report.counts == {"train": 400, "val": 100}
    assert report.smallest == report.largest == (256, 256)


@pytest.mark.parametrize("split", [None, ("train", "val")])
def test_combine(tmp_path, split):
    names = ["1.png", "ü <b>.png"]
    for side in "AB":
        for name in names:
            for below in split or (".",):
                save(tmp_path / side / below / name, 6, 4)
    out, seen = tmp_path / "new" / "out", []
    total = 2 * len(split or (".",))
    assert combine(tmp_path / "A", tmp_path / "B", out, progress=lambda *p: seen.append(p)) == total
    assert seen == [(k + 1, total) for k in range(total)]
    for below in split or (".",):
        for name in names:
            both = [read_image(tmp_path / side / below / name) for side in "AB"]
            np.testing.assert_array_equal(read_image(out / below / name), np.concatenate(both, axis=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B", "new"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert len(find_pairs(out, "train")) == 2


@pytest.mark.parametrize(
    ("modes", "channels"), [(("L", "L"), 1), (("L", "RGB"), 3), (("RGB", "RGBA"), 4), (("L", "RGBA"), 4)]
)
def test_combine_keeps_the_channels(tmp_path, modes, channels):
    for side, mode in zip("AB", modes, strict=True):
        save(tmp_path / side / "1.png", 6, 4, mode)
    combine(tmp_path / "A", tmp_path / "B", tmp_path / "out")
    with Image.open(tmp_path / "out" / "1.png") as image:
        assert len(image.getbands()) == channels
    both = [read_image(tmp_path / side / "1.png", channels) for side in "AB"]
    np.testing.assert_array_equal(read_image(tmp_path / "out" / "1.png", channels), np.concatenate(both, axis=1))


def test_combine_refuses_and_writes_nothing(tmp_path):
    a, b, out = tmp_path / "A", tmp_path / "B", tmp_path / "new" / "out"
    for side in (a, b):
        save(side / "1.png", 6, 4)
        save(side / "2.png", 6, 4)
    save(a / "only.png", 6, 4)
    save(b / "size.jpg", 6, 5)
    save(a / "size.png", 6, 4)
    truncate(save(b / "2.png", 64, 4))
    with pytest.raises(InputError, match=r"3 files cannot be combined") as caught:
        combine(a, b, out)
    for part in ("only.png: no partner in", "size.png: 6x4, but", "size.jpg is 6x5", "B/2.png: not a readable"):
        assert part in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B"]


def test_combine_refuses_folders(tmp_path):
    a, b = tmp_path / "A", tmp_path / "B"
    for side in (a, b):
        save(side / "1.png", 6, 4)
    (tmp_path / "out").mkdir()
    assert combine(a, b, tmp_path / "out") == 1  # empty is fine
    (tmp_path / "out" / "stale.png").touch()
    with pytest.raises(InputError, match=r"out: exists and is not an empty folder; choose another, or overwrite"):
        combine(a, b, tmp_path / "out")
    assert combine(a, b, tmp_path / "out", overwrite=True) == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["1.png"]
    for out, message in ((a / "x", "lies in"), (a, "holds"), (tmp_path, "holds")):
        with pytest.raises(InputError, match=f"{message} .*, which is read"):
            combine(a, b, out, overwrite=True)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        combine(a, tmp_path / "nowhere", tmp_path / "other")
    save(a / "train" / "1.png", 6, 4)
    with pytest.raises(InputError, match="B: has no train folder, but its counterpart has"):
        combine(a, b, tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: exists and is not an empty folder"):
        combine(b, b, tmp_path / "file", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B", "file", "out"]


def test_combine_where_nothing_can_be_written(tmp_path):
    save(tmp_path / "A" / "1.png", 6, 4)
    with pytest.raises(EnvironmentFailed, match="cannot write"):
        combine(tmp_path / "A", tmp_path / "A", "/proc/fastpix2pix/out")

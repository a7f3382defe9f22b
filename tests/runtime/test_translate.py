import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix.config import Fitted, Generator, Infer, Modes
from fastpix2pix.data.images import read_image, write_image
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.model import build_generator
from fastpix2pix.runtime import sources as sources_module
from fastpix2pix.runtime.engine import TorchEngine
from fastpix2pix.runtime.sources import jobs_of, list_images
from fastpix2pix.runtime.translate import translate_files
from fastpix2pix.runtime.translator import Translator

PLAIN = Infer()


def translator(modes: Modes | None = None, **options) -> Translator:
    torch.manual_seed(0)
    net = build_generator(Generator(**({"depth": 5, "ngf": 4} | options)))
    with torch.no_grad():
        net.up[-1].conv.weight.mul_(10)
    return Translator(TorchEngine(net, modes or Modes()))


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make(folder: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """PNG and other files of noise, by name."""
    pictures = {}
    for seed, (name, size) in enumerate(sizes.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pictures[name] = picture(*size, seed)
        write_image(folder / name, pictures[name])
    return pictures


@pytest.fixture
def photos(tmp_path):
    """Five pictures in a folder, of which the first two and the next two are of one size."""
    folder = tmp_path / "photos"
    small, wide = (32, 32), (20, 50)
    make(folder, {"a.png": small, "b.png": small, "c.png": wide, "d.png": wide, "e.png": small})
    return folder


def names(paths) -> list[str]:
    return [path.name for path in paths]


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_folder_becomes_a_folder(photos, tmp_path):
    (photos / "notes.txt").write_text("not an image")
    (photos / "._a.png").write_text("hidden")
    (photos / "below").mkdir()
    seen = []
    out = tmp_path / "new" / "out"
    summary = translate_files(translator(), [photos], out, PLAIN, progress=lambda *p: seen.append(p))
    assert summary.count == 5 and summary.seconds > 0
    assert summary.outputs == tuple(out / f"{s}.png" for s in "abcde") == tuple(everything(out))
    assert seen == [(i, 5) for i in range(1, 6)]
    g = translator()
    for path in summary.outputs:
        assert np.array_equal(read_image(path), g(read_image(photos / path.name)))


def test_one_image_becomes_one_file(photos, tmp_path):
    sink = tmp_path / "deep" / "x.bmp"
    summary = translate_files(translator(), photos / "c.png", sink, PLAIN)
    assert summary.outputs == (sink,)
    assert Image.open(sink).format == "BMP"
    assert np.array_equal(read_image(sink), translator()(read_image(photos / "c.png")))


@pytest.mark.parametrize(
    ("fitted", "expected"),
    [
        (Fitted(), (100, 60)),
        (Fitted(size="64"), (64, 38)),  # inside, with its aspect
        (Fitted("resize"), (32, 32)),  # the size trained on
        (Fitted("resize", "64x96"), (64, 96)),
        (Fitted("crop", "64"), (64, 64)),
    ],
    ids=str,
)
def test_fits(fitted, expected, tmp_path):
    make(tmp_path, {"x.png": (100, 60)})
    g = translator()
    g.record["size"] = 32
    translate_files(g, [tmp_path / "x.png"], tmp_path / "out.png", Infer(side_by_side=True), fitted=fitted)
    found = read_image(tmp_path / "out.png")
    assert found.shape == (expected[0], 2 * expected[1], 3)
    fitted_picture, output = found[:, : expected[1]], found[:, expected[1] :]
    assert np.array_equal(output, translator()(np.ascontiguousarray(fitted_picture)))


def test_a_size_beyond_the_limit_is_refused_before_it_is_made(tmp_path):
    make(tmp_path, {"x.png": (32, 32)})
    with pytest.raises(InputError, match="size = 100000x100000: 10000000000 pixels; allowed are"):
        translate_files(
            translator(), [tmp_path / "x.png"], tmp_path / "y.png", PLAIN, fitted=Fitted("resize", "100000")
        )


def test_a_crop_is_the_middle(tmp_path):
    (given,) = make(tmp_path, {"x.png": (96, 64)}).values()
    fitted = Fitted("crop", "64")
    translate_files(translator(), [tmp_path / "x.png"], tmp_path / "out.png", Infer(side_by_side=True), fitted=fitted)
    assert np.array_equal(read_image(tmp_path / "out.png")[:, :64], given[16:80])


@pytest.mark.parametrize("suffix", ["png", "jpg", ".webp", "BMP", "tiff"])
def test_suffix_is_the_file_type(photos, tmp_path, suffix):
    summary = translate_files(translator(), [photos / "a.png"], tmp_path / "out", Infer(suffix=suffix))
    (output,) = summary.outputs
    assert output.suffix == "." + suffix.strip(".").lower()
    assert read_image(output).shape == (32, 32, 3)


def test_every_writable_suffix_is_written(tmp_path):
    (tmp_path / "probe").mkdir()
    for suffix in sources_module._WRITABLE:
        write_image(tmp_path / f"probe/x{suffix}", np.zeros((2, 2, 1), np.uint8))


@pytest.mark.parametrize("noise", ["off", "random"])
def test_batches_equal_single_images(photos, tmp_path, noise):
    sizes, g = [], translator(Modes(noise=noise))
    run = g.engine.translate
    g.engine.translate = lambda batch, first: sizes.append(len(batch)) or run(batch, first)
    translate_files(translator(Modes(noise=noise)), [photos], tmp_path / "single", PLAIN)
    translate_files(g, [photos], tmp_path / "batch", Infer(batch=3))
    assert sizes == [2, 2, 1]
    for path in everything(tmp_path / "single"):
        difference = read_image(path).astype(int) - read_image(tmp_path / "batch" / path.name)
        assert abs(difference).max() <= 1, path


def test_batch_is_the_most_images_at_once(tmp_path):
    make(tmp_path / "in", {f"{i}.png": (32, 32) for i in range(5)})
    sizes, g = [], translator()
    run = g.engine.translate
    g.engine.translate = lambda batch, first: sizes.append((len(batch), first)) or run(batch, first)
    translate_files(g, [tmp_path / "in"], tmp_path / "out", Infer(batch=2))
    assert sizes == [(2, 0), (2, 2), (1, 4)]


@pytest.mark.parametrize("direction, half", [("AtoB", slice(0, 24)), ("BtoA", slice(24, 48))])
def test_direction_takes_a_half(tmp_path, direction, half):
    pair = make(tmp_path, {"pair.png": (30, 48)})["pair.png"]
    translate_files(translator(), [tmp_path / "pair.png"], tmp_path / "out.png", Infer(direction=direction))
    assert np.array_equal(read_image(tmp_path / "out.png"), translator()(pair[:, half]))


@pytest.mark.parametrize("channels", [(3, 3), (1, 3), (3, 1)])
def test_side_by_side(tmp_path, channels):
    given = make(tmp_path, {"x.png": (30, 40)})["x.png"]
    g = translator(in_channels=channels[0], out_channels=channels[1])
    translate_files(g, [tmp_path / "x.png"], tmp_path / "out.png", Infer(side_by_side=True))
    both = read_image(tmp_path / "out.png", channels[1])
    assert both.shape == (30, 80, channels[1])
    shown = given if channels == (3, 3) else read_image(tmp_path / "x.png", 1).repeat(channels[1], -1)
    assert np.array_equal(both[:, :40], shown)
    assert np.array_equal(both[:, 40:], g(read_image(tmp_path / "x.png", channels[0])))


def test_kinds_of_sources(tmp_path, monkeypatch):
    make(tmp_path, {f"in/{n}": (4, 4) for n in ("b.png", "a.JPG", "[1].png", "below/c.webp", "below/more/d.bmp")})
    (tmp_path / "in/readme.md").write_text("")
    monkeypatch.chdir(tmp_path)
    table = {
        "in": ["[1].png", "a.JPG", "b.png"],
        "in/": ["[1].png", "a.JPG", "b.png"],
        "in/*": ["[1].png", "a.JPG", "b.png"],
        "in/[ab].*": ["a.JPG", "b.png"],
        "in/[1].png": ["[1].png"],  # a file of that name comes before the pattern
        "in/**": ["[1].png", "a.JPG", "b.png", "c.webp", "d.bmp"],
        "**/*.webp": ["c.webp"],
    }
    for source, wanted in table.items():
        assert names(list_images(source)) == wanted, source
    summary = translate_files(translator(), ["in/b.png", Path("in/below"), "in/**/*.bmp"], "out", PLAIN)
    assert names(summary.outputs) == ["b.png", "c.png", "d.png"]


def test_a_pattern_keeps_folders_and_names_that_differ_in_the_suffix_keep_it(tmp_path, monkeypatch):
    files = ("a.png", "a.JPG", "b.png", "below/a.png", "below/more/a.png", "other/below/a.bmp")
    make(tmp_path, {f"in/{n}": (4, 4) for n in files})
    monkeypatch.chdir(tmp_path)
    table = {
        "in": ["a.JPG.webp", "a.png.webp", "b.webp"],
        "in/**": [
            *("a.JPG.webp", "a.png.webp", "b.webp", "below/a.webp", "below/more/a.webp"),
            "other/below/a.webp",
        ],
        "./in/*/a*": ["below/a.webp"],
        "in/*/below/*": ["other/below/a.webp"],
        "**/a.bmp": ["in/other/below/a.webp"],
        str(tmp_path / "i?" / "b.*"): ["in/b.webp"],
    }
    for source, wanted in table.items():
        found = [job.output for job in jobs_of(source, "out", Infer(suffix="webp"))]
        assert found == [Path("out", name) for name in wanted], source
    translate_files(translator(), "in/**", "out", PLAIN)
    assert np.array_equal(read_image("out/below/a.png"), translator()(read_image("in/below/a.png")))


@pytest.mark.parametrize(
    ("options", "fitted", "record", "says"),
    [
        ({}, Fitted(), {"size": 32, "direction": "BtoA"}, r"2 of 3 images could be .*\(64x32\): direction = BtoA "),
        ({}, Fitted(), {"size": 32}, "direction = AtoB or BtoA translates their input half"),
        ({}, Fitted(), {"size": 64}, ""),
        ({"direction": "AtoB"}, Fitted(), {"size": 32, "direction": "BtoA"}, ""),
        ({}, Fitted("resize"), {"size": 32}, ""),
        ({}, Fitted(size="64"), {"size": 32}, ""),
    ],
)
def test_pairs_translated_whole_are_said(tmp_path, options, fitted, record, says):
    make(tmp_path / "in", {"a.png": (32, 64), "b.png": (32, 64), "c.png": (32, 62)})
    g = translator()
    g.record.update(record)
    found = translate_files(g, tmp_path / "in", tmp_path / "out", Infer(**options), fitted=fitted).pairs
    assert re.search(says, found) if says else found == ""


def test_stop_ends_between_batches(photos, tmp_path):
    answers = iter([False, False, True])
    summary = translate_files(translator(), [photos], tmp_path / "out", PLAIN, stop=lambda: next(answers))
    assert summary.count == 2
    assert names(everything(tmp_path / "out")) == ["a.png", "b.png"]


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("broken", ["a", "d", "e"])
def test_a_broken_image_is_left_out_and_named(photos, tmp_path, batch, broken):
    whole = (photos / f"{broken}.png").read_bytes()
    (photos / f"{broken}.png").write_bytes(whole[: len(whole) // 2])
    seen = []
    options = Infer(batch=batch)
    summary = translate_files(translator(), [photos], tmp_path / "out", options, lambda *p: seen.append(p))
    others = [f"{one}.png" for one in "abcde" if one != broken]
    assert names(summary.outputs) == names(everything(tmp_path / "out")) == others
    (problem,) = summary.broken
    assert str(problem).startswith(f"{photos}/{broken}.png: not a readable image")
    assert seen == [(i, 5) for i in range(1, 6)]
    g = translator()
    for path in summary.outputs:
        assert abs(read_image(path).astype(int) - g(read_image(photos / path.name))).max() <= 1


def test_images_of_which_none_can_be_read_are_named(photos, tmp_path):
    for path in photos.iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 5 images could be read: .*/a\.png: not .*; .*/e\.png: not "):
        translate_files(translator(), [photos], tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_first_image_that_is_broken_leaves_nothing(tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(InputError, match=r"x\.png"):
        translate_files(translator(), [tmp_path / "x.png"], tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


def test_overwrite(photos, tmp_path):
    out = tmp_path / "out"
    make(out, {f"{s}.png": (2, 2) for s in "abcde"} | {"other.png": (2, 2)})
    translate_files(translator(), [photos], out, Infer(overwrite=True))
    assert read_image(out / "a.png").shape == (32, 32, 3)
    assert read_image(out / "other.png").shape == (2, 2, 3)


@pytest.mark.parametrize(
    "sources, sink, options, match",
    [
        ([], "out", {}, r"no sources"),
        (["missing.png"], "out", {}, r"missing\.png: no such file or folder"),
        (["photos", "missing.png"], "out", {}, r"missing\.png: no such file or folder"),
        (["empty"], "out", {}, r"empty: no images in this folder .*empty/\*\*"),
        (["photos/*.jpg"], "out", {}, r"photos/\*\.jpg: the pattern matches no file"),
        (["note*"], "out", {}, r"note\*: the pattern matches no image"),
        (
            ["photos/a.png"],
            "x.png",
            {"suffix": "jpg"},
            r"suffix = jpg: is of the files in a folder; the sink is the file",
        ),
        (["notes.txt"], "out", {}, r"notes\.txt: not an image file; allowed are \.bmp"),
        (["photos"], "out.png", {}, r"5 source images and the file out\.png as sink"),
        (
            ["photos"],
            "out.mp4",
            {},
            r"sink out\.mp4: images are written as .*for a folder of this name write out\.mp4/",
        ),
        (["photos/a.png"], "out.gif", {}, r"not \.gif"),
        (["photos"], "notes", {}, r"sink notes: exists and is neither a folder nor an image file"),
        (["photos"], "out", {"suffix": "gif"}, r"suffix = 'gif': allowed are \.bmp, "),
        (["photos", "twin"], "out", {}, r"photos/a\.png and twin/a\.jpg would both become out/a\.png"),
        (["photos/a.png"] * 2, "out", {}, r"would both become out/a\.png"),
        (["photos"], "photos", {"overwrite": True}, r"photos/a\.png: is a source itself"),
        (["photos/a.png"], "photos/../photos/a.png", {"overwrite": True}, r"is a source itself"),
        (["photos"], "full", {}, r"exist: full/a.png, full/b.png, full/c.png, full/d.png, full/e.png; use overwrite"),
        (["photos", "more.png"], "full", {}, r"full/e\.png and 1 more; use overwrite"),
        (["photos/a.png"], "full/a.png", {}, r"outputs exist: full/a\.png;"),
        (["photos/a.png"], "notes.txt/out", {}, r"notes\.txt is a file, not a folder"),
        (["photos/a.png"], "tray", {}, r"tray/a\.png: is a folder where an output would go"),
    ],
)
def test_refused_before_anything_is_made(photos, tmp_path, monkeypatch, sources, sink, options, match):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, {"twin/a.jpg": (4, 4), "more.png": (4, 4)})
    make(tmp_path / "full", {f"{s}.png": (4, 4) for s in (*"abcde", "more")})
    (tmp_path / "empty").mkdir()
    (tmp_path / "tray/a.png").mkdir(parents=True)
    for name in ("notes.txt", "notes"):
        (tmp_path / name).write_text("")
    before = {path: path.stat().st_mtime_ns for path in everything(tmp_path)}
    g = translator()
    with pytest.raises(InputError, match=match):
        translate_files(g, sources, sink, Infer(**options))
    assert {path: path.stat().st_mtime_ns for path in everything(tmp_path)} == before
    assert g.count == 0


def test_a_folder_name_with_a_dot_needs_its_slash(photos, tmp_path):
    summary = translate_files(translator(), [photos / "a.png"], f"{tmp_path}/run-1.5/", PLAIN)
    assert summary.outputs == (tmp_path / "run-1.5" / "a.png",)


def test_pair_of_odd_width_is_refused(tmp_path):
    make(tmp_path, {"pair.png": (30, 47)})
    with pytest.raises(InputError, match=r"pair\.png.* even width, not 47"):
        translate_files(translator(), [tmp_path / "pair.png"], tmp_path / "out", Infer(direction="AtoB"))


def test_channels_no_file_has_are_refused(photos, tmp_path):
    with pytest.raises(InputError, match=r"the model has 3 and 2 channels; image files have 1, 3 or 4"):
        translate_files(translator(out_channels=2), [photos], tmp_path / "out", PLAIN)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_refused(photos, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(EnvironmentFailed, match=r"no permission to write in .*closed"):
        translate_files(translator(), [photos], closed / "out", PLAIN)

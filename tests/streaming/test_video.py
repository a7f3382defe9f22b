"""Videos from file to file: what must be the same afterwards is the same."""

import gc
import json
import os
import struct
import subprocess
import sys
import threading
import time
import weakref
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix import cli
from fastpix2pix.config import Infer, Stream
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.runtime.load import load
from fastpix2pix.runtime.native import FrameRuntime
from fastpix2pix.runtime.translator import Translator
from fastpix2pix.streaming.routes import routes
from fastpix2pix.streaming.sinks import FrameFolder
from fastpix2pix.streaming.stream import Stream as Video
from fastpix2pix.streaming.stream import flicker, translate
from tests.streaming.clips import (
    FRAMES,
    Identity,
    make_video,
    packets_of,
    pictures_of,
    psnr,
    scene,
    stamps_of,
)

ROOT = Path(__file__).resolve().parents[2]
VFR = [0, 40, 90, 100, 200, 360, 370, 400, 440, 480, 600, 640, 690, 800, 840, 900, 1000, 1040, 1080, 2000]


def run(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


@pytest.mark.parametrize("stamps", [None, VFR], ids=["25 fps", "variable"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_frames_and_timestamps_are_kept(identity, tmp_path, suffix, stamps):
    source = make_video(tmp_path / "in.mp4", stamps=stamps)
    report = Video(identity, source, tmp_path / f"out{suffix}").run()
    found = stamps_of(tmp_path / f"out{suffix}")
    assert len(found) == FRAMES == report.frames["in"] == report.frames["out"]
    assert [round(1000 * s) for s in found] == [round(1000 * s) for s in stamps_of(source)]
    assert report.frames == {
        "in": FRAMES,
        "out": FRAMES,
        "dropped": 0,
        "late": 0,
        "failed": 0,
        "abandoned": 0,
        "broken": 0,
    }
    assert psnr(pictures_of(tmp_path / f"out{suffix}")[7], pictures_of(source)[7]) > 33


@pytest.mark.parametrize("between", [0, 1, 3])
@pytest.mark.parametrize("suffix", [".avi", ".wmv", ".mkv", ".ts"])
def test_a_source_of_reordered_pictures_keeps_its_rate(identity, tmp_path, suffix, between):
    """.avi and .wmv have no presentation times."""
    source = make_video(tmp_path / f"in{suffix}", frames=12, between=between, time_base=Fraction(1, 25))
    Video(identity, source, tmp_path / "out.mkv").run()
    found = stamps_of(tmp_path / "out.mkv")
    assert len(found) == 12 and {b - a for a, b in pairwise(found)} == {Fraction(1, 25)}
    pictures = pictures_of(tmp_path / "out.mkv")
    assert all(psnr(picture, scene(number)) > 25 for number, picture in enumerate(pictures))


def test_pictures_copied_in_the_order_of_decoding_keep_their_length(identity, tmp_path):
    """What `ffmpeg -c copy` makes of such an .avi."""
    source = make_video(tmp_path / "in.avi", between=3, time_base=Fraction(1, 25))
    with av.open(str(source)) as given, av.open(str(tmp_path / "copy.mkv"), "w") as copy:
        stream = copy.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.stream = packet.dts, stream
                copy.mux(packet)
    Video(identity, tmp_path / "copy.mkv", tmp_path / "out.mkv").run()
    assert stamps_of(tmp_path / "out.mkv")[-1] == Fraction(FRAMES - 1, 25)


@pytest.mark.parametrize("suffix", [".avi", ".wmv", ".y4m"])
def test_containers_without_presentation_times_are_written_in_order(identity, tmp_path, suffix):
    source, written = make_video(tmp_path / "in.mp4"), tmp_path / f"out{suffix}"
    Video(identity, source, written).run()
    assert stamps_of(written) == sorted(stamps_of(written))
    with av.open(str(written)) as opened:
        assert opened.streams.video[0].guessed_rate == 25
    Video(identity, written, tmp_path / "back.mkv").run()
    assert stamps_of(tmp_path / "back.mkv") == stamps_of(source)
    assert psnr(pictures_of(tmp_path / "back.mkv")[7], pictures_of(source)[7]) > 30


def test_y4m_holds_the_pictures_as_they_are(identity, tmp_path):
    source = make_video(tmp_path / "in.mp4", tags=(6, 1))
    Video(identity, source, tmp_path / "out.y4m").run()
    before, after = (pictures_of(path, pixels="yuv420p") for path in (source, tmp_path / "out.y4m"))
    assert np.array_equal(before, after)


def test_a_constant_rate_may_begin_between_two_periods(identity, tmp_path):
    source = make_video(tmp_path / "in.ts", stamps=[1420 + 40 * number for number in range(FRAMES)])
    Video(identity, source, tmp_path / "out.avi").run()
    found = stamps_of(tmp_path / "out.avi")
    assert {b - a for a, b in pairwise(found)} == {Fraction(1, 25)} and abs(found[0] - stamps_of(source)[0]) < 0.07


@pytest.mark.parametrize("source", ["in.mp4", "in.mkv"])  # by its rates at the start; by a picture
@pytest.mark.parametrize("sink", ["out.avi", "out.y4m"])
def test_a_variable_rate_is_refused_where_the_container_has_one(identity, tmp_path, source, sink):
    make_video(tmp_path / source, stamps=VFR)
    with pytest.raises(InputError, match=rf"{sink}: \.\w+ holds pictures of one rate, .*\(.*\); use .mkv"):
        Video(identity, tmp_path / source, tmp_path / sink).run()
    assert (tmp_path / sink).exists() == (source == "in.mkv")  # what was done before is kept


def test_a_picture_that_is_missing_leaves_its_time_empty_in_avi(identity, tmp_path):
    stamps = [40 * number for number in range(40) if number != 7]
    source = make_video(tmp_path / "in.mp4", frames=39, stamps=stamps)
    Video(identity, source, tmp_path / "out.avi").run()
    Video(identity, tmp_path / "out.avi", tmp_path / "back.mkv").run()
    assert [1000 * stamp for stamp in stamps_of(tmp_path / "back.mkv")] == stamps
    with pytest.raises(InputError, match=r"out\.y4m: .* \(one at 0\.320 s is not at its time\); use \.mkv"):
        Video(identity, source, tmp_path / "out.y4m").run()


def test_sound_is_copied_bit_by_bit_or_left_out(identity, tmp_path):
    source = make_video(tmp_path / "in.mp4", sound=True)
    Video(identity, source, tmp_path / "out.mp4").run()
    assert packets_of(tmp_path / "out.mp4", "audio") == packets_of(source, "audio") != []
    Video(identity, source, tmp_path / "quiet.mp4", audio="none").run()
    assert packets_of(tmp_path / "quiet.mp4", "audio") == []
    with pytest.raises(InputError, match=r"the sound \(aac\) cannot be copied .* use .mkv, or audio = none"):
        Video(identity, source, tmp_path / "out.webm").run()
    assert not (tmp_path / "out.webm").exists()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_sound_of_a_transport_stream(identity, tmp_path, suffix):
    """Its AAC has headers that other containers do not want."""
    source = make_video(tmp_path / "in.ts", frames=40, sound=True)
    Video(identity, source, tmp_path / f"out{suffix}").run()

    def samples(path: Path) -> int:
        with av.open(str(path)) as opened:
            return sum(frame.samples for frame in opened.decode(audio=0))

    assert samples(tmp_path / f"out{suffix}") == samples(source) > 0


@pytest.mark.parametrize("frames", [1, 2, 25, 26, 27, 51])
def test_an_mp4_in_pieces_shows_its_last_picture(identity, tmp_path, frames):
    source = make_video(tmp_path / "in.mkv", frames=frames)
    Video(identity, source, tmp_path / "out.mp4").run()
    assert len(stamps_of(tmp_path / "out.mp4")) == frames


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "gray"])
@pytest.mark.parametrize("tags", [(1, 1), (6, 1), (1, 2), (6, 2)], ids=["709", "601", "709 full", "601 full"])
def test_colours_come_through_before_encoding(identity, tmp_path, pixels, tags):
    """Decoded to RGB by FFmpeg before and after; what lies between is the runtime and a lossless codec."""
    source = make_video(tmp_path / "in.mkv", frames=3, codec="ffv1", pixels=pixels, tags=tags)
    sink = tmp_path / "out.mkv"
    made = "yuv420p" if pixels == "yuv420p" else "yuv444p"
    Video(identity, source, sink, codec="ffv1", pixel_format=made).run()
    with av.open(str(source)) as a, av.open(str(sink)) as b:
        for before, after in zip(a.decode(video=0), b.decode(video=0), strict=True):
            assert (after.colorspace, after.color_range) == (before.colorspace, before.color_range)
            if made == pixels:  # plane by plane: no conversion but the runtime's
                assert psnr(after.to_ndarray(), before.to_ndarray()) >= 45
            one, two = (f.reformat(format="rgb24", src_colorspace=tags[0]).to_ndarray() for f in (before, after))
            assert psnr(one, two) >= (45 if made == pixels or pixels == "gray" else 40)


def test_pictures_whose_last_row_lies_first_come_out_upright(identity, tmp_path):
    """As programs of Windows write them: a positive height in the header of an .avi."""
    source = make_video(tmp_path / "in.avi", frames=2, codec="rawvideo", pixels="bgr24")
    head = bytearray(source.read_bytes())
    height = head.index(b"strf") + 16
    (downwards,) = struct.unpack_from("<i", head, height)
    struct.pack_into("<i", head, height, abs(downwards))
    source.write_bytes(head)
    given = pictures_of(source)
    assert np.array_equal(given[0], scene(0)[::-1])
    pairs = routes([str(source)], str(tmp_path / "frames"), Infer(suffix="png"), Stream())
    translate(identity, pairs, Stream())
    for number, picture in enumerate(given):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"frames/in/{number:06}.png")), picture)


@pytest.mark.parametrize("pixels", ["nv12", "bgr24", "rgba"])
def test_other_formats_go_in_as_they_are(identity, tmp_path, pixels):
    source = make_video(tmp_path / "in.nut", frames=2, codec="rawvideo", pixels=pixels)
    made = "yuv420p" if pixels == "nv12" else "yuv444p"
    Video(identity, source, tmp_path / "out.mkv", codec="ffv1", pixel_format=made).run()
    with av.open(str(source)) as a, av.open(str(tmp_path / "out.mkv")) as b:
        before, after = next(a.decode(video=0)), next(b.decode(video=0))
        assert before.format.name == pixels
        if pixels == "nv12":
            assert psnr(after.to_ndarray(), before.reformat(format="yuv420p").to_ndarray()) >= 45
        else:
            assert psnr(after.reformat(format="rgb24", src_colorspace=6).to_ndarray(), scene(0)) >= 45


def test_pictures_of_rgb_come_through_as_they_are(identity, tmp_path):
    source = make_video(tmp_path / "in.nut", frames=3, codec="rawvideo", pixels="rgb24")
    summary = translate(
        identity, routes([str(source)], str(tmp_path / "frames"), Infer(suffix="png"), Stream()), Stream()
    )
    assert summary.streams[0].frames["out"] == 3
    files = sorted((tmp_path / "frames" / "in").iterdir())
    assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
    for number, path in enumerate(files):
        assert np.array_equal(np.asarray(Image.open(path)), scene(number))


def test_untagged_colours_are_guessed_by_height_and_said(identity, tmp_path, capsys):
    source = make_video(tmp_path / "in.mp4", frames=2)
    Video(identity, source, tmp_path / "out.mp4").run()
    assert "no colour tags; taken as bt601, limited range, by its height" in capsys.readouterr().err
    with av.open(str(tmp_path / "out.mp4")) as opened:
        frame = next(opened.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (6, 1)


@pytest.mark.parametrize("turned", [90, -90, 180])
def test_a_turned_picture_comes_out_upright(identity, tmp_path, turned):
    source = make_video(tmp_path / "in.mp4", frames=2, turned=turned, aspect=Fraction(4, 3))
    Video(identity, source, tmp_path / "out.mp4").run()
    with av.open(str(source)) as a, av.open(str(tmp_path / "out.mp4")) as b:
        before, after = next(a.decode(video=0)), next(b.decode(video=0))
        assert before.rotation % 360 == turned % 360 and after.rotation == 0
        upright = np.rot90(before.to_ndarray(format="rgb24"), turned // 90)  # counterclockwise
        assert (after.height, after.width) == upright.shape[:2]
        assert psnr(after.to_ndarray(format="rgb24"), upright) > 30
        shape = Fraction(3, 4) if turned % 180 else Fraction(4, 3)
        assert b.streams.video[0].sample_aspect_ratio == shape


def test_odd_sizes(identity, tmp_path, capsys):
    source = make_video(tmp_path / "in.mkv", frames=2, size=(47, 63), codec="ffv1", pixels="yuv444p")
    Video(identity, source, tmp_path / "out.mp4").run()
    assert "out.mp4: 64x48, one more than the odd size" in capsys.readouterr().err
    (picture, _), (given, _) = pictures_of(tmp_path / "out.mp4"), pictures_of(source)
    assert picture.shape == (48, 64, 3)
    assert psnr(picture[:47, :63], given) > 30
    Video(identity, source, tmp_path / "same.mp4", pixel_format="yuv444p").run()
    assert pictures_of(tmp_path / "same.mp4")[0].shape == (47, 63, 3)


@pytest.mark.parametrize(
    ("sink", "options", "hint"),
    [
        ("out.mp4", {}, "; --pixel-format yuv444p takes any"),
        ("out.mp4", {"codec": "libsvtav1"}, ""),  # yuv420p only
        ("-", {"pixel_format": "yuv420p"}, "; --pixel-format rgb24 takes any"),
    ],
)
def test_of_an_odd_size_it_is_said_what_keeps_it(identity, tmp_path, capfdbinary, sink, options, hint):
    source = make_video(tmp_path / "in.mkv", frames=2, size=(65, 97), codec="ffv1", pixels="yuv444p")
    Video(identity, source, sink if sink == "-" else tmp_path / sink, **options).run()
    assert f"its pixel format takes even ones{hint}\n" in capfdbinary.readouterr().err.decode()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"fit": "pad"}, (48, 64)),
        ({"fit": "pad", "size": "32"}, (24, 32)),
        ({"fit": "resize", "size": "32x96"}, (32, 96)),
        ({"fit": "crop", "size": "32"}, (32, 32)),
        ({"fit": "tile", "tile": 32}, (48, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_fits(tmp_path, options, size, layout):
    source = make_video(tmp_path / "in.mp4", frames=3)
    Video(Translator(Identity("running", layout=layout)), source, tmp_path / "out.mp4", **options).run()
    given, pictures = pictures_of(source), pictures_of(tmp_path / "out.mp4")
    assert [p.shape for p in pictures] == [(*size, 3)] * 3
    expected = given[0] if options["fit"] != "crop" else given[0][:, 8:56]
    shrunk = np.asarray(Image.fromarray(expected).resize(size[::-1], Image.Resampling.BICUBIC))
    assert psnr(pictures[0], shrunk) > 28


def test_tiles_need_running_statistics(identity, tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=2)
    with pytest.raises(InputError, match="fit = tile: a tile has other image statistics"):
        Video(identity, source, tmp_path / "out.mp4", fit="tile", tile=32).run()
    with pytest.raises(InputError, match="tile = 33: this model takes multiples of 32"):
        Video(Translator(Identity("running")), source, tmp_path / "out.mp4", fit="tile", tile=33).run()
    assert not (tmp_path / "out.mp4").exists()


def test_a_video_is_translated_as_its_pictures_are(model, tmp_path):
    """Against the translator of images, on the frames as FFmpeg decodes them to RGB."""
    source = make_video(tmp_path / "in.nut", frames=3, codec="rawvideo", pixels="rgb24")
    assert run("infer", model, source, tmp_path / "frames", "--suffix", "png") == 0
    g = load(model)
    for number in range(3):
        found = np.asarray(Image.open(tmp_path / "frames" / "in" / f"{number:06}.png")).astype(int)
        assert abs(found - g(scene(number))).max() <= 1


@pytest.mark.parametrize("channels", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_gray_models(tmp_path, channels, layout):
    class Gray(Identity):
        in_channels, out_channels = channels

        def translate(self, batch, first=0):
            assert batch.shape[1] == channels[0]
            return batch.mean(1, keepdim=True).expand(-1, channels[1], -1, -1)

    source = make_video(tmp_path / "in.nut", frames=1, codec="rawvideo", pixels="rgb24")
    pairs = routes([str(source)], str(tmp_path / "frames"), Infer(suffix="png"), Stream())
    translate(Translator(Gray(layout=layout)), pairs, Stream())
    found = np.asarray(Image.open(tmp_path / "frames/in/000000.png")).astype(int)
    picture = Image.fromarray(scene(0))
    expected = np.asarray(picture.convert("L")) if channels[0] == 1 else scene(0).mean(-1)
    assert abs(found - expected[..., None]).max() <= 1
    Gray.out_channels = 4
    with pytest.raises(InputError, match=rf"the model has {channels[0]} and 4 channels; videos have 1 \(gray\) or 3"):
        translate(Translator(Gray()), pairs, Stream())


def test_recorded_random_noise_becomes_fixed(model, tmp_path, capsys):
    source = make_video(tmp_path / "in.nut", frames=1, codec="rawvideo", pixels="rgb24")
    g = load(model, noise="random")
    g.modes_source["noise"] = "record"
    Video(g, source, tmp_path / "out.mp4").run()
    assert "noise fixed instead of random (record)" in capsys.readouterr().err
    assert g.modes.noise == "random"  # for images it stays
    g.modes_source["noise"] = "given"
    Video(g, source, tmp_path / "out.mp4", overwrite=True).run()
    assert "instead" not in capsys.readouterr().err


def test_the_figures_say_which_noise_there_was(model, tmp_path):
    make_video(tmp_path / "in.mp4", frames=1)
    g = load(model, noise="random")
    g.modes_source["noise"] = "record"
    options = Stream(stats=str(tmp_path / "stats.json"))
    translate(g, routes([str(tmp_path / "in.mp4")], "null:", Infer(), options), options)
    engine = json.loads((tmp_path / "stats.json").read_text())["engine"]
    assert (engine["noise"], engine["modes_source"]["noise"]) == ("fixed", "video")


def test_stats_of_the_python_api(identity, tmp_path):
    Video(identity, make_video(tmp_path / "in.mp4"), "null:", stats=tmp_path / "stats.json").run()
    assert json.loads((tmp_path / "stats.json").read_text())["frames"]["out"] == FRAMES


def test_a_broken_image_of_a_video_is_left_out_and_its_time_kept(identity, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(5):
        Image.fromarray(scene(number)).save(tmp_path / f"in/{number}.png")
    for number in (0, 3):
        (tmp_path / f"in/{number}.png").write_bytes(b"broken")
    report = Video(identity, tmp_path / "in", tmp_path / "out.mkv", fps=10).run()
    assert [round(10 * s) for s in stamps_of(tmp_path / "out.mkv")] == [1, 2, 4]
    assert report.frames["in"] == report.frames["out"] == 3 and report.frames["broken"] == 2
    err = capsys.readouterr().err
    assert [f"left out: {tmp_path}/in/{n}.png: not an image" in err for n in range(5)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    for number in (1, 2, 4):
        (tmp_path / f"in/{number}.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="in: none of 5 images could be read"):
        Video(identity, tmp_path / "in", tmp_path / "none.mkv").run()


def test_a_named_pipe_is_a_source(identity, tmp_path):
    source = make_video(tmp_path / "in.mkv").read_bytes()
    os.mkfifo(tmp_path / "pipe.mkv")
    writer = threading.Thread(target=(tmp_path / "pipe.mkv").write_bytes, args=(source,))
    writer.start()
    report = Video(identity, tmp_path / "pipe.mkv", tmp_path / "out.mkv").run()
    writer.join()
    assert report.frames["out"] == FRAMES


def test_av1_says_nothing_about_itself(identity, tmp_path, capfd):
    source = make_video(tmp_path / "in.mp4", frames=2, tags=(6, 1))
    Video(identity, source, tmp_path / "out.mp4", codec="libsvtav1").run()
    assert capfd.readouterr().err == ""


def test_a_folder_of_images_becomes_a_video(identity, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(5):
        Image.fromarray(scene(number, 48, 64 if number < 3 else 80)).save(tmp_path / f"in/{number}.png")
    Video(identity, tmp_path / "in", tmp_path / "out.mp4", fps=10).run()
    assert [float(s) for s in stamps_of(tmp_path / "out.mp4")] == [0.0, 0.1, 0.2, 0.3, 0.4]
    pictures = pictures_of(tmp_path / "out.mp4")
    assert {p.shape for p in pictures} == {(48, 64, 3)}  # of the first
    assert psnr(pictures[0], scene(0)) > 30


def test_several_videos_into_a_folder_in_batches(model, tmp_path):
    for name in ("a", "b"):
        make_video(tmp_path / f"{name}.mp4", frames=8)
    stats = tmp_path / "stats.json"
    options = ("--batch", 2, "--stats", stats)
    assert run("infer", model, tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "out/", *options) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.mp4", "b.mp4"]
    for name in ("a", "b"):
        assert stamps_of(tmp_path / f"out/{name}.mp4") == stamps_of(tmp_path / f"{name}.mp4")
    found = json.loads(stats.read_text())
    assert found["frames"]["out"] == 16
    assert found["batches"]["2"] >= 4  # the streams went together
    assert run("infer", model, tmp_path / "a.mp4", tmp_path / "alone.mp4") == 0
    assert psnr(pictures_of(tmp_path / "alone.mp4")[3], pictures_of(tmp_path / "out/a.mp4")[3]) > 40


def test_what_a_stream_needed_is_given_back_when_it_ends(model, tmp_path, monkeypatch):
    for name in "abcd":
        make_video(tmp_path / f"{name}.mp4", frames=3)
    runtimes, alive = [], []

    def made(*arguments, **options):
        gc.collect()
        alive.append(sum(runtime() is not None for runtime in runtimes))
        runtime = FrameRuntime(*arguments, **options)
        runtimes.append(weakref.ref(runtime))
        return runtime

    monkeypatch.setattr("fastpix2pix.streaming.frame_runtime.FrameRuntime", made)
    assert run("infer", model, *(tmp_path / f"{name}.mp4" for name in "abcd"), tmp_path / "out/") == 0
    assert len(alive) == 4 and max(alive) <= 1  # two run at a time
    gc.collect()
    assert [runtime() for runtime in runtimes] == [None] * 4


def test_of_several_videos_a_broken_one_is_left_out_and_named(model, tmp_path, capsys):
    for name in ("a", "c"):
        make_video(tmp_path / f"{name}.mp4", frames=8)
    (tmp_path / "b.mp4").write_bytes(b"broken")
    videos = tmp_path / "*.mp4"
    assert run("infer", model, videos, tmp_path / "out/", "--stats", "-") == 4
    out, err = capsys.readouterr()
    assert f"left out: {tmp_path}/b.mp4: cannot be read as a video" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.mp4", "c.mp4"]
    assert [len(stamps_of(tmp_path / f"out/{name}.mp4")) for name in ("a", "c")] == [8, 8]
    assert [bool(one["error"]) for one in json.loads(out)["streams"]] == [False, True, False]
    for name in ("a", "c"):
        (tmp_path / f"{name}.mp4").write_bytes(b"broken")
    assert run("infer", model, videos, tmp_path / "none/") == 2
    assert not (tmp_path / "none").exists()


def test_a_stream_is_of_one_video(identity, tmp_path):
    for name in ("a", "b"):
        make_video(tmp_path / f"{name}.mp4", frames=2)
    with pytest.raises(InputError, match=r"\*\.mp4: 2 videos; a Stream is of one: make one of each, or use .* infer"):
        Video(identity, tmp_path / "*.mp4", f"{tmp_path}/out/")
    assert Video(identity, tmp_path / "a*.mp4", f"{tmp_path}/out/").run().frames["out"] == 2


def test_frames_of_another_video_are_replaced(model, tmp_path):
    for name, frames in (("a", 5), ("b", 1)):
        make_video(tmp_path / name / "in.mp4", frames=frames)
    folder = tmp_path / "out/in"
    frames = ("infer", model, tmp_path / "a/in.mp4", tmp_path / "out", "--suffix", "png")
    assert run(*frames) == 0 and len(list(folder.iterdir())) == 5
    others = {"000000.jpg", "00001.png", "a000001.png", "000001.png.txt"}
    for name in others:
        (folder / name).touch()
    assert run("infer", model, tmp_path / "b/in.mp4", *frames[3:]) == 2 and len(list(folder.iterdir())) == 9
    assert run("infer", model, tmp_path / "b/in.mp4", *frames[3:], "--overwrite") == 0
    assert {path.name for path in folder.iterdir()} == {"000000.png", *others}


def test_an_image_that_is_none_here_is_named_and_not_taken_for_a_video(model, tmp_path, capsys):
    for name, format_ in (("good.png", "PNG"), ("noext", "JPEG"), ("a.avif", "AVIF")):
        Image.fromarray(scene(0)).save(tmp_path / name, format_)
    for sources in (["noext"], ["a.avif"], ["good.png", "noext"]):
        assert run("infer", model, *(tmp_path / name for name in sources), tmp_path / "out/") == 2
        assert f"{sources[-1]}: not an image file that can be read here; allowed are" in capsys.readouterr().err
    for sink in ("o.gif", "o.xyz"):
        assert run("infer", model, tmp_path / "good.png", tmp_path / sink) == 2
        assert f"{sink}: images are written as" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_flicker_is_of_one_video(identity, tmp_path):
    for name in ("a", "b"):
        make_video(tmp_path / f"{name}.mp4", frames=2)
    with pytest.raises(InputError, match="2 videos; flicker is measured of one"):
        flicker(identity, tmp_path / "*.mp4")


def test_stats_say_what_happened(model, tmp_path, capsys):
    source = make_video(tmp_path / "in.mp4")
    assert run("infer", model, source, "null:", "--stats", "-") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["frames"]["in"] == found["frames"]["out"] == FRAMES
    (one,) = found["streams"]
    assert set(one["stages"]) == {
        *("decode", "wait", "queue", "to_network", "engine", "from_network", "total", "encode"),
    }
    for stage in one["stages"].values():
        assert 0 <= stage["p50_ms"] <= stage["p95_ms"] <= stage["p99_ms"] <= stage["max_ms"]
    assert 0 < one["engine_share"] <= 1 and one["overlap"] > 0
    assert one["fps"] == pytest.approx(FRAMES / one["seconds"])
    assert found["engine"]["norm_stats"] == "image"
    assert f"{FRAMES} of {FRAMES} frames" in err


def test_flicker_of_a_model_and_of_its_smoothing(model, tmp_path, capsys):
    """A still picture, new noise for every frame: all change of the output is flicker."""
    (tmp_path / "in").mkdir()
    for number in range(8):
        Image.fromarray(scene(0)).save(tmp_path / f"in/{number}.png")
    found = []
    for options in (("--noise", "random"), ("--noise", "random", "--steady", 0.8), ("--noise", "fixed")):
        assert run("eval", model, tmp_path / "in", "--video", "--json", "-", *options) == 0
        found.append(json.loads(capsys.readouterr().out))
    random, steadied, fixed = found
    assert (random["frames"], random["still"], random["input"]) == (8, 1.0, 0.0)
    assert random["flicker"] > 3 * steadied["flicker"] > 0
    assert fixed["flicker"] == pytest.approx(0, abs=1e-4)


def test_frames_are_limited(identity, tmp_path):
    Video(identity, make_video(tmp_path / "in.mp4"), tmp_path / "out.mp4", max_frames=5).run()
    assert len(stamps_of(tmp_path / "out.mp4")) == 5


def test_live_drops_what_is_late_and_accounts_for_it(tmp_path):
    class Slow(Identity):
        def translate(self, batch, first=0):
            time.sleep(0.1)
            return batch.clone()

    source = make_video(tmp_path / "in.mp4", frames=25)
    start = time.monotonic()
    report = Video(Translator(Slow()), source, tmp_path / "out.mp4", live=True).run()
    seconds = time.monotonic() - start
    assert seconds > 0.9  # one second of video, at its own speed
    frames = report.frames
    assert frames["in"] == 25
    assert frames["in"] == frames["out"] + frames["dropped"] + frames["late"]
    assert 2 <= frames["out"] <= seconds / 0.1 + 2  # as many as there was time for, and the two on their way
    shown, given = stamps_of(tmp_path / "out.mp4"), stamps_of(source)
    assert len(shown) == frames["out"] and set(shown) <= set(given) and shown == sorted(shown)
    assert report.stages["total"]["p50_ms"] < 500  # never behind by more than what is in work and one waiting


def test_live_a_stream_with_few_pictures_holds_no_other_up(identity, tmp_path, monkeypatch):
    monkeypatch.setattr("fastpix2pix.streaming.together._WAIT", 10.0)
    pairs = [
        (str(make_video(tmp_path / "many.mp4", frames=25)), "null:"),
        (str(make_video(tmp_path / "few.mp4", frames=3, stamps=[0, 500, 1000])), "null:"),
    ]
    many, few = translate(identity, pairs, Stream(live=True), batch=2).streams
    assert many.frames["in"] == 25 and many.frames["out"] > 12 and few.frames["out"] > 0


def test_offline_never_drops_with_a_slow_sink(identity, tmp_path, monkeypatch):
    wait = FrameFolder.write

    def slow(self, pts, duration):
        time.sleep(0.02)
        wait(self, pts, duration)

    monkeypatch.setattr(FrameFolder, "write", slow)
    source = make_video(tmp_path / "in.mp4")
    pairs = routes([str(source)], str(tmp_path / "frames"), Infer(suffix="jpg"), Stream())
    report = translate(identity, pairs, Stream()).streams[0]
    assert report.frames["out"] == FRAMES == len(list((tmp_path / "frames" / "in").iterdir()))


def test_broken_packets_are_skipped_and_counted(identity, tmp_path):
    whole = bytearray(make_video(tmp_path / "in.ts", frames=60).read_bytes())
    rng = np.random.default_rng(0)
    for start in rng.integers(len(whole) // 3, len(whole) - 400, 12):
        whole[start : start + 300] = rng.integers(0, 256, 300, dtype=np.uint8).tobytes()
    (tmp_path / "broken.ts").write_bytes(whole)
    report = Video(identity, tmp_path / "broken.ts", tmp_path / "out.mp4").run()
    assert report.frames["out"] == len(stamps_of(tmp_path / "out.mp4")) > 20
    assert report.frames["in"] == report.frames["out"]


def test_pictures_that_the_decoder_patched_are_shown_and_counted(identity, tmp_path):
    whole = bytearray(make_video(tmp_path / "in.mkv", frames=60).read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.integers(len(whole) // 2, len(whole) - 400, 40):
        whole[place] ^= 255
    (tmp_path / "broken.mkv").write_bytes(whole)
    patched = lost = 0
    with av.open(str(tmp_path / "broken.mkv")) as opened:
        opened.streams.video[0].thread_type = "AUTO"
        for packet in opened.demux(video=0):
            try:
                patched += sum(frame.is_corrupt for frame in packet.decode())
            except av.error.FFmpegError:
                lost += 1
    report = Video(identity, tmp_path / "broken.mkv", tmp_path / "out.mp4").run()
    assert patched > 0 and report.frames["broken"] == patched + lost
    assert report.frames["out"] == report.frames["in"] > patched


def test_pictures_that_change_their_size_are_scaled_to_the_first(identity, tmp_path, capsys):
    both = [make_video(tmp_path / f"{n}.ts", frames=10, size=size) for n, size in enumerate([(48, 64), (96, 96)])]
    (tmp_path / "in.ts").write_bytes(b"".join(path.read_bytes() for path in both))
    report = Video(identity, tmp_path / "in.ts", tmp_path / "out.mp4").run()
    assert "from here on 96x96; scaled to 64x48" in capsys.readouterr().err
    pictures = pictures_of(tmp_path / "out.mp4")
    assert len(pictures) == report.frames["out"] == 20
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}
    steps = {b - a for a, b in pairwise(stamps_of(tmp_path / "out.mp4"))}
    assert steps == {Fraction(1, 25)}  # though the second file begins at 0 again


def test_a_file_that_is_cut_off_is_translated_as_far_as_it_goes(identity, tmp_path):
    whole = make_video(tmp_path / "in.mkv", frames=60).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    report = Video(identity, tmp_path / "cut.mkv", tmp_path / "out.mp4").run()
    assert 10 < report.frames["out"] < 60


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.mp4", b"", "empty.mp4: cannot be read as a video"),
        ("text.mp4", b"hello" * 100, "text.mp4: cannot be read as a video"),
        ("none.mp4", None, "no such file"),
    ],
)
def test_unreadable_sources_leave_nothing(model, tmp_path, capsys, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    assert run("infer", model, tmp_path / name, tmp_path / "out" / "x.mp4") == 2
    assert run("infer", model, tmp_path / name, tmp_path / "D/") == 2
    err = capsys.readouterr().err
    assert match in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_camera_that_is_not_there(model, tmp_path, capsys):
    assert run("infer", model, "/dev/video99", tmp_path / "out.mp4") == 2
    assert "/dev/video99: cannot be opened as a V4L2 camera: No such file" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


def wave() -> bytes:
    """A .wav file: a second of silence."""
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 8036, b"WAVE", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", 8000)
    return head + bytes([128]) * 8000


def test_sound_alone_is_no_video(identity, tmp_path):
    (tmp_path / "a.avi").write_bytes(wave())
    with pytest.raises(InputError, match=r"a\.avi: has no video stream"):
        Video(identity, tmp_path / "a.avi", tmp_path / "out.mp4").run()


def test_without_pyav_it_is_said_what_to_install(model, tmp_path):
    code = """
import sys
sys.modules["av"] = None
from fastpix2pix.cli import main
sys.exit(main(sys.argv[1:]))
"""
    line = [sys.executable, "-c", code, "infer", str(model), "/dev/video0", str(tmp_path / "out.mp4")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 3
    assert "video needs PyAV" in done.stderr and "pip install 'fastpix2pix[video]'" in done.stderr


def test_no_cuda_is_said_where_it_was_asked_for(identity, tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=2)
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(EnvironmentFailed, match=r"hwaccel = cuda: .*use hwaccel = auto or none"):
        Video(identity, source, tmp_path / "out.mp4", hwaccel="cuda").run()
    assert Video(identity, source, tmp_path / "out.mp4", hwaccel="auto").run().frames["out"] == 2


def test_both_streams_of_a_real_clip(identity, clips, tmp_path):
    source = clips / "nasa_13013.mp4"
    Video(identity, source, tmp_path / "best.mp4", max_frames=12).run()
    Video(identity, source, tmp_path / "first.mp4", max_frames=12, stream=0).run()
    with av.open(str(tmp_path / "best.mp4")) as best, av.open(str(tmp_path / "first.mp4")) as first:
        assert (best.streams.video[0].width, best.streams.video[0].height) == (480, 270)
        assert (first.streams.video[0].width, first.streams.video[0].height) == (320, 180)
        assert len(best.streams.audio) == len(first.streams.audio) == 2
    with pytest.raises(InputError, match=r"stream = 1: the video streams of .* are 0 \(320x180\), 3 \(480x270\)"):
        Video(identity, source, tmp_path / "none.mp4", stream=1).run()


def test_a_real_clip_keeps_everything(identity, clips, tmp_path):
    source = clips / "bigbuckbunny_720p_5s.mp4"
    report = Video(identity, source, tmp_path / "out.mp4").run()
    assert report.frames["out"] == 132
    assert stamps_of(tmp_path / "out.mp4") == stamps_of(source)
    assert packets_of(tmp_path / "out.mp4", "audio") == packets_of(source, "audio")
    with av.open(str(source)) as a, av.open(str(tmp_path / "out.mp4")) as b:
        assert a.duration == b.duration
    assert report.overlap > 0

"""What the words of the command line stand for."""

import os

import numpy as np
import pytest
from PIL import Image

from fastpix2pix.config import Infer, Stream
from fastpix2pix.errors import InputError
from fastpix2pix.streaming.address import expanded, is_url, is_video, shown, sink_kind, source_kind, stem
from fastpix2pix.streaming.routes import routes


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("rtsp://user:secret@10.0.0.1:554/live", "rtsp://user:***@10.0.0.1:554/live"),
        ("http://user:se@cr:et@host/a@b.mp4", "http://user:***@host/a@b.mp4"),
        ("http://:secret@host", "http://:***@host"),
        ("http://user@host/x", "http://user@host/x"),
        ("http://host/x", "http://host/x"),
        ("a:b@c.mp4", "a:b@c.mp4"),
    ],
)
def test_passwords_are_not_shown(address, said):
    assert shown(address) == said
    assert "secret" not in said


def test_other_schemes_are_refused_without_the_password():
    for address in ("concat://a", "file:///etc/passwd", "subfile://x", "gopher://u:secret@host"):
        with pytest.raises(InputError, match=r"allowed are http://.*udp://") as caught:
            is_url(address)
        assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="has no SRT"):
        is_url("srt://host:9000")


def test_kinds_of_sources_and_sinks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.mp4", "c.mp4", "notes", "frames/0.png", "clips/x.MKV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    sources = {
        "-": "pipe",
        "rtsp://host/x": "url",
        "/dev/video0": "camera",
        "frames": "images",
        "frames/*.png": "images",
        "a.png": "images",
        "b.mp4": "video",
        "*.mp4": "video",
        "clips/*": "video",
        "notes": "video",
        "missing.mp4": "images",  # which then says that it is not there
    }
    assert {address: source_kind(address) for address in sources} == sources
    sinks = {
        "-": "pipe",
        "null:": "null",
        "udp://127.0.0.1:9": "url",
        "frames": "folder",
        "new": "folder",
        "new.d/": "folder",
        "x.png": "images",
        "x.mp4": "video",
        "x.gif": "video",
    }
    assert {address: sink_kind(address) for address in sinks} == sinks
    assert expanded("*.mp4") == ["b.mp4", "c.mp4"] and expanded("a.png") == ["a.png"]
    assert not is_video(["a.png"], "out") and not is_video(["frames"], "x.png")
    assert is_video(["frames"], "x.mp4") and is_video(["b.mp4"], "out") and is_video(["frames"], "-")
    assert is_video(["a.png"], "x.mp4") and not is_video(["a.png"], "x.gif") and not is_video(["a.png"], "x.xyz")


OTHER_IMAGE = r": not an image file that can be read here; allowed are \.bmp, "


@pytest.mark.parametrize(
    ("name", "format_"),
    [("noext", "JPEG"), ("a.xyz", "GIF"), ("a.tga", "TGA"), ("a.jp2", "JPEG2000"), ("a", "WEBP")],
)
def test_an_image_of_another_name_or_kind_is_no_video(tmp_path, name, format_):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name, format_)
    with pytest.raises(InputError, match=name + OTHER_IMAGE):
        source_kind(str(tmp_path / name))


@pytest.mark.parametrize("brand", ["avif", "heic"])
def test_an_image_in_a_container_of_videos_is_no_video(tmp_path, brand):
    (tmp_path / "a").write_bytes(b"\0\0\0\x18ftyp" + brand.encode() + b"\0\0\0\0mif1" + brand.encode())
    with pytest.raises(InputError, match="a" + OTHER_IMAGE):
        source_kind(str(tmp_path / "a"))


def test_what_is_no_image_is_left_to_ffmpeg(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a", "JPEG")
    (tmp_path / "a").rename(tmp_path / "raw.mjpeg")  # a video of one picture or more
    (tmp_path / "film").write_bytes(b"\0\0\1\xb3\x16\x00\xf0\x15\xff\xff\xe0\x18")  # MPEG-1, which Pillow knows
    (tmp_path / "mp4").write_bytes(b"\0\0\0\x1cftypisom\0\0\2\0isomiso2avc1mp41")
    os.mkfifo(tmp_path / "pipe")  # nothing may be read of it
    for name in ("raw.mjpeg", "film", "mp4", "pipe"):
        assert source_kind(str(tmp_path / name)) == "video"


def test_names_in_a_folder(tmp_path, monkeypatch):
    (tmp_path / "in/p.v1/even").mkdir(parents=True)
    (tmp_path / "in/a[1].mp4").touch()
    monkeypatch.chdir(tmp_path / "in")
    patterns = {
        "p.v1/even/*.png": "even",
        "p.v1/e*/*.png": "p.v1",
        "p.v1/**": "p.v1",
        "*.png": "in",
        "../*/*": tmp_path.name,
    }
    assert {pattern: stem(pattern) for pattern in patterns} == patterns
    assert stem("a[1].mp4") == "a[1]" and stem("p.v1") == "p.v1" and stem(".") == "in"
    assert stem("-") == "stdin"
    assert stem("/a/b.c.mp4") == "b.c"
    assert stem("rtsp://user:secret@cam-1.local:554/live/main.sdp?x=1") == "cam-1.local-live-main"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "a.mp4",
        "b.mp4",
        "d/a.mkv",
        "one.png",
        "out/a.mp4",
        "full/a/0.png",
        "text.txt",
        "frames/0.png",
        "frames/1.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    return tmp_path


def test_where_videos_go(folder):
    def planned(sources, sink, **infer):
        return routes(sources, sink, Infer(**infer), Stream())

    assert planned(["a.mp4"], "x.mkv") == [("a.mp4", "x.mkv")]
    assert planned(["a.mp4", "b.mp4"], "D") == [("a.mp4", "D/a.mp4"), ("b.mp4", "D/b.mp4")]
    assert planned(["*.mp4"], "D/", suffix="mkv") == [("a.mp4", "D/a.mkv"), ("b.mp4", "D/b.mkv")]
    assert planned(["a.mp4"], "D", suffix="png") == [("a.mp4", "D/a.png/")]
    assert planned(["a.mp4", "b.mp4"], "null:") == [("a.mp4", "null:"), ("b.mp4", "null:")]
    assert planned(["a.mp4"], "out", overwrite=True) == [("a.mp4", "out/a.mp4")]
    assert planned(["-"], "-") == [("-", "-")]


@pytest.mark.parametrize(
    ("sources", "sink", "infer", "stream", "match"),
    [
        (["a.mp4", "b.mp4"], "x.mp4", {}, {}, "2 sources and one sink x.mp4: several need a folder"),
        (["a.mp4", "d/a.mkv"], "D", {}, {}, "a.mp4 and d/a.mkv would both become D/a.mp4"),
        (["a.mp4"], "a.mp4", {}, {}, "is a source itself"),
        (["frames", "a.mp4"], ".", {"suffix": "png", "overwrite": True}, {}, "frames.png/: is a source itself"),
        (["frames/*", "a.mp4"], ".", {"suffix": "png", "overwrite": True}, {}, "frames.png/: is a source itself"),
        (["a.mp4"], "out", {}, {}, "out/a.mp4 exists; use overwrite"),
        (["a.mp4"], "full", {"suffix": "png"}, {}, "full/a exists; use overwrite"),
        (["a.mp4"], "text.txt/x/y.mp4", {}, {}, "text.txt is a file, not a folder"),
        (["a.mp4"], "x.xyz", {}, {}, "a video is written as .*for a folder write x.xyz/"),
        (["a.mp4"], "x.png", {}, {}, "for the frames of a video give a folder"),
        (["a.mp4"], "D", {"suffix": "txt"}, {}, "suffix = txt"),
        (["a.mp4"], "D", {"side_by_side": True}, {}, "side_by_side = True: is for images"),
        (["a.mp4"], "D", {"direction": "AtoB"}, {}, "direction = AtoB: is for images"),
        (["one.png"], "x.mp4", {}, {}, "one.png: one image, where a video is wanted"),
        (["none.mp4"], "x.mp4", {}, {}, "none.mp4: no such file"),
        (["/dev/video99"], "D", {"suffix": "xyz"}, {}, "suffix"),
        (["-", "-"], "D", {}, {}, "more than once"),
        (["a.mp4"], "x.mp4", {}, {"codec": "h264x"}, "codec = h264x: .*no such encoder; there are libx264"),
        (["a.mp4"], "x.mp4", {}, {"pixel_format": "rgb48le"}, "pixel_format = rgb48le: libx264 takes yuv420p"),
        (["a.mp4"], "-", {}, {"pixel_format": "yuv444p"}, "raw frames are .*rgb24"),
        (["a.mp4"], "x.mp4", {}, {"raw": "rgb24:4x4@1"}, "give - as a source"),
        (["-"], "x.mp4", {}, {"raw": "rgb25:4x4@1"}, "FFmpeg has no pixel format rgb25"),
        (["a.mp4"], "x.mp4", {"suffix": "png"}, {}, "suffix = png: is of the files in a folder; the sink is x.mp4"),
        (["a.mp4"], "x.mp4", {}, {"fps": 30.0}, "fps = 30.0: is the rate of images"),
        (["frames"], "x.mp4", {}, {"stream": 1}, "stream = 1: chooses one of a video's streams"),
        (["a.mp4"], "null:", {}, {"codec": "libx265"}, "codec = libx265: is of video that is encoded"),
        (["a.mp4"], "D", {"suffix": "png"}, {"quality": 3}, "quality = 3: is of video that is encoded"),
        (["a.mp4"], "null:", {}, {"pixel_format": "rgb24"}, "pixel_format = rgb24: is of video that is written"),
        (["a.mp4"], "-", {}, {"stats": "-"}, "stats = -: stdout has the frames; give a file"),
        (["a.mp4"], "srt://host", {}, {}, "has no SRT"),
    ],
)
def test_refused_before_a_model_is_loaded(folder, sources, sink, infer, stream, match):
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=match):
        routes(sources, sink, Infer(**infer), Stream(**stream))
    assert sorted(folder.rglob("*")) == before


def test_raw_frames_are_not_for_a_terminal(folder, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(InputError, match="stdout is a terminal"):
        routes(["a.mp4"], "-", Infer(), Stream())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"raw": "rgb24:1280x720"}, "rgb24:1280x720@30"),
        ({"raw": "rgb24:0x720@30"}, "rgb24:1280x720@30"),
        ({"raw": "rgb24:4x4@0"}, "rgb24:1280x720@30"),
        ({"size": "1x2x3"}, "256x512"),
        ({"fit": "stretch"}, "pad, resize, crop, tile"),
        ({"tile": 256}, "tile = 256: side of the squares of fit = tile; fit is pad"),
        ({"steady": 1.0}, r"\[0, 1\)"),
        ({"preview": 65536}, "port"),
        ({"timeout": 0.0}, "positive"),
        ({"max_frames": -1}, "negative"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(InputError, match=match):
        Stream(**options)

"""Frames that stay on the GPU."""

import errno
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix.config import Generator, Infer, Modes, Stream
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.model import build_generator
from fastpix2pix.model.layers import CACHED_MASKS
from fastpix2pix.runtime.engine import TorchEngine
from fastpix2pix.runtime.load import load
from fastpix2pix.runtime.triton_engine import TritonEngine
from fastpix2pix.streaming.device import DeviceNetwork, not_supported_reasons
from fastpix2pix.streaming.opening import _accelerator, open_input
from fastpix2pix.streaming.picture import Picture, on_gpu, pixels_of
from fastpix2pix.streaming.routes import routes
from fastpix2pix.streaming.sources import FFmpegSource, source_of
from fastpix2pix.streaming.stream import translate
from tests.streaming.clips import make_video


class OfAnotherLibrary:
    layout = "nchw"

    def __init__(self, net, modes):
        self.modes, self.device = modes, torch.device("cpu")

    def apart(self):
        return self


def test_what_cannot_be_is_refused_with_all_reasons(model, tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=2)
    options = Stream(frames="cuda", steady=0.5)
    with pytest.raises(InputError, match=r"frames = cuda: .*the model runs on cpu; steady .*use frames = auto or cpu"):
        translate(load(model, device="cpu"), routes([str(source)], "null:", Infer(), options), options)


@pytest.mark.parametrize(
    ("takes", "reason"),
    [
        ({}, None),
        ({"batches": []}, None),
        ({"batches": [1]}, None),
        ({"batches": [1, 2, 4]}, None),
        ({"batches": [4]}, "the engine is built for 4 images in one call, not for 1"),
        ({"batches": [2, 2, 4]}, "the engine is built for 2, 4 images in one call, not for 1"),
    ],
)
def test_an_engine_that_takes_no_single_image_is_refused(takes, reason):
    engine = SimpleNamespace(
        device=torch.device("cuda"), in_channels=3, out_channels=3, describe=lambda: {"pixels": "float", **takes}
    )
    found = not_supported_reasons(engine, Stream(frames="cuda"))
    assert [text for text in found if "native" not in text] == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("make", "noise", "kind", "layout"),
    [
        (TorchEngine, "off", "graph", "nhwc"),
        (TorchEngine, "random", "call", "nhwc"),
        (partial(TritonEngine, impl="reference"), "off", "call", "nhwc"),
        (OfAnotherLibrary, "off", "call", "nchw"),
    ],
)
def test_what_the_runtime_is_told(make, noise, kind, layout):
    network = DeviceNetwork(make(build_generator(Generator(depth=5, ngf=4)), Modes(noise=noise)), 32, 64)
    assert network.layout == layout
    assert network.options == {"device": "cpu", "kind": kind, "graph": "off" if noise == "random" else "auto"}


def test_the_masks_that_a_graph_reads_stay(monkeypatch):
    for place in ("torch.cuda.device", "torch.cuda.stream", "fastpix2pix.streaming.device.capturing"):
        monkeypatch.setattr(place, lambda *given: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(synchronize=lambda: None, device="cpu"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda keep_graph: SimpleNamespace(raw_cuda_graph=lambda: 1))
    engine = TorchEngine(build_generator(Generator(depth=5, ngf=4)), Modes(noise="fixed"))
    network = DeviceNetwork(engine, 32, 64)
    network._known[1, 2] = torch.zeros(1, 3, 32, 64), torch.zeros(1, 3, 32, 64)
    network._graph(1, 2)
    read = [weakref.ref(mask) for mask in engine.fixed_masks()]
    for size in range(2, 2 + CACHED_MASKS):
        engine.translate(torch.zeros(1, 3, 32, 32 * size + 32))
    assert read and not {id(mask()) for mask in read} & {id(mask) for mask in engine.fixed_masks()}, "other sizes"
    assert all(mask() is not None for mask in read)


@pytest.mark.parametrize("stays", [True, False])
def test_nvdec_works_on_the_models_gpu_in_torchs_context(monkeypatch, stays):
    current: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: current.append(device))
    given = _accelerator(stays, "cuda:1")
    assert current == [torch.device("cuda:1")] * 2
    assert given.is_hw_owned == stays and given.device_id == 1
    assert given.options == {"primary_ctx": "0", "current_ctx": "1"}


EXTERNAL, UNKNOWN = (int.from_bytes(tag, "little") for tag in (b"EXT ", b"UNKN"))  # FFmpeg's, of a CUDA context


@pytest.mark.parametrize("code", (errno.EOPNOTSUPP, errno.EPERM, EXTERNAL, UNKNOWN))
def test_a_decoder_that_cannot_use_the_gpu(monkeypatch, code):
    def without(file, hwaccel=None, **_):
        if hwaccel is not None:
            av.error.err_check(-code)
        return "a container"

    monkeypatch.setattr(av, "open", without)
    assert open_input("in.mp4", "video", Stream(), True, lambda: False) == ("a container", False)
    with pytest.raises(
        EnvironmentFailed,
        match=r"hwaccel = cuda: NVDEC could not be started \((Operation not|Generic|Unknown) .*\); use hwaccel = auto",
    ):
        open_input("in.mp4", "video", Stream(hwaccel="cuda"), True, lambda: False)


def test_a_pipe_loses_nothing_where_nvdec_does_not_start(monkeypatch, tmp_path):
    """FFmpeg reads the head of a stream before it starts a decoder."""
    path = make_video(tmp_path / "in.mkv", frames=20, size=(48, 64))
    real, read = av.open, []

    def without(file, hwaccel=None, **given):
        if hwaccel is not None:
            read.append(file.read(5000))
            av.error.err_check(-errno.EPERM)
        return real(file, **given)

    monkeypatch.setattr(av, "open", without)
    with path.open("rb") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        container, hardware = open_input("-", "pipe", Stream(), True, lambda: False)
        assert read and not hardware
        assert len(list(container.decode(video=0))) == 20


def test_a_pipe_keeps_nothing_once_nvdec_has_started(monkeypatch):
    pipes = []

    def opened(file, **given):
        file.read(10)
        pipes.append(file)

    monkeypatch.setattr(av, "open", opened)
    with Path("/dev/zero").open("rb") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        open_input("-", "pipe", Stream(), True, lambda: False)
        assert pipes[0].read(5) == bytes(5) and not pipes[0]._kept


@pytest.mark.parametrize(
    ("size", "inside", "matrix", "match"),
    [
        ((63, 48), "nv12", 1, "frames of 63x48: only even sizes can stay on the GPU; use hwaccel = none"),
        ((64, 47), "nv12", 1, "frames of 64x47: only even sizes can stay on the GPU; use hwaccel = none"),
        ((64, 48), "p010le", 1, "frames of p010le, .* cannot stay on the GPU; use hwaccel = none"),
        *(
            ((64, 48), "nv12", other, rf"frames of colour matrix {other} \(.*\): only .* BT.709 .*; use hwaccel = none")
            for other in (4, 7, 9, 10)
        ),
        *(((64, 48), "nv12", known, None) for known in (1, 2, 5, 6)),
    ],
)
def test_which_frames_can_stay_on_the_gpu(size, inside, matrix, match):
    width, height = size
    frame = SimpleNamespace(
        format=SimpleNamespace(name="cuda"), sw_format=SimpleNamespace(name=inside), rotation=0, width=width,
        height=height, colorspace=matrix,
    )  # fmt: skip
    if match is None:
        assert pixels_of(frame) == "nv12"
        return
    with pytest.raises(InputError, match=match):
        pixels_of(frame)


def test_a_codec_that_no_gpu_decodes_is_refused_or_said(tmp_path, capsys):
    path = str(make_video(tmp_path / "in.nut", frames=2, codec="rawvideo", pixels="rgb24"))
    source = source_of(path, Stream(hwaccel="cuda"))
    with pytest.raises(
        EnvironmentFailed, match=r"hwaccel = cuda: PyAV decodes this with rawvideo.*; use hwaccel = auto"
    ):
        source.open(lambda: False)
    source.close()
    source = source_of(path, Stream(), "cuda")
    source.open(lambda: False)
    source.close()
    assert "decoding on the CPU: PyAV decodes this with rawvideo, which NVDEC does not do" in capsys.readouterr().err


class Promising(FFmpegSource):
    """Says that NVDEC decodes, as PyAV does before the first packet; the decoder then takes the CPU."""

    def _connect(self):
        self._hwaccel = False
        super()._connect()
        self._hwaccel = True


def test_a_decoder_that_takes_the_cpu_at_the_first_packet_is_refused_or_said(tmp_path, capsys):
    path = str(make_video(tmp_path / "in.mp4", frames=3, pixels="yuv444p"))
    source = Promising(path, Stream(hwaccel="cuda"))
    with pytest.raises(
        EnvironmentFailed,
        match=r"hwaccel = cuda: NVDEC does not take these pictures \(h264, yuv444p, 64x48\), .*; use hwaccel = auto or",
    ):
        source.open(lambda: False)
    source.close()
    source = Promising(path, Stream(), "cuda")
    source.open(lambda: False)
    assert sum(isinstance(item, Picture) for item in source) == 3
    source.close()
    assert capsys.readouterr().err.count("decoding on the CPU: NVDEC does not take these pictures") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", ["yuv420p", "rgb24"])
def test_the_same_pictures_as_from_the_runtime_of_the_cpu(model, tmp_path, pixels):
    source = make_video(tmp_path / "in.nut", frames=6, codec="rawvideo", pixels=pixels)
    g = load(model, device="cuda", precision="fp32")
    for where in ("cpu", "cuda"):
        options = Stream(frames=where)
        translate(g, routes([str(source)], str(tmp_path / where), Infer(suffix="png"), options), options)
    for number in range(6):
        a, b = (np.asarray(Image.open(tmp_path / where / "in" / f"{number:06}.png")) for where in ("cpu", "cuda"))
        assert abs(a.astype(int) - b).max() <= 2
    assert torch.cuda.is_available()


@pytest.mark.gpu
def test_frames_of_nvdec_stay_on_the_gpu(model, tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=6, size=(144, 192))
    decoded = source_of(str(source), Stream(frames="cuda", hwaccel="cuda"), "cuda")
    decoded.open(lambda: False)
    assert on_gpu(next(item.frame for item in decoded if isinstance(item, Picture)))
    decoded.close()
    g = load(model, device="cuda", precision="fp32")
    for name, options in (("host", Stream(hwaccel="none")), ("device", Stream(frames="cuda", hwaccel="cuda"))):
        translate(g, routes([str(source)], str(tmp_path / name), Infer(suffix="png"), options), options)
    for number in range(6):
        a, b = (np.asarray(Image.open(tmp_path / n / "in" / f"{number:06}.png")) for n in ("host", "device"))
        assert abs(a.astype(int) - b).max() <= 2

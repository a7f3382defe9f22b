"""Frames that stay on the GPU."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix.config import Infer, Stream
from fastpix2pix.errors import InputError
from fastpix2pix.runtime.load import load
from fastpix2pix.streaming.plan import plan
from fastpix2pix.streaming.stream import translate
from tests.streaming.clips import make_video


def test_what_cannot_be_is_refused_with_all_reasons(model, tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=2)
    options = Stream(frames="cuda", steady=0.5)
    with pytest.raises(InputError, match=r"frames = cuda: .*the model runs on cpu; steady .*use frames = auto or cpu"):
        translate(load(model, device="cpu"), plan([str(source)], "null:", Infer(), options), options)


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", ["yuv420p", "rgb24"])
def test_the_same_pictures_as_from_the_runtime_of_the_cpu(model, tmp_path, pixels):
    source = make_video(tmp_path / "in.nut", frames=6, codec="rawvideo", pixels=pixels)
    g = load(model, device="cuda", precision="fp32")
    for where in ("cpu", "cuda"):
        options = Stream(frames=where)
        translate(g, plan([str(source)], str(tmp_path / where), Infer(suffix="png"), options), options)
    for number in range(6):
        a, b = (np.asarray(Image.open(tmp_path / where / "in" / f"{number:06}.png")) for where in ("cpu", "cuda"))
        assert abs(a.astype(int) - b).max() <= 2
    assert torch.cuda.is_available()


@pytest.mark.gpu
def test_frames_of_nvdec_stay_on_the_gpu(model, tmp_path):
    source = make_video(tmp_path / "in.mp4", frames=6, size=(144, 192))
    g = load(model, device="cuda", precision="fp32")
    for name, options in (("host", Stream(hwaccel="none")), ("device", Stream(frames="cuda", hwaccel="cuda"))):
        translate(g, plan([str(source)], str(tmp_path / name), Infer(suffix="png"), options), options)
    for number in range(6):
        a, b = (np.asarray(Image.open(tmp_path / n / "in" / f"{number:06}.png")) for n in ("host", "device"))
        assert abs(a.astype(int) - b).max() <= 2

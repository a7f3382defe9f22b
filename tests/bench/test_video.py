"""What `python -m bench.video` measures, with the identity for an engine."""

import pytest
import torch

from fastpix2pix.bench import video
from fastpix2pix.runtime.translator import Translator
from tests.streaming.clips import Identity, make_video


class OnAnotherDevice(Identity):
    device = torch.device("meta")

    def translate(self, batch, first=0):
        assert batch.device == self.device
        return torch.zeros(batch.shape)


@pytest.mark.parametrize("engine", [Identity, OnAnotherDevice])
def test_engine_alone_and_infer_are_measured(monkeypatch, tmp_path, capsys, engine):
    monkeypatch.setattr(video, "load", lambda model: Translator(engine()))
    video.main("g.safetensors", str(make_video(tmp_path / "in.mp4", frames=3)), rounds=2, frames=2)
    assert "wall time: engine alone" in capsys.readouterr().out


def test_the_clock_is_read_when_the_gpu_is_done(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    video._since(video._now(torch.device("cpu")), torch.device("cpu"))
    assert waited == []
    cuda = torch.device("cuda")
    assert min(video._since(video._now(cuda), cuda)) >= 0
    assert waited == [cuda] * 2

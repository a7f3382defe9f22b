"""Fixtures of the video tests; what makes and reads videos is in clips.py."""

from pathlib import Path

import pytest
import torch

from fastpix2pix.config import Generator
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime.translator import Translator
from tests.streaming.clips import Identity


@pytest.fixture
def identity() -> Translator:
    return Translator(Identity())


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "g.safetensors"
    save_network(path, build_generator(Generator(depth=5, ngf=4)), size=32)
    return path


@pytest.fixture(scope="session")
def clips() -> Path:
    """Real clips beside the repository; skips without them."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "video"
    if not folder.is_dir():
        pytest.skip(f"no real clips at {folder}")
    return folder

"""Tiles: blended to the whole, and images translated in them."""

import numpy as np
import pytest
import torch

from fastpix2pix.config import Fitted, Generator, Infer, Modes
from fastpix2pix.data.images import read_image, write_image
from fastpix2pix.errors import InputError
from fastpix2pix.model import build_generator
from fastpix2pix.runtime.engine import TorchEngine
from fastpix2pix.runtime.tiles import Tiles
from fastpix2pix.runtime.translate import translate_files
from fastpix2pix.runtime.translator import Translator

RUNNING = Modes(norm_stats="running")


def test_tiles_blend_to_the_whole_and_cover_it():
    picture = torch.randn(2, 3, 160, 224)
    calls = []

    def translate(tile: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(tile.shape[-2:]))
        return 2 * tile

    assert torch.allclose(Tiles(translate, 64)(picture), 2 * picture, atol=1e-5)
    assert set(calls) == {(64, 64)}
    assert len(calls) == 3 * 5  # neighbours overlap by a quarter or more
    calls.clear()
    assert torch.allclose(Tiles(translate, 256)(picture), 2 * picture, atol=1e-5)
    assert calls == [(160, 224)]


def test_a_seam_between_tiles_is_a_ramp():
    """Tiles that disagree by 1 are blended without a step."""
    numbers = iter(range(2))
    blended = Tiles(lambda tile: torch.full_like(tile[:, :1], next(numbers)), 64)(torch.zeros(1, 3, 64, 112))[0, 0, 32]
    assert float(blended[0]) == 0 and float(blended[-1]) == 1
    assert float(blended.diff().abs().max()) < 0.1


def translator(modes: Modes) -> Translator:
    """A network that sees 62 pixels at most: tiles agree with the whole inside."""
    torch.manual_seed(0)
    return Translator(TorchEngine(build_generator(Generator(depth=5, ngf=4)), modes))


def test_an_image_in_tiles_is_nearly_the_whole(tmp_path):
    """Without statistics of its own a tile differs from the whole only near its edge, where it weighs least."""
    rows, columns = np.mgrid[:480, :640]
    picture = np.stack([rows // 2, columns // 3, (rows + columns) // 5], axis=-1).astype(np.uint8)
    write_image(tmp_path / "x.png", picture)
    g = translator(RUNNING)
    for name, fitted in (("whole", Fitted()), ("tiles", Fitted("tile", tile=256))):
        translate_files(g, [tmp_path / "x.png"], tmp_path / f"{name}.png", Infer(), fitted=fitted)
    whole, tiles = (read_image(tmp_path / f"{name}.png").astype(int) for name in ("whole", "tiles"))
    assert whole.shape == tiles.shape == picture.shape
    assert np.abs(whole - tiles).mean() < 1 and np.abs(whole - tiles).max() > 0


def test_what_tiles_cannot_do_is_refused(tmp_path):
    write_image(tmp_path / "x.png", np.zeros((64, 64, 3), np.uint8))
    for modes, side, message in ((Modes(), 256, "other image statistics"), (RUNNING, 100, "multiples of 32")):
        with pytest.raises(InputError, match=message):
            fitted = Fitted("tile", tile=side)
            translate_files(translator(modes), [tmp_path / "x.png"], tmp_path / "y.png", Infer(), fitted=fitted)
    assert not (tmp_path / "y.png").exists()

"""The demo, cut to seconds: every part runs for real and leaves what it promises."""

import av
import numpy as np
import pytest

from fastpix2pix import demo
from fastpix2pix.data.images import read_image
from fastpix2pix.errors import InputError


def test_demo_leaves_pictures_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.OPTIONS, "ngf", 4)
    monkeypatch.setitem(demo.OPTIONS, "ndf", 4)
    monkeypatch.setitem(demo.OPTIONS, "max_steps", 40)
    assert demo.demo(tmp_path / "demo", minutes=5, device="cpu") == 0
    out, err = capsys.readouterr()
    assert out == ""
    found = {p.name for p in (tmp_path / "demo").iterdir()}
    assert found == {"facades", "run", "pictures", "samples.png", "curves.png", "street.mp4"}
    with av.open(str(tmp_path / "demo" / "street.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 75 and frames[0].shape == (128, 256, 3)
    # the walk goes on by 4 pixels a frame: frame 16 starts where frame 0 had its column 64
    moved = np.abs(frames[16][:, 32:160].astype(int) - frames[0][:, 96:224]).mean()
    assert moved < np.abs(frames[16].astype(int) - frames[0]).mean()
    assert len(list((tmp_path / "demo" / "pictures").iterdir())) == 24
    sheet = read_image(tmp_path / "demo" / "samples.png")
    assert sheet.shape == (6 * 132 - 4, 6 * 132 - 4, 3)
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000
    for line in ("match@1", "fastpix2pix train", "fastpix2pix infer", "fastpix2pix data check"):
        assert line in err


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan")])
def test_a_demo_needs_its_minutes(tmp_path, minutes):
    with pytest.raises(InputError, match=f"minutes = {minutes}: must be positive"):
        demo.demo(tmp_path / "demo", minutes=minutes, device="cpu")
    assert not (tmp_path / "demo").exists()

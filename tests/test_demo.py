"""The demo, cut to seconds: every part runs for real and leaves what it promises."""

import numpy as np

from fastpix2pix import demo
from fastpix2pix.data.images import read_image


def test_demo_leaves_pictures_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.OPTIONS, "ngf", 4)
    monkeypatch.setitem(demo.OPTIONS, "ndf", 4)
    assert demo.demo(tmp_path / "demo", minutes=0.02, device="cpu") == 0
    out, err = capsys.readouterr()
    assert out == ""
    found = {p.name for p in (tmp_path / "demo").iterdir()}
    assert found == {"facades", "run", "pictures", "samples.png", "curves.png"}
    assert len(list((tmp_path / "demo" / "pictures").iterdir())) == 24
    sheet = read_image(tmp_path / "demo" / "samples.png")
    assert sheet.shape == (6 * 132 - 4, 6 * 132 - 4, 3)
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000
    for line in ("match@1", "fastpix2pix train", "fastpix2pix infer", "fastpix2pix data check"):
        assert line in err

"""metrics.jsonl, grids, curves and the page."""

import json

import numpy as np
import pytest
from PIL import Image

from fastpix2pix.training import report


def record(step: int) -> dict:
    return {"epoch": 0, "lr": 2e-4, "loss": {"d_fake": 0.7, "d_real": 0.6, "g_gan": 0.7, "g_l1": 1 / step}}


def test_metrics_resume_drops_what_lies_beyond_and_a_cut_line(tmp_path):
    metrics = report.Metrics(tmp_path, 0, tensorboard=False)
    for step in (10, 20, 30):
        metrics.write(step, record(step))
    metrics.close()
    with metrics.path.open("a") as file:
        file.write('{"step": 31, "lo')
    again = report.Metrics(tmp_path, 20, tensorboard=False)
    again.write(25, record(25))
    again.close()
    assert [r["step"] for r in report.read_metrics(metrics.path)] == [10, 20, 25]
    assert all(json.loads(line) for line in metrics.path.read_text().splitlines())


def test_tensorboard_shows_no_step_twice_after_a_resume_from_the_beginning(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((10, 20, 30), (10, 20)):  # killed before the first checkpoint, begun again
        metrics = report.Metrics(tmp_path, 0, tensorboard=True)
        for step in steps:
            metrics.write(step, record(step))
        metrics.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/g_l1")] == [10, 20]
    assert [r["step"] for r in report.read_metrics(metrics.path)] == [10, 20]


def test_tensorboard_gets_every_number_and_the_picture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = report.Metrics(tmp_path, 0, tensorboard=True)
    metrics.write(10, record(10) | {"validation": {"image+off": {"l1": 0.25}}})
    metrics.picture(10, np.zeros((4, 4, 3), np.uint8))
    metrics.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"epoch", "lr", "loss/g_l1", "validation/image+off/l1"} <= set(events.Tags()["scalars"])
    assert events.Scalars("validation/image+off/l1")[0].value == 0.25
    assert events.Tags()["images"] == ["samples"]


def test_grid_puts_pictures_in_rows_with_white_gaps():
    black, grey = np.zeros((2, 3, 3), np.uint8), np.full((2, 3, 1), 128, np.uint8)
    sheet = report.grid([[black, grey], [grey, black]])
    assert sheet.shape == (2 * 2 + 4, 2 * 3 + 4, 3)
    assert (sheet[0, :3] == 0).all()
    assert (sheet[0, 3:7] == 255).all()
    assert (sheet[0, 7:] == 128).all()
    assert (sheet[2:6] == 255).all()


@pytest.mark.parametrize("validated", [False, True])
def test_curves_are_a_picture_of_what_there_is(tmp_path, validated):
    records = [{"step": s} | record(s) for s in range(1, 50)]
    if validated:
        records += [{"step": s, "validation": {"image+off": {"l1": 1 / s}}} for s in (20, 40)]
    path = report.save_curves(tmp_path, records)
    with Image.open(path) as picture:
        assert min(picture.size) > 300
        colours = len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))
    assert colours > 50  # not an empty sheet


def test_no_curves_before_the_first_metrics(tmp_path):
    assert report.save_curves(tmp_path, []) is None
    assert list(tmp_path.iterdir()) == []


def test_page_escapes_names_and_shows_the_newest_samples_first(tmp_path):
    run = tmp_path / "a<b>&"
    for step in (100, 2000):
        report.save_samples(run, step, np.zeros((4, 4, 3), np.uint8))
    table = {"image+off": {"l1": 0.1, "psnr": 12.0}}
    report.save_page(run, {"data": "<i>", "generator": {"ngf": 64}}, [{"step": 7, "validation": table}])
    page = (run / "index.html").read_text()
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.index("00002000.png") < page.index("00000100.png")
    assert "12.0000" in page
    assert "ngf" in page

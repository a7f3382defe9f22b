"""Rates of the frame runtime, as far as a CPU can show them, and the rows of GPU tests."""

import numpy as np
import pytest
import torch

from bench import frame_rates, gpu_tests
from bench.devices import setting
from bench.report import Mismatch, Report, Skipped

AT = setting(torch.device("cpu"), True)


def test_frames_without_an_engine():
    found = frame_rates.rate(AT, (48, 64), None, count=2, frames=5)
    assert found["frames_per_s"] > 0
    assert found["frames"]["collected"] == 201  # at least 200, and the one that was compared
    assert found["graph"] == "none"


def test_a_wrong_frame_is_named():
    class Wrong:
        def submit(self, frame, tag):
            self.frame = frame

        def collect(self, back):
            back[:] = self.frame
            back[0, 0, 0] ^= 4

    source = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(Mismatch, match="off by 4 levels"):
        frame_rates._compare(None, Wrong(), source, np.empty_like(source), (8, 8))


def test_without_a_gpu_both_parts_say_so(tmp_path):
    report = Report(tmp_path / "r.json", {"commit": "x"}, 60, {"tests": 1, "frames": 1})
    gpu_tests.run(report, AT)
    frame_rates.run(report, AT)
    assert {row["status"] for row in report.rows} == {"skipped"}
    assert any("tests/native/test_cuda_runtime.py" in row["row"] for row in report.rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="how it fails without a GPU")
def test_a_failing_file_is_a_mismatch(tmp_path):
    """Asked to require a GPU where there is none, the suite refuses: that is no pass."""
    at = AT._replace(device=torch.device("cuda"))
    report = Report(tmp_path / "r.json", {"commit": "x"}, 60, {"tests": 1})
    with pytest.raises((Mismatch, Skipped), match="no CUDA GPU"):
        gpu_tests._passed(gpu_tests.files()[0], at, report)

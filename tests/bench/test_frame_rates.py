"""Rates of the frame runtime, as far as a CPU can show them, and the rows of GPU tests."""

import numpy as np
import pytest
import torch

from bench import frame_rates, gpu_tests
from bench.devices import setting
from bench.report import Mismatch, Report, Skipped
from fastpix2pix.runtime.engine import TorchEngine
from fastpix2pix.runtime.native import FrameRuntime, InputSpec, OutputSpec
from fastpix2pix.streaming.network import Network
from fastpix2pix.streaming.together import Together

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
        frame_rates._compare(Wrong(), source, np.empty_like(source), source, 2)


def test_what_frames_are_compared_with_is_what_the_runtime_makes_of_them():
    size, multiple = (40, 56), 32
    network = -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple
    engine = frame_rates._engine(AT, frame_rates._network(AT), TorchEngine, "fp32")
    assert engine.multiple == multiple
    source = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    wanted = frame_rates._translated(engine, source, network)
    assert wanted.std() > 5, "not gray"
    together = Together(engine.translate, 1)
    runtime = FrameRuntime(
        InputSpec("rgb", size, network, layout="nhwc", place=(0, 0, *size)),
        OutputSpec("rgb", size, network, layout="nhwc", region=(0, 0, *size)),
        Network(together, engine),
    )
    assert frame_rates._compare(runtime, source, np.empty_like(source), wanted, 1) <= 1
    together.close()


def test_where_a_test_hangs_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "LEAST", 12.0)
    file = tmp_path / "test_it.py"
    file.write_text("import pytest, time\n@pytest.mark.gpu\ndef test_it():\n    time.sleep(60)\n")
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    report = Report(tmp_path / "r.json", {"commit": "x"}, 0, {"tests": 1})
    with pytest.raises(Skipped, match=r'not through after 12 s; File ".*test_it.py", line 4 in test_it'):
        gpu_tests._passed(file, AT._replace(device=torch.device("cuda")), report)


def test_without_a_gpu_both_parts_say_so(tmp_path):
    report = Report(tmp_path / "r.json", {"commit": "x"}, 60, {"tests": 1, "frames": 1})
    gpu_tests.run(report, AT)
    frame_rates.run(report, AT)
    assert {row["status"] for row in report.rows} == {"skipped"}
    rows = [row["row"] for row in report.rows]
    assert "tests/native/test_cuda_runtime.py" in rows
    assert "tests/bench/test_frame_rates.py" not in rows  # the mark stands in a string there


@pytest.mark.skipif(torch.cuda.is_available(), reason="how it fails without a GPU")
def test_a_failing_file_is_a_mismatch(tmp_path):
    """Asked to require a GPU where there is none, the suite refuses: that is no pass."""
    at = AT._replace(device=torch.device("cuda"))
    report = Report(tmp_path / "r.json", {"commit": "x"}, 60, {"tests": 1})
    with pytest.raises((Mismatch, Skipped), match="no CUDA GPU"):
        gpu_tests._passed(gpu_tests.files()[0], at, report)


def test_without_pytest_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None)
    report = Report(tmp_path / "r.json", {"commit": "x"}, 60, {"tests": 1})
    with pytest.raises(Skipped, match="No module named 'pytest'"):
        gpu_tests._passed(gpu_tests.files()[0], AT._replace(device=torch.device("cuda")), report)

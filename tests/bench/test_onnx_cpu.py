"""The comparison on a CPU with a network of a few channels: what it refuses and what it prints, not how fast it is."""

import pytest
import torch

from bench.onnx_cpu import ENGINE, LEAST, check, main
from bench.report import Mismatch


def test_times_of_all_and_a_verdict(capsys):
    code = main(["--depth", "5", "--ngf", "4", "--size", "32", "--rounds", "3"])
    text = capsys.readouterr().out
    for statistics, least in LEAST.items():
        rows = [line for line in text.splitlines() if line.startswith(statistics)]
        assert len(rows) == 4, "three ways, and what comes of them"
        assert sum(" ms " in line for line in rows) == 3
        assert f"at least {least}" in rows[-1]
    assert code == (4 if "NO" in text else 0)
    assert "onnxruntime 1." in text


def test_other_pictures_are_refused():
    x = torch.zeros(1, 3, 8, 8)
    close, far = (
        {"eager": lambda x: x, ENGINE: lambda x: x + 1 / 127.5},
        {"eager": lambda x: x, ENGINE: lambda x: x + 0.1},
    )
    check(close, x)
    with pytest.raises(Mismatch, match=r"ONNX Runtime is off from eager by 1\d of 255, allowed 1"):
        check(far, x)

"""bench.pixels compares before it times, and times everything it lists."""

import re

import pytest

from bench.pixels import cases, check, main
from bench.report import Mismatch

SIZE = (64, 96)


@pytest.mark.parametrize("threads", (1, 2))
def test_all_competitors_compute_the_same(threads: int) -> None:
    for case in cases(SIZE, threads):
        check(case)


def test_a_wrong_competitor_is_not_timed() -> None:
    case = next(cases(SIZE, 1))
    with pytest.raises(Mismatch, match="rgb -> nchw float32, numpy: differs by 1 from the specification"):
        check(case._replace(numpy=lambda: None))


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--threads", "1", "--size", "64x96", "--rounds", "2", "--frames", "50"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r" ms +\d+\.\d\d \(", out)) == 11
    assert len(re.findall(r"runtime, 256x256, no engine, .*: \d+ frames/s, p99", out)) >= 2

"""The suite's tests that need a GPU, a row for each file."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from .devices import ROOT, Setting
from .report import Mismatch, Report, Skipped, Values

PART = "tests"
_MARK, _NO_TESTS = "pytest.mark.gpu", 5  # pytest's exit code where none was chosen


def files() -> list[Path]:
    """Every test file with such tests, relative to the root."""
    found = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if _MARK in path.read_text(encoding="utf-8"))
    return [path.relative_to(ROOT) for path in found]


def run(report: Report, at: Setting) -> None:
    """One process after the other."""
    for path in files():
        report.run(PART, str(path), partial(_passed, path, at, report))


def _passed(path: Path, at: Setting, report: Report) -> Values:
    if at.device.type != "cuda":
        raise Skipped("needs a CUDA GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(path)]
    environment = {**os.environ, "FASTPIX2PIX_REQUIRE_GPU": "1", "PYTHONPATH": str(ROOT)}
    limit = max(20.0, report.left(PART))
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise Skipped(f"not through after {limit:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode == _NO_TESTS or "No module named" in done.stdout + done.stderr:
        raise Skipped(next((line for line in lines[::-1] if "No module named" in line), "no test could be collected"))
    if done.returncode:
        wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise Mismatch("; ".join(wrong or lines[-3:])[:2000], {"output": "\n".join(lines[-60:])})
    return {"result": lines[-1] if lines else ""}

"""The suite's tests that need a GPU, a row for each file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from .devices import ROOT, Setting
from .report import LONGEST, Mismatch, Report, Skipped, Values

PART = "tests"
_MARK = re.compile(r"^ *(?:@|\w+ = )pytest\.mark\.gpu\b", re.MULTILINE)  # not in a string
LEAST = 20.0  # seconds for a file
_NOT_RUN = (2, 4, 5)  # pytest's exit codes where a file or its conftest.py cannot be imported, and for no tests


def files() -> list[Path]:
    """Every test file with such tests, relative to the root."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT) for path in tests if _MARK.search(path.read_text(encoding="utf-8"))]


def run(report: Report, at: Setting) -> None:
    """One process after the other."""
    for path in files():
        report.run(PART, str(path), partial(_passed, path, at, report), longest=max(0.0, report.left(PART)) + LONGEST)


def _passed(path: Path, at: Setting, report: Report) -> Values:
    if at.device.type != "cuda":
        raise Skipped("needs a CUDA GPU")
    if find_spec("pytest") is None:
        raise Skipped("No module named 'pytest'")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(path)]
    environment = {**os.environ, "FASTPIX2PIX_REQUIRE_GPU": "1", "PYTHONPATH": str(ROOT)}
    limit = max(LEAST, report.left(PART))
    command += ["-o", f"faulthandler_timeout={0.6 * limit:.0f}"]  # says where a test stands then
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"not through after {limit:.0f} s; {_stands(error.stderr)}") from None
    lines = [*done.stderr.splitlines(), *done.stdout.splitlines()]  # the last one counts the tests
    missing = [line for line in lines if "No module named" in line]
    if done.returncode == 5 or (done.returncode in _NOT_RUN and missing):
        raise Skipped(missing[-1] if missing else "no test could be collected")
    if done.returncode:
        wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise Mismatch("; ".join(wrong or lines[-3:])[:2000], {"output": "\n".join(lines[-60:])})
    return {"result": lines[-1] if lines else ""}


def _stands(told: bytes | str | None) -> str:
    """Where the threads of the tests stood, innermost first, as faulthandler printed it."""
    text = told.decode(errors="replace") if isinstance(told, bytes) else told or ""  # bytes whatever was asked for
    lines = [line.strip() for line in text.splitlines()]
    return "; ".join(line for line in lines if line.startswith('File "') and str(ROOT) in line)[:600] or "no trace"

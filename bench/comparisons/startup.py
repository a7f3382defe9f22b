"""How long a command takes before it does anything: processes from start to end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fastpix2pix

from ..comparison import Comparison
from ..devices import Setting
from ..report import Mismatch
from ..timing import Run

BARE = "bare interpreter"


def comparisons(at: Setting) -> Iterator[Comparison]:
    """Against what is not ours in it: the interpreter."""
    bare = _process("pass")
    yield Comparison("startup", "fastpix2pix --help", {"ours": _help, BARE: bare}, "ours", BARE)
    yield Comparison(
        "startup", "import fastpix2pix", {"ours": _process("import fastpix2pix"), BARE: bare}, "ours", BARE
    )


def _environment() -> dict[str, str]:
    """In which this very package is found."""
    return os.environ | {"PYTHONPATH": str(Path(fastpix2pix.__file__).parents[1])}


def _process(code: str) -> Callable[[], Run]:
    def make() -> Run:
        def run() -> None:
            subprocess.run([sys.executable, "-c", code], check=True, env=_environment())

        return run

    return make


def _help() -> Run:
    """What the installed command runs; torch must not be among what it imports."""
    code = "from fastpix2pix.cli import main; main(['--help'])"
    told = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    found = subprocess.run(
        [sys.executable, "-c", f"{told}; {code}"], capture_output=True, text=True, env=_environment()
    )
    if found.returncode or "usage: fastpix2pix" not in found.stdout or found.stderr.split()[-1:] != ["False"]:
        raise Mismatch(f"--help ended with {found.returncode}, or imported torch: {found.stderr[-300:]}")

    def run() -> None:
        subprocess.run([sys.executable, "-c", code], check=True, env=_environment(), stdout=subprocess.DEVNULL)

    return run

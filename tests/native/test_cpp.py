"""The programs of tests/cpp, as they are and under sanitizers (`make cpp-test`, `make sanitize`).

The sanitizers take a minute or two and run when FASTPIX2PIX_SANITIZE=1. All are built in build/cpp-*, where a second
run compiles only what has changed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
KINDS = {
    "plain": ["-DCMAKE_BUILD_TYPE=Release"],
    # half as long to compile, and the line numbers of a report are right
    "thread": ["-DFASTPIX2PIX_SANITIZE=thread", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"],
    "address": ["-DFASTPIX2PIX_SANITIZE=address", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"],
}


def run(program: str, *arguments: str) -> str:
    found = shutil.which(program, path=PROGRAMS)
    if found is None:
        pytest.skip(f"{program} is missing; pip install cmake ninja")
    environment = {**os.environ, "PATH": PROGRAMS, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run([found, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{program} {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_cpp(kind: str) -> None:
    if kind != "plain" and os.environ.get("FASTPIX2PIX_SANITIZE") != "1":
        pytest.skip("make sanitize runs it")
    if shutil.which((os.environ.get("CXX") or "c++").split()[0]) is None:
        pytest.skip("there is no C++ compiler")
    folder = f"build/cpp-{kind}"
    run("cmake", "-S", ".", "-B", folder, "-G", "Ninja", "-DFASTPIX2PIX_TESTS=ON", *KINDS[kind])
    run("cmake", "--build", folder)
    print(run("ctest", "--test-dir", folder, "--output-on-failure", "--verbose"))

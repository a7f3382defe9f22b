"""The programs of tests/cpp, as they are and under sanitizers (`make cpp-test`, `make sanitize`); the CUDA half.

The sanitizers take a minute or two and run when FASTPIX2PIX_SANITIZE=1. All are built in build/cpp-*, where a second
run compiles only what has changed.
"""

import os
import re
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


def test_the_cuda_half_compiles() -> None:
    """Without a GPU that is what can be known: no warning, and no register spilled."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([PROGRAMS, "/usr/local/cuda/bin"]))
    if nvcc is None:
        pytest.skip("there is no nvcc")
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DCMAKE_CUDA_ARCHITECTURES=80-real", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"]
    run("cmake", "-S", ".", "-B", "build/cuda", "-G", "Ninja", "-DFASTPIX2PIX_CUDA=ON", *options)
    said = run("cmake", "--build", "build/cuda", "--clean-first", "--verbose")
    spilled = re.findall(r"(\d+) bytes spill stores", said)
    assert spilled and set(spilled) == {"0"}

"""setup.py's decisions about the extension: which compiler, which architectures, what it says. Nothing is compiled."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of the project's own setup.py, and under "given" what it passes to setuptools."""
    given: dict[str, Any] = {}
    names: dict[str, Any] = {"given": given}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", given.update)
    for name in ("FASTPIX2PIX_CUDA", "FASTPIX2PIX_CUDA_ARCHS", "FASTPIX2PIX_REQUIRE_NATIVE", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    exec(compile((ROOT / "setup.py").read_text(encoding="utf-8"), "setup.py", "exec"), names)
    return names


def program(folder: Path, name: str, prints: str = "") -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{prints}'\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An nvcc that only says its version, in CUDA_HOME/bin."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return program(tmp_path / "bin", "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")


def without_nvcc(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build["shutil"], "which", lambda name, path=None: None)


def test_off_asks_nobody(build: dict[str, Any], nvcc: str) -> None:
    assert build["cuda_compiler"]("off") is None


@pytest.mark.parametrize(("torch", "found"), [("13.0", True), ("13.2", True), ("12.8", False), (None, False)], ids=str)
def test_auto_takes_the_compiler_of_torchs_version(
    build: dict[str, Any],
    nvcc: str,
    torch: str | None,
    found: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build["cuda_compiler"].__globals__["cuda_of_torch"] = lambda: torch
    assert build["cuda_compiler"]("auto") == (nvcc if found else None)
    said = capsys.readouterr().err
    if found:
        assert said == ""
    else:
        assert f"nvcc is of CUDA 13, the installed torch of {torch or 'none'}: building the frame runtime for" in said
        assert "FASTPIX2PIX_CUDA=on builds for CUDA all the same" in said
    assert build["cuda_compiler"]("on") == nvcc


def test_without_a_cuda_compiler(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_nvcc(build, monkeypatch)
    assert build["cuda_compiler"]("auto") is None
    assert "no nvcc: building the frame runtime for the CPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="FASTPIX2PIX_CUDA=on, but there is no nvcc in CUDA_HOME, PATH or"):
        build["cuda_compiler"]("on")


def test_other_words_are_refused(build: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="FASTPIX2PIX_CUDA=bogus: allowed are auto, on and off"):
        build["cuda_compiler"]("bogus")


@pytest.mark.parametrize("line", ("cuda: Optional[str] = '13.0'", 'cuda = "13.0"', "cuda = None", "nothing"))
def test_torchs_version_is_read_from_its_file(
    build: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"debug = False\n{line}\nhip = '6.1'\n", encoding="utf-8")
    monkeypatch.setattr(build["sysconfig"], "get_paths", lambda: {"platlib": str(tmp_path)})
    assert build["cuda_of_torch"]() == ("13.0" if "13.0" in line else None)


class Builder:
    """The command's environment: what setuptools would set."""

    def __init__(self, build: dict[str, Any], folder: Path) -> None:
        from setuptools.dist import Distribution

        self.extension = build["given"]["ext_modules"][0]
        self.command = build["CMakeBuild"](Distribution({"name": "x", "ext_modules": [self.extension]}))
        self.command.build_temp, self.command.build_lib = str(folder / "temp"), str(folder / "lib")


def test_a_missing_compiler_installs_without_the_extension_unless_it_was_asked_for(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    builder = Builder(build, tmp_path)
    builder.command.build_extension(builder.extension)
    assert (
        "installing without the native frame runtime: there is no C++ compiler (no-such-compiler); install g++ 12 or "
        "newer"
    ) in capsys.readouterr().err
    monkeypatch.setenv("FASTPIX2PIX_REQUIRE_NATIVE", "1")
    with pytest.raises(SystemExit, match="the native frame runtime could not be built: there is no C\\+\\+ compiler"):
        builder.command.build_extension(builder.extension)
    assert not (tmp_path / "lib").exists()


@pytest.mark.parametrize(
    ("archs", "targets"), [(None, "80-real;90-real;90-virtual"), ("86", "86-real;86-virtual"), ("80, 89;90", None)]
)
def test_what_cmake_is_told(
    build: dict[str, Any],
    archs: str | None,
    targets: str | None,
    nvcc: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=lambda: "/pybind11"))
    told: list[tuple[str, ...]] = []
    monkeypatch.setenv("FASTPIX2PIX_CUDA", "on")
    monkeypatch.setenv("CXX", "sh")  # there is one
    if archs:
        monkeypatch.setenv("FASTPIX2PIX_CUDA_ARCHS", archs)
    builder = Builder(build, tmp_path)
    module = Path(builder.command.get_ext_fullpath("fastpix2pix._native")).name

    def run(program: str, *arguments: str, cwd: Path) -> None:
        told.append((program, *arguments))
        (cwd / module).write_bytes(b"")

    build["CMakeBuild"].build_native.__globals__["run"] = run
    builder.command.build_extension(builder.extension)
    configure, compile_ = told
    assert f"-DCMAKE_CUDA_ARCHITECTURES={targets or '80-real;89-real;90-real;90-virtual'}" in configure
    assert "-DFASTPIX2PIX_WERROR=OFF" in configure
    assert f"-DCMAKE_CUDA_COMPILER={nvcc}" in configure and "-DFASTPIX2PIX_CUDA=ON" in configure
    assert f"-DPython_EXECUTABLE={sys.executable}" in configure
    assert compile_ == ("cmake", "--build", ".")


def test_the_extension_lists_all_of_its_files(build: dict[str, Any]) -> None:
    extension = build["given"]["ext_modules"][0]
    listed = {*extension.sources, *extension.depends}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()} <= listed
    assert "CMakeLists.txt" in listed
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for source in extension.sources:
        assert source in cmake


def test_the_wheel_has_the_types(build: dict[str, Any]) -> None:
    """PEP 561: without the marker type checkers ignore annotations and stubs."""
    assert (ROOT / "fastpix2pix" / "py.typed").is_file()
    assert {"py.typed", "*.pyi"} <= set(build["given"]["package_data"]["fastpix2pix"])


def test_clang_format() -> None:
    found = Path(sys.executable).parent / "clang-format"
    if not found.exists():
        pytest.skip("clang-format is missing; pip install clang-format")
    files = [str(path) for folder in ("csrc", "tests/cpp") for path in sorted((ROOT / folder).iterdir())]
    done = subprocess.run([str(found), "--dry-run", "-Werror", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

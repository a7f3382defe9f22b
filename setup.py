"""Packages of the wheel and the build of fastpix2pix._native; everything else about the project is in pyproject.toml.

FASTPIX2PIX_CUDA         auto (default): with CUDA if nvcc is of the CUDA major version that torch has; on: with CUDA or
                         an error; off: for the CPU only
FASTPIX2PIX_CUDA_ARCHS   compute capabilities, default "80;90" and PTX of the last for what comes after
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# kernels/ and bench/ lie at the top and are fastpix2pix.kernels and fastpix2pix.bench; links in fastpix2pix/ show them
# to tools that read the tree
OUTSIDE = {"fastpix2pix.kernels": "kernels", "fastpix2pix.bench": "bench"}
PACKAGES = find_packages(
    include=["fastpix2pix", "fastpix2pix.*"], exclude=[pattern for name in OUTSIDE for pattern in (name, f"{name}.*")]
)
CORE = sorted(str(path) for path in Path("csrc").glob("*.c*"))
HEADERS = ["CMakeLists.txt", *sorted(str(path) for path in Path("csrc").glob("*.hpp"))]


class CMakeBuild(build_ext):
    """Builds the extension with CMake and ninja. Where that cannot be done the package installs without it and says so,
    unless FASTPIX2PIX_CUDA=on or FASTPIX2PIX_REQUIRE_NATIVE=1 asked for it."""

    def build_extension(self, ext):
        asked = os.environ.get("FASTPIX2PIX_CUDA") == "on" or os.environ.get("FASTPIX2PIX_REQUIRE_NATIVE") == "1"
        try:
            self.build_native(ext)
        except (Missing, subprocess.CalledProcessError) as error:
            if asked:
                raise SystemExit(f"fastpix2pix: the native frame runtime could not be built: {error}") from None
            say(f"installing without the native frame runtime: {error}")

    def build_native(self, ext):
        nvcc = cuda_compiler(os.environ.get("FASTPIX2PIX_CUDA", "auto"))
        compiler = (os.environ.get("CXX") or "c++").split()[0]
        if shutil.which(compiler) is None:
            raise Missing(f"there is no C++ compiler ({compiler}); install g++ 12 or newer")
        try:
            import pybind11
        except ImportError:
            raise Missing("pybind11 is missing; pip install pybind11 cmake ninja") from None
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "FASTPIX2PIX_PYTHON": "ON",
            "FASTPIX2PIX_CUDA": "ON" if nvcc else "OFF",
            # a compiler that knows more warnings than ours must not keep anybody from installing
            "FASTPIX2PIX_WERROR": "ON" if os.environ.get("FASTPIX2PIX_REQUIRE_NATIVE") == "1" else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if nvcc:
            archs = re.split("[;, ]+", os.environ.get("FASTPIX2PIX_CUDA_ARCHS", "80;90"))
            targets = ";".join([*(f"{arch}-real" for arch in archs), f"{archs[-1]}-virtual"])
            options |= {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": targets}
        folder = Path(self.build_temp).absolute() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        # --fresh: what an earlier build found, pip's isolated environment above all, may be gone
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        run("cmake", "--fresh", "-G", "Ninja", str(Path.cwd()), *definitions, cwd=folder)
        run("cmake", "--build", ".", cwd=folder)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / target.name, target)


class Missing(Exception):
    """A program or package that the build needs; the message says what to do."""


def cuda_compiler(wanted):
    """The path of nvcc, or None to build for the CPU; says why. `wanted` is FASTPIX2PIX_CUDA."""
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"FASTPIX2PIX_CUDA={wanted}: allowed are auto, on and off")
    if wanted == "off":
        return None
    homes = [os.environ[name] + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if nvcc is None:
        if wanted == "on":
            raise SystemExit("FASTPIX2PIX_CUDA=on, but there is no nvcc in CUDA_HOME, PATH or /usr/local/cuda/bin")
        return say("no nvcc: building the frame runtime for the CPU")
    if wanted == "on":
        return nvcc
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found, torch = re.search(r"release (\d+)\.", text), cuda_of_torch()
    if found and torch and found[1] == torch.split(".")[0]:
        return nvcc
    return say(
        f"nvcc is of CUDA {found[1] if found else '?'}, the installed torch of {torch or 'none'}: building the frame "
        "runtime for the CPU (FASTPIX2PIX_CUDA=on builds for CUDA all the same)"
    )


def cuda_of_torch():
    """The CUDA version of the torch installed here, "13.0", or None; read, since isolated builds cannot import it."""
    version = Path(sysconfig.get_paths()["platlib"], "torch", "version.py")
    text = version.read_text(encoding="utf-8") if version.is_file() else ""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found and found[1]


def run(program, *arguments, cwd):
    # pip puts the programs of an isolated build on PATH; others lie beside the interpreter
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    found = shutil.which(program, path=path)
    if found is None or (program == "cmake" and shutil.which("ninja", path=path) is None):
        raise Missing("cmake or ninja is missing; pip install pybind11 cmake ninja")
    subprocess.run([found, *arguments], cwd=cwd, check=True, env={**os.environ, "PATH": path})


def say(text):
    print(f"fastpix2pix: {text}", file=sys.stderr)


setup(
    packages=[*PACKAGES, *OUTSIDE, "fastpix2pix.bench.comparisons"],
    package_dir=OUTSIDE,
    package_data={
        "fastpix2pix": ["py.typed", "*.pyi"],
        "fastpix2pix.streaming": ["*.html"],
        "fastpix2pix.bench": ["*.toml"],
    },
    ext_modules=[Extension("fastpix2pix._native", CORE, depends=HEADERS, optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)

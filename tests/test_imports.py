"""The package is cheap to import, and its parts import one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastpix2pix"
HEAVY = (
    *("torch", "numpy", "PIL", "av", "triton", "nvidia", "torchmetrics", "tensorboard", "matplotlib"),
    *("onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"),
)
# each may import those to its right, never to its left
LAYERS = [
    {"__main__"},
    {"cli"},
    {"option_check"},
    {"commands"},
    {"demo", "doctor", "bench"},
    {"training", "building"},
    {"streaming"},
    {"evaluation"},
    {"runtime"},
    {"data", "model"},
    {"console", "pages", "profiling"},
    {"tuning"},
    {"capture", "device", "files", "interrupt", "kernels", "openmp", "_native"},
    {"config"},
    {"errors", "other_names"},
]


def loaded_by(code: str) -> set[str]:
    code += "; import sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("code", ["import fastpix2pix", "import fastpix2pix.cli", "import fastpix2pix.config"])
def test_import_loads_nothing_heavy(code):
    assert not loaded_by(code) & set(HEAVY)


def test_help_loads_nothing_heavy():
    code = """
from contextlib import redirect_stdout, suppress
from io import StringIO
from fastpix2pix.cli import main
with suppress(SystemExit), redirect_stdout(StringIO()):
    main(["train", "--help"])
"""
    assert not loaded_by(f"exec({code!r})") & set(HEAVY)


def test_names_of_the_package_resolve():
    import fastpix2pix

    for name in fastpix2pix.__all__:
        assert getattr(fastpix2pix, name) is not None
    assert callable(fastpix2pix.train)
    assert callable(fastpix2pix.evaluate)
    with pytest.raises(AttributeError, match="it has"):
        _ = fastpix2pix.nothing


def test_names_survive_importing_the_modules_first():
    first = "import fastpix2pix.training.loop, fastpix2pix.evaluation, fastpix2pix as f"
    loaded_by(f"{first}; assert callable(f.train) and callable(f.evaluate) and callable(f.load)")


def modules() -> dict[Path, Path]:
    """{path inside the package: file}; kernels and bench stand beside it, and links lead to them."""
    found = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    for folder in (PACKAGE / "kernels", PACKAGE / "bench"):
        found |= {path.relative_to(PACKAGE): path for path in folder.rglob("*.py")}
    return found


def imports_of(name: Path, file: Path) -> set[str]:
    """Top-level parts of the package that a module imports."""
    depth = len(name.parts) - 1  # 0 for cli.py, 1 for data/pairs.py
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level == 0 and f"{module}.".startswith("fastpix2pix."):
            module = module.removeprefix("fastpix2pix").removeprefix(".")
        elif node.level != depth + 1:
            continue
        found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return found


def test_imports_run_one_way():
    rank = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    wrong = []
    seen = set()
    for name, file in sorted(modules().items()):
        part = name.parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in rank, f"{part} is in no layer"
        seen.add(part)
        for target in imports_of(name, file) - {part, "__version__"}:
            if rank[target] <= rank[part]:
                wrong.append(f"{name} imports {target}")
    assert wrong == []
    assert seen >= set(rank) - {"_native"}  # which is compiled


def test_every_module_is_in_the_wheel_once(monkeypatch):
    """What build_py would copy, from the project's own setup.py."""
    from setuptools.dist import Distribution

    root = PACKAGE.parent
    monkeypatch.chdir(root)
    given: dict = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    exec(compile((root / "setup.py").read_text(), "setup.py", "exec"), {})
    command = Distribution({**given, "script_name": "setup.py"}).get_command_obj("build_py")
    command.ensure_finalized()
    packed = [str(Path(path).resolve()) for _, _, path in command.find_all_modules()]
    names = [f"{package}.{module}" for package, module, _ in command.find_all_modules()]
    outside = [
        *(root / "kernels").glob("*.py"),
        *(root / "bench").glob("*.py"),
        *(root / "bench/comparisons").glob("*.py"),
    ]
    expected = sorted(str(p.resolve()) for p in [*PACKAGE.rglob("*.py"), *outside])
    assert sorted(packed) == sorted(set(expected))
    assert len(names) == len(set(names))
    assert {"fastpix2pix.kernels.adam", "fastpix2pix.bench.command"} <= set(names)

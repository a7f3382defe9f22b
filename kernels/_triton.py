"""Triton where it is installed. Without it the modules of this package still import, and their references run."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language.target_info import cuda_capability_geq

    version: tuple[int, ...] = tuple(map(int, triton.__version__.split(".")[:2]))
    jit: Any = triton.jit
    constexpr_function: Any = triton.constexpr_function
    # read once: `jit` asks at decoration, so this is what kernels are
    interpreted: bool = triton.knobs.runtime.interpret
except ImportError:
    triton = tl = cuda_capability_geq = None
    interpreted = False
    version = ()

    def jit(function: Any) -> Any:
        """Leaves a kernel as it is; dispatch never launches it."""
        return function

    constexpr_function = jit


__all__ = ["constexpr_function", "cuda_capability_geq", "interpreted", "jit", "tl", "triton", "version"]

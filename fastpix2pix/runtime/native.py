"""The extension fastpix2pix._native, or an error that says how to get it. Its types are in _native.pyi."""

from __future__ import annotations

from ..errors import EnvironmentFailed

try:
    from .._native import CUDA as CUDA
    from .._native import FrameRuntime as FrameRuntime
    from .._native import InputPlan as InputPlan
    from .._native import InputSpec as InputSpec
    from .._native import OutputPlan as OutputPlan
    from .._native import OutputSpec as OutputSpec
except ImportError as error:
    raise EnvironmentFailed(
        f"the native frame runtime is not installed ({error}); install g++ 12 or newer, then fastpix2pix again with "
        "FASTPIX2PIX_REQUIRE_NATIVE=1, which says what the build lacks"
    ) from None

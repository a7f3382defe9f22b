"""PyAV, or an error that says how to get it. Imported before anything that needs it."""

from __future__ import annotations

from ..errors import EnvironmentFailed

try:
    import av as av
except ImportError as error:
    raise EnvironmentFailed(f"video needs PyAV ({error}); pip install 'fastpix2pix[video]'") from None

"""The frame runtime around a model: on the CPU, or on the GPU that the model runs on."""

from __future__ import annotations

from collections import deque
from typing import Any

from ..config import Stream as Options
from ..runtime.engine import Engine
from ..runtime.fitting import Size
from ..runtime.native import FrameRuntime, InputSpec, OutputSpec
from .device import DeviceNetwork, on_gpu
from .geometry import Geometry
from .network import Network

_SLOTS, _DEPTH = 4, 1  # pictures inside the runtime, offline
_GPU_DEPTH = 3  # offline on a GPU: one going up, one in the network, one coming down
_LIVE_SLOTS = 2  # one in work, one waiting: a queue of 1


def frame_runtime(
    engine: Engine,
    network: Network,  # of the engine, where frames are the CPU's
    source: Size,
    geometry: Geometry,  # of the source
    pixels: tuple[str, str],  # of the frames in and out: rgb, bgr, rgba, nv12, yuv420
    colour: tuple[str, str],  # of their YUV: matrix and range
    options: Options,
) -> tuple[FrameRuntime, str]:
    """(the runtime, why every frame is started anew without a CUDA graph; "" where that is so anyway)."""
    call: Any = network
    given: dict[str, Any] = {}
    layout, depth = network.layout, _DEPTH
    if on_gpu(engine, options):
        on_device = DeviceNetwork(engine, *geometry.network)
        call, given, layout = on_device.engine, on_device.options, on_device.layout
        depth = _DEPTH if options.live else _GPU_DEPTH
    how: Any = {"matrix": colour[0], "range": colour[1], "layout": layout}
    runtime = FrameRuntime(
        InputSpec(pixels[0], source, geometry.network, crop=geometry.crop, place=geometry.place, **how),
        OutputSpec(pixels[1], geometry.output, geometry.network, region=geometry.region, **how),
        call,
        **given,
        slots=_LIVE_SLOTS if options.live else _SLOTS,
        depth=depth,
        policy="drop-oldest" if options.live else "block",
    )
    uncaptured, _, why = runtime.describe()["graph"].partition(": ")
    return runtime, why if uncaptured == "none" else ""


class Inside:
    """What belongs to the frames inside a runtime. One thread puts while another takes: a deque allows both at once."""

    def __init__(self) -> None:
        self._frames: deque[tuple[int, Any]] = deque()

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, number: int, what: Any) -> None:
        """Of the frame that goes in next; numbers rise."""
        self._frames.append((number, what))

    def withdraw(self) -> None:
        """The last one did not go in."""
        self._frames.pop()

    def take(self, number: int) -> Any:
        """Of the frame that came out; those before it were dropped."""
        while (found := self._frames.popleft())[0] < number:
            pass
        return found[1]

"""The generator as what a frame runtime on CUDA calls: the slots' own memory, work enqueued on the runtime's stream."""

from __future__ import annotations

from typing import Any

import torch

from ..config import Stream
from ..errors import InputError
from ..runtime import native
from ..runtime.engine import Engine, TorchEngine


class _Memory:
    """float32 memory of the GPU at an address, as torch takes it."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": "<f4", "version": 3}


class DeviceNetwork:
    """`network(input, output, stream)` with addresses; one picture at a time, never copied off the GPU.

    An engine of PyTorch takes pictures channels-last as they lie, the others [3, H, W].
    """

    def __init__(self, engine: Engine, height: int, width: int) -> None:
        self.layout = "nhwc" if isinstance(engine, TorchEngine) else "nchw"
        self._shape = (height, width, 3) if self.layout == "nhwc" else (3, height, width)
        self._engine, self._count = engine, 0

    def __call__(self, input: int, output: int, stream: int) -> None:
        device = self._engine.device
        x, y = (torch.as_tensor(_Memory(address, self._shape), device=device) for address in (input, output))
        if self.layout == "nhwc":
            x, y = x.permute(2, 0, 1), y.permute(2, 0, 1)
        self._engine.enqueue(x[None], y[None], torch.cuda.ExternalStream(stream, device=device), self._count)
        self._count += 1


def not_supported_reasons(engine: Engine, options: Stream) -> list[str]:
    """Why frames cannot stay on the GPU between decoder and encoder."""
    reasons = []
    if native.CUDA is None:
        reasons.append("the native frame runtime was built without CUDA (FASTPIX2PIX_CUDA=on)")
    if engine.device.type != "cuda":
        reasons.append(f"the model runs on {engine.device}")
    if (engine.in_channels, engine.out_channels) != (3, 3):
        reasons.append(f"the model has {engine.in_channels} and {engine.out_channels} channels, not 3 and 3")
    if engine.describe().get("pixels") == "uint8":
        reasons.append("the engine takes uint8 pixels")
    if options.steady or options.fit == "tile":
        reasons.append("steady and fit = tile work on the CPU's runtime")
    return reasons


def on_gpu(engine: Engine, options: Stream) -> bool:
    """Whether the frame runtime is to be CUDA's. Raises InputError where that was asked for and cannot be."""
    if options.frames != "cuda":
        return False
    if reasons := not_supported_reasons(engine, options):
        raise InputError(f"frames = cuda: {'; '.join(reasons)}; use frames = auto or cpu")
    return True


def graph_of(engine: Engine) -> dict[str, Any]:
    """Options of the runtime: work with new noise for every picture cannot be captured."""
    return {
        "device": str(engine.device),
        "kind": "call",
        "graph": "off" if engine.modes.noise == "random" else "auto",
    }

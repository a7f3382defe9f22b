"""The generator as what a frame runtime on CUDA calls: the slots' own memory, work enqueued on the runtime's stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..capture import capturing
from ..config import Stream
from ..errors import InputError
from ..runtime import native
from ..runtime.engine import Engine, TorchEngine


class _Memory:
    """float32 memory of the GPU at an address, as torch takes it."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": "<f4", "version": 3}


class DeviceNetwork:
    """A generator as the engine of a FrameRuntime on CUDA: one picture at a time, never copied off the GPU.

    `engine` and `options` are the runtime's arguments. Engines that own all their memory are called, and captured by
    the runtime where that can be; each network has its own of one, since many may run at once. PyTorch's takes memory
    from a cache that others share, so each slot gets a graph of its own here, which keeps what it needs. New noise for
    every picture cannot be in a graph. Engines of our own take pictures channels-last as they lie, the others
    [3, H, W].
    """

    def __init__(self, engine: Engine, height: int, width: int) -> None:
        self.layout = engine.layout
        self._shape = (height, width, 3) if self.layout == "nhwc" else (3, height, width)
        self._engine, self._count = engine.apart(), 0
        if engine.device.type == "cuda":  # what that began on the caller's stream is done before others use it
            torch.cuda.current_stream(engine.device).synchronize()
        self._graphs: list[tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = []  # with the masks they read
        self._known: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # of the slots
        random = engine.modes.noise == "random"
        own_graph = isinstance(engine, TorchEngine) and not random
        self.options: dict[str, Any] = {
            "device": str(engine.device),
            "kind": "graph" if own_graph else "call",
            "graph": "off" if random else "auto",
        }

    @property
    def engine(self) -> Callable[..., int | None]:
        return self._graph if self.options["kind"] == "graph" else self._call

    def _call(self, input: int, output: int, stream: int) -> None:
        """Addresses of a slot's tensors and of a stream."""
        device = self._engine.device
        with torch.cuda.device(device):  # or torch goes back to another, which it has not made the current one yet
            x, y = self._tensors(input, output)
            self._engine.enqueue(x, y, torch.cuda.ExternalStream(stream, device=device), self._count)
        self._count += 1

    def _graph(self, input: int, output: int) -> int:
        """The address of a finished cudaGraph_t from one to the other."""
        assert isinstance(self._engine, TorchEngine)
        x, y = self._tensors(input, output)
        device = self._engine.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            for _ in range(2):  # libraries choose their algorithms
                self._engine.enqueue(x, y, stream)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with capturing(graph, stream):
                self._engine.enqueue(x, y, stream)
        self._graphs.append((graph, self._engine.fixed_masks()))
        return graph.raw_cuda_graph()

    def _tensors(self, input: int, output: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, 3, H, W] each. They are made once: not in a capture, and not for every picture."""
        if (input, output) not in self._known:
            device = self._engine.device
            x, y = (torch.as_tensor(_Memory(address, self._shape), device=device) for address in (input, output))
            if self.layout == "nhwc":
                x, y = x.permute(2, 0, 1), y.permute(2, 0, 1)
            self._known[input, output] = x[None], y[None]
        return self._known[input, output]


def not_supported_reasons(engine: Engine, options: Stream) -> list[str]:
    """Why frames cannot stay on the GPU between decoder and encoder."""
    reasons = []
    if native.CUDA is None:
        reasons.append("the native frame runtime was built without CUDA (FASTPIX2PIX_CUDA=on)")
    if engine.device.type != "cuda":
        reasons.append(f"the model runs on {engine.device}")
    if (engine.in_channels, engine.out_channels) != (3, 3):
        reasons.append(f"the model has {engine.in_channels} and {engine.out_channels} channels, not 3 and 3")
    described = engine.describe()
    if described.get("pixels") == "uint8":
        reasons.append("the engine takes uint8 pixels")
    batches = described.get("batches")
    if batches and batches[0] > 1:
        numbers = ", ".join(map(str, sorted({*batches})))
        reasons.append(f"the engine is built for {numbers} images in one call, not for 1")
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

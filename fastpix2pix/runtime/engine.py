"""Run a trained generator: one protocol for every backend, and the PyTorch one."""

from __future__ import annotations

import statistics
import time
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..config import Modes
from ..device import resolve_precision
from ..model import Unet
from ..model.layers import Dropout
from ..model.unet import check_modes

INPUT, OUTPUT = "input", "output"  # names in an exported graph; masks have those of runtime/masks.py
Layout = Literal["nhwc", "nchw"]
_WARM = 5  # calls before a measurement: libraries allocate, compile and capture in the first ones
_TIMED = {"cpu": 5, "cuda": 20}  # calls of a measurement
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(Protocol):
    """A generator ready to run. Everything about pixels, sizes and files is outside (Translator)."""

    @property
    def in_channels(self) -> int: ...

    @property
    def out_channels(self) -> int: ...

    @property
    def multiple(self) -> int:
        """Height and width of a batch are multiples of this many pixels."""

    @property
    def device(self) -> torch.device:
        """Where batches are taken and given back."""

    @property
    def layout(self) -> Layout:
        """The order of a float picture in memory that costs least; `translate` takes both."""

    @property
    def modes(self) -> Modes: ...

    def translate(
        self,
        batch: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1], channels-last, on `device`
        first: int = 0,  # running number of the first image: random noise is drawn from (seed, number)
    ) -> Tensor:
        """[N, out_channels, H, W] float32 in [-1, 1]; image i does not depend on the rest of the batch."""

    def enqueue(
        self,
        input: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1]; of an engine for uint8 pixels [N, H, W, C] uint8
        output: Tensor,  # the same of the output; written
        stream: torch.cuda.Stream,  # where the work goes; engines that run on a CPU take None and are done on return
        first: int = 0,  # running number of the first image
    ) -> None:
        """One call on the caller's buffers, which are in use until the stream gets past it.

        Calls on several streams at once may share the memory between layers: each stream takes an engine `apart`.
        """

    def apart(self) -> Engine:
        """The same kernels (weights, plans) with memory of its own between layers; itself where calls share none."""

    def describe(self) -> dict[str, Any]:
        """Backend, device and precision, JSON-ready.

        Of engines built for some shapes also "sizes", [height, width] from the smallest to the largest, and "batches"
        likewise; empty, or not there, where they take any.
        """


class TorchEngine:
    """The PyTorch generator, channels-last, under autocast where the precision is not fp32.

    Takes `net` over: it is moved to the device and put into eval mode, its convolutions into the precision.
    """

    layout: Layout = "nhwc"

    def __init__(self, net: Unet, modes: Modes, device: torch.device | None = None, precision: str = "auto") -> None:
        check_modes(net.config, modes)
        self.device = device or torch.device("cpu")
        self.precision = resolve_precision(precision, self.device)
        self.modes = modes
        self.in_channels, self.out_channels = net.config.in_channels, net.config.out_channels
        self.multiple = net.config.multiple
        self._net = net.eval().requires_grad_(False).to(self.device)  # channels-last by itself
        if self.precision in _DTYPES:  # autocast would narrow every kernel anew in every call
            for module in self._net.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    module.to(_DTYPES[self.precision])

    @torch.no_grad()
    def translate(
        self,
        batch: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1], channels-last
        first: int = 0,  # running number of the first image
    ) -> Tensor:
        """[N, out_channels, H, W] float32 in [-1, 1]."""
        dtype = _DTYPES.get(self.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self._net(batch, self.modes, first).float()

    def enqueue(
        self,
        input: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1], channels-last
        output: Tensor,  # [N, out_channels, H, W] float32; written
        stream: torch.cuda.Stream | None = None,
        first: int = 0,  # running number of the first image
    ) -> None:
        """`translate` on a stream, copied into the caller's buffer."""
        with torch.cuda.stream(stream):  # None: as it is
            output.copy_(self.translate(input, first))

    def apart(self) -> TorchEngine:
        """Itself: PyTorch's memory is each stream's."""
        return self

    def fixed_masks(self) -> list[Tensor]:
        """Masks of noise = fixed. Who captured a call keeps them beside the graph: the network drops the oldest."""
        return [mask for part in self._net.modules() if isinstance(part, Dropout) for mask in part.fixed.values()]

    def describe(self) -> dict[str, Any]:
        """Backend, device (with the GPU's name) and precision."""
        described = {"backend": "torch", "device": str(self.device), "precision": self.precision}
        if self.device.type == "cuda":
            described["gpu"] = torch.cuda.get_device_name(self.device)
        return described


def latency(engine: Engine, images: int, height: int, width: int) -> dict[str, Any]:
    """Warm an engine up and measure a call: {"ms", "runs", "batch", "size", "gpu"}, the median, JSON-ready.

    Noise is translated (zeros cost a GPU less power, so it would clock higher); input and output are on the device.
    """
    cuda = engine.device.type == "cuda"
    noise = torch.rand(images, engine.in_channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = noise.to(engine.device, memory_format=torch.channels_last)
    times = []
    for _ in range(_WARM + _TIMED[engine.device.type]):
        if cuda:
            torch.cuda.synchronize(engine.device)
        start = time.perf_counter()
        engine.translate(batch)
        if cuda:
            torch.cuda.synchronize(engine.device)
        times.append(1000 * (time.perf_counter() - start))
    timed = times[_WARM:]
    gpu = torch.cuda.get_device_name(engine.device) if cuda else None
    return {"ms": statistics.median(timed), "runs": len(timed), "batch": images, "size": [height, width], "gpu": gpu}

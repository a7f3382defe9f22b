"""Run a built engine on a GPU: TensorRT and TensorRT-RTX."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..capture import capturing
from ..console import say
from ..data.images import to_uint8, to_unit
from ..device import resolve_device, with_index
from ..errors import EnvironmentFailed, InputError
from ..files import written_aside
from .buffers import buffer_dtype, buffer_layout, buffer_shape, check_buffers
from .engine import INPUT, OUTPUT, latency
from .masks import Masks
from .plan import Machine, kernels, read_engine, update_plan
from .tensorrt_library import Library, library, missing

_KEPT = 8  # shapes of a batch with buffers and a graph; sizes with masks of noise = fixed
_WARM = 3  # calls before a capture, which only shapes that come again are worth


def not_supported_reasons(target: str, device: str | torch.device = "auto") -> list[str]:
    """Why an engine of this target cannot run here: GPU and library, with what to install."""
    found = []
    if not torch.cuda.is_available():
        found.append("torch sees no NVIDIA GPU (install its driver and a CUDA build of torch)")
    elif str(device) == "cpu":
        found.append("it runs on a GPU, and device = cpu was asked for")
    return found + [text for text in [missing(target)] if text]


def machine(found: Library, device: torch.device) -> Machine:
    """What plans are compared with."""
    major, minor = torch.cuda.get_device_capability(device)
    return Machine(found.version, f"sm{major}{minor}", torch.cuda.get_device_name(device))


class TensorRTEngine:
    """An engine file on a GPU. Its files are checked, and everything that cannot run here is refused with reasons.

    Buffers, workspace and masks are torch's: what the engine needs is one allocation at start. `translate` keeps one
    CUDA graph per shape of a batch, each with an execution context of its own; `enqueue` writes into the caller's
    memory and captures nothing itself. All calls share the workspace: one may start on another stream only when the
    one before is done, or in an engine `apart`.
    """

    def __init__(
        self,
        path: str | Path,  # FILE, with FILE.json beside it
        device: str | torch.device = "auto",
        *,
        model: str | None = None,  # hash that the engine's model must have
        graph: bool = True,  # capture translate
    ) -> None:
        self.path = Path(path)
        self.plan, data = read_engine(self.path)
        if reasons := not_supported_reasons(self.plan.target, device):
            raise EnvironmentFailed(f"{self.path} cannot run here: {'; '.join(reasons)}")
        self.device = with_index(resolve_device(device))
        self._library = library(self.plan.target)
        self.plan.check(self.path, machine(self._library, self.device), model)
        config = self.plan.generator
        self.modes, self.multiple = self.plan.modes, config.multiple
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.layout = buffer_layout(self.plan.form)
        self._masks = Masks(config, self.modes, self.plan.form)
        self._graph = graph
        with torch.cuda.device(self.device):
            self._deserialise(data)
            self._take_memory()

    def _take_memory(self) -> None:
        self._calls: dict[tuple[int, int, int], _Call] = {}
        self._alone = threading.Lock()  # they have one input and one output, whichever thread calls
        self._fixed: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._stream = torch.cuda.Stream(self.device)  # on the default stream TensorRT synchronises the device
        size = self._engine.device_memory_size_v2
        self._workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        self._context = _Context(self)

    def _deserialise(self, data: bytes) -> None:
        api = self._library.api
        self._library.errors.clear()
        self._runtime = api.Runtime(self._library.logger)  # engine_host_code_allowed stays off
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise EnvironmentFailed(f"{self.path}: {self._library.name} refuses it: {self._library.take_errors()}")
        managed = api.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config = managed  # of every context
        self.compiles = False  # TensorRT-RTX has no kernels for this GPU yet
        if self.plan.target == "tensorrt-rtx":
            self._config = self._engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(managed)
            self._config.dynamic_shapes_kernel_specialization_strategy = (
                api.DynamicShapesKernelSpecializationStrategy.EAGER  # lazily compiled kernels change under a graph
            )
            self._config.cuda_graph_strategy = api.CudaGraphStrategy.DISABLED  # the graphs here are torch's
            self._compiled = self._config.create_runtime_cache()
            kept = kernels(self.path)  # those of another GPU, driver or version are refused
            self.compiles = not (kept.is_file() and self._compiled.deserialize(kept.read_bytes()))
            self._config.set_runtime_cache(self._compiled)

    def translate(
        self,
        batch: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1], on `device`
        first: int = 0,  # running number of the first image
    ) -> Tensor:
        """[N, out_channels, H, W] float32 in [-1, 1]. Any N; sizes as the engine was built for, else InputError.

        An engine for uint8 pixels rounds its input to 8 bits.
        """
        n, _, height, width = batch.shape
        self._check_size(height, width)
        most = self.plan.batches[-1]
        found = [self._chunk(batch[i : i + most], first + i) for i in range(0, n, most)]
        return torch.cat(found) if len(found) > 1 else found[0]

    def enqueue(
        self,
        input: Tensor,  # [n, C, H, W] float32 or [n, H, W, C] uint8 (plan.form.pixels), contiguous, on `device`
        output: Tensor,  # the same of the output; written
        stream: torch.cuda.Stream,  # not the default stream
        first: int = 0,  # running number of the first image, for noise = random
    ) -> None:
        """Start one call on the caller's buffers and stream, and return; both are in use until the stream gets past it.

        n is a number of images the engine was built for. Can be captured in a CUDA graph after it ran with the same
        addresses and size, unless noise is random: then masks are uploaded in every call. The graph holds until a call
        of another size.
        """
        channels = self.in_channels, self.out_channels
        n, height, width = check_buffers(self.plan.form, input, output, channels, self.device)
        self._check_size(height, width)
        if not self.plan.batches[0] <= n <= self.plan.batches[-1]:
            raise InputError(f"{n} images in one call: {self.path} takes {_range(self.plan.batches)}")
        with torch.cuda.stream(stream):  # masks that end here are given back in the order of this stream
            self._context.enqueue(input, output, self._mask_tensors(n, height, width, first), stream)

    def apart(self) -> TensorRTEngine:
        """An execution context and a workspace of its own; the weights are this engine's."""
        other = copy.copy(self)
        with torch.cuda.device(self.device):
            other._take_memory()
        return other

    def warm_up(self) -> dict[str, Any]:
        """Run at the usual size until the GPU compiled and captured everything, and measure a call (engine.latency).

        The first measurement is written into the sidecar, and what TensorRT-RTX compiled anew beside it; a folder that
        cannot be written keeps neither.
        """
        found = latency(
            self, self.plan.batches[len(self.plan.batches) // 2], *self.plan.sizes[len(self.plan.sizes) // 2]
        )
        try:
            if self.plan.latency is None:
                self.plan = update_plan(self.path, self.plan, latency=found)
            if self.compiles:
                with written_aside(kernels(self.path)) as aside:
                    aside.write_bytes(bytes(self._compiled.serialize()))
                self.compiles = False
        except EnvironmentFailed:
            pass  # a read-only place: measured and compiled again next time
        return found

    def describe(self) -> dict[str, Any]:
        """Backend, device with the GPU's name, precision, version, sizes, batches and latency."""
        plan = self.plan
        return {
            "backend": plan.target,
            "device": str(self.device),
            "gpu": torch.cuda.get_device_name(self.device),
            "precision": plan.form.precision,
            "version": plan.version,
            "pixels": plan.form.pixels,
            "sizes": [list(size) for size in plan.sizes],
            "batches": list(plan.batches),
            "latency": plan.latency,
        }

    def inspect(self) -> str:
        """What the library says about the engine's layers, as JSON."""
        api = self._library.api
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(api.LayerInformationFormat.JSON))

    def _chunk(
        self,
        batch: Tensor,  # [n, C, H, W] float32 in [-1, 1], n at most the engine's largest
        first: int,
    ) -> Tensor:
        n, _, height, width = batch.shape
        padded = max(n, self.plan.batches[0])  # an engine for 4 images translates 1 as 4
        key = (padded, height, width)
        with self._alone:
            if key not in self._calls:
                while len(self._calls) >= _KEPT:
                    self._stream.synchronize()
                    del self._calls[next(iter(self._calls))]
                self._calls[key] = _Call(self, *key)
            return self._calls[key](batch, first)[:n]

    def _mask_tensors(self, n: int, height: int, width: int, first: int) -> dict[str, Tensor]:
        """{input: mask} on the GPU, by the current stream; those of noise = fixed are kept."""
        size = (height, width)
        if size in self._fixed:
            return self._fixed[size]
        masks = {name: self._masks(name, n, height, width, first) for name in self._masks.names}
        found = {name: mask.to(self.device) for name, mask in masks.items()}  # uint8, as the graph takes them
        if self.modes.noise == "fixed" and found:
            torch.cuda.synchronize(self.device)  # any stream may read them now, and none still reads what goes
            while len(self._fixed) >= _KEPT:
                del self._fixed[next(iter(self._fixed))]
            self._fixed[size] = found
        return found

    def _check_size(self, height: int, width: int) -> None:
        least, most = self.plan.sizes[0], self.plan.sizes[-1]
        multiple = 1 if least == most else self.multiple
        fits = least[0] <= height <= most[0] and least[1] <= width <= most[1]
        if not fits or height % multiple or width % multiple:
            sizes = _range([f"{h}x{w}" for h, w in (least, most)])
            raise InputError(
                f"{height}x{width} pixels (after padding to multiples of {self.multiple}): {self.path} takes {sizes}; "
                "give such a size (infer: fit = resize or crop), or build one with size = smallest,usual,largest"
            )


class _Context:
    """An execution context on the engine's workspace.

    The first call after a shape is set cannot be captured, and a graph holds as long as its context keeps the shape.
    So shapes are set only where they change, and every graph of `translate` has a context of its own.
    """

    def __init__(self, engine: TensorRTEngine) -> None:
        self._path, self._library = engine.path, engine._library
        self._context = engine._engine.create_execution_context(engine._config)
        if self._context is None:
            raise EnvironmentFailed(f"{self._path}: no execution context: {self._library.take_errors()}")
        self._context.set_device_memory(engine._workspace.data_ptr(), engine._engine.device_memory_size_v2)
        self._shapes: dict[str, tuple[int, ...]] = {}

    def enqueue(self, input: Tensor, output: Tensor, masks: dict[str, Tensor], stream: torch.cuda.Stream) -> None:
        inputs = {INPUT: input, **masks}
        self._masks = masks  # which a graph of this call goes on reading
        for name, tensor in inputs.items():
            shape = tuple(tensor.shape)
            if self._shapes.get(name) != shape:
                if not self._context.set_input_shape(name, shape):
                    raise EnvironmentFailed(f"{self._path}: {name} {list(shape)}: {self._library.take_errors()}")
                self._shapes[name] = shape
        for name, tensor in {**inputs, OUTPUT: output}.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EnvironmentFailed(f"{self._path}: the engine failed: {self._library.take_errors()}")

    def capturable(self, stream: torch.cuda.Stream) -> bool:
        ask = getattr(self._context, "is_stream_capturable", None)  # RTX has it, TensorRT always captures
        return ask is None or bool(ask(stream.cuda_stream))


class _Call:
    """Buffers for one shape of a batch, and after a few calls the CUDA graph that runs on them."""

    def __init__(self, engine: TensorRTEngine, n: int, height: int, width: int) -> None:
        self._engine, self._key = engine, (n, height, width)
        form, on = engine.plan.form, engine.device
        shapes = [buffer_shape(form, n, height, width, c) for c in (engine.in_channels, engine.out_channels)]
        self._in = torch.zeros(shapes[0], dtype=buffer_dtype(form), device=on)
        self._out = torch.empty(shapes[1], dtype=buffer_dtype(form), device=on)
        self._masks = engine._mask_tensors(n, height, width, 0)
        self._runs = 0
        self._context: _Context | None = None  # the graph's
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self,
        batch: Tensor,  # [up to n, C, H, W] float32 in [-1, 1]
        first: int,
    ) -> Tensor:  # [n, C, H, W] float32, a copy
        engine, stream = self._engine, self._engine._stream
        current = torch.cuda.current_stream(engine.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            pixels = to_uint8(batch).permute(0, 2, 3, 1) if engine.plan.form.pixels == "uint8" else batch
            self._in[: len(batch)].copy_(pixels)
            if engine.modes.noise == "random":
                for name, mask in engine._mask_tensors(*self._key, first).items():
                    self._masks[name].copy_(mask)
            self._run(stream)
            y = self._out
            out = to_unit(y.permute(0, 3, 1, 2)) if y.dtype == torch.uint8 else y.clone()
        current.wait_stream(stream)
        batch.record_stream(stream)
        out.record_stream(current)
        return out

    def _run(self, stream: torch.cuda.Stream) -> None:
        engine = self._engine
        if self._graph is not None:
            self._graph.replay()
            return
        self._runs += 1
        if not engine._graph or self._runs <= _WARM:
            engine._context.enqueue(self._in, self._out, self._masks, stream)
            return
        self._context = self._context or _Context(engine)
        self._context.enqueue(self._in, self._out, self._masks, stream)
        if self._context.capturable(stream):
            self._capture(self._context, stream)

    def _capture(self, context: _Context, stream: torch.cuda.Stream) -> None:
        """Record the call for the next ones. One that breaks off is said, and the engine captures no more."""
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, stream):
                context.enqueue(self._in, self._out, self._masks, stream)
        except RuntimeError as error:
            self._engine._graph = False
            reason = " ".join(str(error).split())[:200]
            say(f"{self._engine.path}: called without a CUDA graph (the capture broke off: {reason})")
        else:
            self._graph = graph


def _range(values: Any) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"

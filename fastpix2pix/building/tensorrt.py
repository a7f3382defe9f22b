"""From an ONNX file to an engine, by TensorRT or TensorRT-RTX: strongly typed, so the file alone decides precision."""

from __future__ import annotations

import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Build, Form, Generator, Modes
from ..errors import EnvironmentFailed, InputError
from ..files import written_aside
from ..interrupt import Interrupt
from ..runtime.engine import INPUT
from ..runtime.masks import mask_inputs, mask_shape
from ..runtime.tensorrt_library import Library

Shape = tuple[int, ...]

_TIMING = b"fastpix2pix timing cache\n"  # first line of the file
# the first capability that has it
_NEEDS = {"bf16": 80, "fp8": 89, "int8": 75}
_NAMES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "FP8": "fp8"}  # of DataType; the others in small letters


@dataclass(frozen=True)
class Layer:
    """One layer of a parsed network."""

    name: str
    kind: str  # LayerType: CONVOLUTION, DECONVOLUTION, NORMALIZATION, ...
    precision: str  # it computes in: fp32, fp16, bf16, int8, fp8, ...


@dataclass(frozen=True)
class Engine:
    """A built engine and the network it was built from."""

    data: bytes
    layers: tuple[Layer, ...]


def wanted(build: Build, here: str | None) -> tuple[str, ...]:
    """The GPUs to build for: those asked for, else the one here (`here`: sm80), else none."""
    given = tuple(dict.fromkeys(name.strip().lower() for name in (build.capabilities or "").split(",") if name.strip()))
    return given or ((here,) if here else ())


def not_supported_reasons(
    build: Build,
    precision: str,  # auto asks for nothing
    known: Collection[str],  # capabilities of the library
    here: str | None,  # the GPU: sm80; None where there is none to use
) -> list[str]:
    """Why a target cannot honour the options: all reasons, before anything is built."""
    if build.target == "onnx":
        engine_only = ("capabilities", "workspace", "timing_cache", "version_compatible", "refit", "strip")
        given = [f"{name} = {getattr(build, name)}" for name in engine_only if getattr(build, name)]
        return [f"{one} belongs to engines, the target is onnx" for one in given]
    found = (_of_rtx if build.target == "tensorrt-rtx" else _of_tensorrt)(build, known, here)
    least = _NEEDS.get(precision, 0)
    old = [name for name in wanted(build, here) if re.fullmatch(r"sm\d+", name) and int(name[2:]) < least]
    if old:
        found.append(f"{precision} needs sm{least} or later, not {', '.join(old)}")
    return found


def _of_tensorrt(build: Build, known: Collection[str], here: str | None) -> list[str]:
    found = []
    if here is None:
        found.append(
            "TensorRT builds on the GPU that will run the engine, and none is used here; "
            "target = tensorrt-rtx with capabilities = sm80 builds without one"
        )
    if build.capabilities:
        found.append(
            "a TensorRT engine is for the GPU it is built on; "
            f"capabilities = {build.capabilities} belongs to target = tensorrt-rtx"
        )
    return found


def _of_rtx(build: Build, known: Collection[str], here: str | None) -> list[str]:
    found = []
    capabilities = wanted(build, here)
    if not capabilities:
        found.append(f"there is no GPU here to build for; say which: capabilities = {','.join(known)}")
    if unknown := [name for name in capabilities if name not in known]:
        found.append(
            f"TensorRT-RTX does not know {', '.join(unknown)}, only {', '.join(known)}; "
            "for other GPUs use target = tensorrt, on the GPU itself"
        )
    if build.timing_cache:
        found.append(
            f"TensorRT-RTX measures nothing while it builds, so timing_cache = {build.timing_cache} would stay empty"
        )
    if build.version_compatible:
        found.append("TensorRT-RTX has no lean runtime, which version_compatible = True needs; use target = tensorrt")
    for name in ("refit", "strip"):
        if getattr(build, name) and here is None:
            found.append(f"TensorRT-RTX builds {name} = True only on a GPU, and none is used here")
    return found


@contextmanager
def parsed(library: Library, onnx: Path) -> Iterator[tuple[Any, Any]]:
    """(builder, strongly typed network) of an ONNX file, alive inside the block.

    Raises InputError with every error of the parser: node, operator and reason.
    """
    api = library.api
    library.errors.clear()
    builder = api.Builder(library.logger)
    # TensorRT 11 has no other networks; from 10 on the flag is there
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, library.logger)  # owns the weights: has to outlive the build
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        text = "\n".join(f"  node {e.node()} {e.node_operator()} ({e.node_name()}): {e.desc().strip()}" for e in errors)
        raise InputError(f"{library.name} {library.version} cannot parse {onnx}:\n{text or library.take_errors()}")
    if not network.num_outputs:  # protobuf reads many a foreign file as an empty message
        raise InputError(f"{onnx} has no outputs: is it an ONNX file?")
    yield builder, network
    del parser


def layers(network: Any) -> tuple[Layer, ...]:
    """Name, kind and precision of every layer of a parsed network.

    Precision is the type of a layer's output; of a convolution with dequantised input, the type before that.
    """
    found = []
    before: dict[str, Any] = {}  # {output of a dequantisation: its input's type}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        output, kind, dtype = layer.get_output(0), layer.type.name, layer.get_output(0).dtype
        if kind == "DEQUANTIZE":
            before[output.name] = layer.get_input(0).dtype
        elif kind in ("CONVOLUTION", "DECONVOLUTION"):
            dtype = before.get(layer.get_input(0).name, dtype)
        found.append(Layer(layer.name, kind, _NAMES.get(dtype.name, dtype.name.lower())))
    return tuple(found)


def precisions(found: Collection[Layer]) -> dict[str, dict[str, int]]:
    """{kind: {precision: number of layers}}, without constants."""
    table: dict[str, dict[str, int]] = {}
    for (kind, precision), count in sorted(Counter((x.kind, x.precision) for x in found).items()):
        if kind != "CONSTANT":
            table.setdefault(kind.lower(), {})[precision] = count
    return table


def shapes(
    config: Generator,
    modes: Modes,
    form: Form,
    sizes: Sequence[tuple[int, int]],  # (height, width): one, or smallest, usual and largest
    batches: Sequence[int],  # likewise
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, usual and largest shape of every input with dynamic axes, in the order of the graph's inputs."""
    if form.batch is not None and form.height is not None:
        return {}
    random, found = modes.noise == "random", {}
    ends = [(batches[i if len(batches) == 3 else 0], *sizes[i if len(sizes) == 3 else 0]) for i in range(3)]
    channels, uint8 = config.in_channels, form.pixels == "uint8"
    found[INPUT] = [(n, h, w, channels) if uint8 else (n, channels, h, w) for n, h, w in ends]
    for name, block in mask_inputs(config, modes, form).items():
        if form.height is None or random:
            found[name] = [(n if random else 1, *mask_shape(config, block, h, w)) for n, h, w in ends]
    return {name: (least, usual, most) for name, (least, usual, most) in found.items()}


def build_engine(
    library: Library,
    onnx: Path,
    build: Build,
    profile: Mapping[str, tuple[Shape, Shape, Shape]],  # of inputs with dynamic axes: smallest, usual, largest
    capabilities: Collection[str] = (),  # sm80, ...: where the library builds for GPUs that are not here
    progress: Callable[[int, int], None] | None = None,  # called with (steps done, steps in all) of the builder
    stop: Callable[[], bool] | None = None,  # asked at every step; True ends the build
) -> Engine:
    """Build an engine. Options the target cannot honour are refused before (not_supported_reasons).

    Raises InputError where the file cannot be parsed, EnvironmentFailed with the library's reasons where the build
    fails, KeyboardInterrupt where it was stopped. Ctrl-C and SIGTERM end the build at its next step.
    """
    api = library.api
    with parsed(library, onnx) as (builder, network):
        config = builder.create_builder_config()
        _set_flags(api, config, build)
        config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # the inspector then tells the types of layers
        if build.workspace is not None:
            config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, build.workspace << 20)
        if build.target == "tensorrt-rtx":
            config.num_compute_capabilities = len(capabilities)
            for i, name in enumerate(capabilities):
                config.set_compute_capability(getattr(api.ComputeCapability, name.upper()), i)
        _add_profile(builder, network, config, profile)
        with _timing_cache(config, build.timing_cache), Interrupt() as signalled:
            monitor = _monitor(api, progress, lambda: signalled() or bool(stop and stop()))
            config.progress_monitor = monitor
            data = builder.build_serialized_network(network, config)
        if signalled.signal is not None:
            signal.raise_signal(signalled.signal)  # to whoever handled it before
        if monitor.error is not None:
            raise monitor.error
        if data is None:
            raise EnvironmentFailed(f"{library.name} {library.version} did not build {onnx}: {library.take_errors()}")
        return Engine(bytes(data), layers(network))


def _set_flags(api: Any, config: Any, build: Build) -> None:
    flags = {"VERSION_COMPATIBLE": build.version_compatible, "REFIT": build.refit, "STRIP_PLAN": build.strip}
    # The lean runtime in a plan is host code, which TensorRTEngine does not allow.
    flags["EXCLUDE_LEAN_RUNTIME"] = build.version_compatible
    # A CUDA graph can hold only an engine that allocates nothing while it runs.
    flags["REQUIRE_USER_ALLOCATION"] = build.target == "tensorrt-rtx"
    for name, on in flags.items():
        if on:
            config.set_flag(getattr(api.BuilderFlag, name))
    # TF32 is on by default: an fp32 engine would round its products to 10 bits
    config.clear_flag(api.BuilderFlag.TF32)


def _add_profile(builder: Any, network: Any, config: Any, shapes: Mapping[str, tuple[Shape, Shape, Shape]]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
    if sorted(dynamic) != sorted(shapes):
        given = ", ".join(shapes) or "none"
        raise InputError(f"inputs with dynamic axes are {', '.join(dynamic) or 'none'}, shapes given for {given}")
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name in dynamic:
        profile.set_shape(name, *shapes[name])
    if config.add_optimization_profile(profile) < 0:
        raise InputError(f"the builder refuses these shapes (smallest, usual, largest): {dict(shapes)}")


def _monitor(api: Any, progress: Callable[[int, int], None] | None, stop: Callable[[], bool]) -> Any:
    class Monitor(api.IProgressMonitor):
        """Counts the steps of all phases: later phases add to the total as they begin.

        The library would print an exception and go on: it is kept, and the build ends.
        """

        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.done = self.total = 0
            self.left: dict[str, int] = {}  # steps of the phases that run
            self.error: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.total += steps
            self.left[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            self.left[phase] -= 1
            self.count(1)
            return self.error is None

        def phase_finish(self, phase: str) -> None:
            self.count(self.left.pop(phase))  # a phase may end without its last steps

        def count(self, steps: int) -> None:
            self.done += steps
            if self.error is not None:
                return
            try:
                if progress and steps:
                    progress(self.done, self.total)
                if stop():
                    raise KeyboardInterrupt
            except BaseException as error:
                self.error = error

    return Monitor()


@contextmanager
def _timing_cache(config: Any, file: str | None) -> Iterator[None]:
    """What the builder measured, from and to a file: a later build of the same layers measures nothing."""
    if file is None:
        yield
        return
    path = Path(file)
    content = path.read_bytes() if path.is_file() else _TIMING
    if not content.startswith(_TIMING):  # the library takes any bytes for an empty cache, and the file would be lost
        raise InputError(f"{path}: not a timing cache of an earlier build; give another file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.create_timing_cache(content[len(_TIMING) :])  # that of another GPU counts as empty
        config.set_timing_cache(cache, ignore_mismatch=False)
        yield
        with written_aside(path) as aside:
            aside.write_bytes(_TIMING + bytes(config.get_timing_cache().serialize()))

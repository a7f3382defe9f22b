"""From MODEL to a callable: backend, device and modes resolved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import Modes
from ..device import resolve_device, resolve_precision
from ..errors import InputError
from ..model import Unet
from ..model.load import load_generator, model_path
from ..tuning.cache import PlanCache
from . import auto_choice, onnx_engine, plan, tensorrt_engine, triton_engine
from .engine import Engine, TorchEngine
from .onnx_engine import OnnxEngine
from .tensorrt_engine import TensorRTEngine
from .translator import Translator
from .triton_engine import TritonEngine


def _open_onnx(path: Path, device: str) -> tuple[Engine, dict[str, Any]]:
    where = resolve_device(device)
    if device == "auto" and onnx_engine.not_supported_reasons(where):
        where = torch.device("cpu")
    engine = OnnxEngine(path, where)
    return engine, engine.record


def _open_plan(path: Path, device: str) -> tuple[Engine, dict[str, Any]]:
    engine = TensorRTEngine(path, device)
    if engine.plan.latency is None or engine.compiles:  # built elsewhere, or new here: measured and compiled once
        engine.warm_up()
    return engine, engine.plan.record


@dataclass(frozen=True)
class Backend:
    """One way to run a generator: of a network, or of a file that `fastpix2pix build` made for it."""

    reasons: Callable[[torch.device], list[str]]  # why it cannot run on a device here, with what to install
    of_network: Callable[[Unet, Modes, torch.device, str], Engine] | None = None  # the last is the precision
    of_file: Callable[[Path, str], tuple[Engine, dict[str, Any]]] | None = None  # (engine, record); device by name


TABLE = {
    "torch": Backend(lambda device: [], of_network=TorchEngine),
    "triton": Backend(triton_engine.not_supported_reasons, of_network=TritonEngine),
    "onnxruntime": Backend(onnx_engine.not_supported_reasons, of_file=_open_onnx),
    "tensorrt": Backend(partial(tensorrt_engine.not_supported_reasons, "tensorrt"), of_file=_open_plan),
    "tensorrt-rtx": Backend(partial(tensorrt_engine.not_supported_reasons, "tensorrt-rtx"), of_file=_open_plan),
}
BACKENDS = ("auto", *TABLE)
BUILT = (".onnx", *plan.SUFFIXES)  # files that `fastpix2pix build` makes, each for one backend


def auto_backend(net: Unet, modes: Modes, device: torch.device, precision: str) -> str:
    """What backend = auto runs a network with: on a GPU what `tune --model` found. A file is run by what it is for."""
    if device.type != "cuda" or TABLE["triton"].reasons(device):
        return "torch"
    return auto_choice.chosen(PlanCache(device), net.config, modes, resolve_precision(precision, device))


def load(
    model: str | Path,  # run folder, .safetensors, junyanz .pth, .onnx, or an engine: .engine, .plan
    backend: str = "auto",  # what runs it, one of BACKENDS; auto: what can run a network, or what a file was built for
    *,
    norm_stats: str | None = None,  # image or running; default: the model's record, else image
    noise: str | None = None,  # off, fixed or random; default: the model's record, else off
    seed: int = 0,  # of the noise
    device: str = "auto",  # auto, cpu, cuda, cuda:1
    precision: str = "auto",  # auto (fp32 on the CPU, bf16 or fp16 on CUDA), fp32, bf16, fp16; of a file: its own
) -> Translator:
    """A trained generator as a callable: `g = load("run"); photo = g(label)`. See Translator.

    Files made by `fastpix2pix build` have their modes and precision in them: others are refused.
    Raises InputError for a bad model file, option or pair of modes, EnvironmentFailed for a missing device or library.
    """
    path = model_path(model)
    if backend not in BACKENDS:
        raise InputError(f"backend = {backend!r}: allowed are {', '.join(BACKENDS)}")
    own = built_for(path)
    if own is None:
        where = resolve_device(device)
        net, record = load_generator(path)
        modes, source = resolve_modes(record, norm_stats, noise, seed)
        if backend == "auto":
            backend = auto_backend(net, modes, where, precision)
        make = TABLE[backend].of_network
        if make is None:
            raise _needs_build(path, backend)
        return Translator(make(net, modes, where, precision), source, record)
    if backend not in ("auto", own):
        raise InputError(f"backend = {backend}: {path} is built for {own}; give the model it was built from, or auto")
    opened = TABLE[own].of_file
    assert opened is not None
    engine, record = opened(path, device)
    _check_built(path, engine, {"norm_stats": norm_stats, "noise": noise, "seed": seed or None}, precision)
    return Translator(engine, {"norm_stats": "record", "noise": "record"}, record)


def built_for(path: Path) -> str | None:
    """The backend a file was built for; None for a network, which several run."""
    if path.is_dir():
        return None
    if path.suffix not in BUILT:
        return None
    return plan.read_plan(path).target if path.suffix in plan.SUFFIXES else "onnxruntime"


def resolve_modes(
    record: Mapping[str, Any],  # of the model file; record["modes"] = {"norm_stats": ..., "noise": ...} or absent
    norm_stats: str | None = None,
    noise: str | None = None,
    seed: int = 0,
) -> tuple[Modes, dict[str, str]]:
    """The modes to run with, and for each where it came from: "given", "record" or "default", in this order."""
    recorded = record.get("modes") or {}
    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for name, given, default in (("norm_stats", norm_stats, "image"), ("noise", noise, "off")):
        if given is not None:
            values[name], source[name] = given, "given"
        elif name in recorded:
            values[name], source[name] = recorded[name], "record"
        else:
            values[name], source[name] = default, "default"
    return Modes(**values, seed=seed), source


def _needs_build(path: Path, backend: str) -> InputError:
    target, suffix = ("onnx", ".onnx") if backend == "onnxruntime" else (backend, plan.SUFFIX)
    return InputError(
        f"backend = {backend}: runs files made for it, {path} is a network; "
        f"fastpix2pix build {path} --target {target} --out model{suffix}, then give model{suffix}"
    )


def _check_built(path: Path, engine: Engine, given: Mapping[str, Any], precision: str) -> None:
    """Refuse modes and precisions that the file was not built with."""
    built = {name: getattr(engine.modes, name) for name in given}
    asked = {name: value for name, value in given.items() if value is not None}
    if precision != "auto":
        built["precision"], asked["precision"] = engine.describe()["precision"], precision
    wrong = [f"{name} = {value}" for name, value in asked.items() if value != built[name]]
    if wrong:
        has = ", ".join(f"{name} = {value}" for name, value in built.items())
        raise InputError(f"{', '.join(wrong)}: {path} was built with {has}; build another, or leave the option out")

"""From MODEL to a callable: backend, device and modes resolved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Modes
from ..device import resolve_device
from ..errors import InputError
from ..model.load import load_generator
from .engine import TorchEngine
from .translator import Translator

BACKENDS = ("auto", "torch")


def load(
    model: str | Path,  # run folder, .safetensors or junyanz .pth
    backend: str = "auto",  # auto or torch
    *,
    norm_stats: str | None = None,  # image or running; default: the model's record, else image
    noise: str | None = None,  # off, fixed or random; default: the model's record, else off
    seed: int = 0,  # of the noise
    device: str = "auto",  # auto, cpu, cuda, cuda:1
    precision: str = "auto",  # auto (fp32 on the CPU, bf16 or fp16 on CUDA), fp32, bf16, fp16
) -> Translator:
    """A trained generator as a callable: `g = load("run"); photo = g(label)`. See Translator.

    Raises InputError for a bad model file, option or pair of modes, EnvironmentFailed for a missing device.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend = {backend!r}: allowed are {', '.join(BACKENDS)}")
    where = resolve_device(device)
    net, record = load_generator(model)
    modes, source = resolve_modes(record, norm_stats, noise, seed)
    return Translator(TorchEngine(net, modes, where, precision), source, record)


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

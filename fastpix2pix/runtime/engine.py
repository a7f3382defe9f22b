"""Run a trained generator: one protocol for every backend, and the PyTorch one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import Modes
from ..device import resolve_device, resolve_precision
from ..errors import InputError
from ..model import Unet
from ..model.unet import check_modes
from ..model.weights import load_generator
from .translator import Translator

BACKENDS = ("auto", "torch")
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
    def modes(self) -> Modes: ...

    def translate(
        self,
        batch: Tensor,  # [N, in_channels, H, W] float32 in [-1, 1], channels-last, on `device`
        first: int = 0,  # running number of the first image: random noise is drawn from (seed, number)
    ) -> Tensor:
        """[N, out_channels, H, W] float32 in [-1, 1]; image i does not depend on the rest of the batch."""

    def describe(self) -> dict[str, Any]:
        """Backend, device and precision, JSON-ready."""


class TorchEngine:
    """The PyTorch generator, channels-last, under autocast where the precision is not fp32.

    Takes `net` over: it is moved to the device and put into eval mode.
    """

    def __init__(self, net: Unet, modes: Modes, device: torch.device | None = None, precision: str = "auto") -> None:
        check_modes(net.config, modes)
        self.device = device or torch.device("cpu")
        self.precision = resolve_precision(precision, self.device)
        self.modes = modes
        self.in_channels, self.out_channels = net.config.in_channels, net.config.out_channels
        self.multiple = net.config.multiple
        self._net = net.eval().requires_grad_(False).to(self.device)  # channels-last by itself

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

    def describe(self) -> dict[str, Any]:
        """Backend, device (with the GPU's name) and precision."""
        described = {"backend": "torch", "device": str(self.device), "precision": self.precision}
        if self.device.type == "cuda":
            described["gpu"] = torch.cuda.get_device_name(self.device)
        return described


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

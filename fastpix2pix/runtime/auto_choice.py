"""What backend = auto runs a network with on a GPU: Triton where `tune --model` found it right and faster."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..config import Generator, Modes
from ..model import Unet
from ..tuning.cache import PlanCache, source_hash
from ..tuning.verdicts import OUT_OF_MEMORY, clearly_faster, one_line
from .engine import TorchEngine, latency
from .triton_engine import TritonEngine

ALLOWED = {"fp32": 2e-3, "fp16": 2e-3, "bf16": 0.012}  # mean difference from PyTorch in fp32 (TF32), of [-1, 1]


def compare(
    triton: TritonEngine,
    net: Unet,
    x: Tensor,  # [N, C, H, W] float32 in [-1, 1], on the engine's device
) -> dict[str, float | str]:
    """{"off": mean difference from PyTorch in fp32, "triton": milliseconds or why not, "torch": likewise}."""
    modes, device, precision = triton.modes, triton.device, triton.precision
    n, _, height, width = x.shape
    found: dict[str, float | str] = {}
    try:
        wanted = TorchEngine(copy.deepcopy(net), modes, device, "fp32").translate(x)
        for _ in range(3):  # on a GPU, the last one is a captured graph's
            got = triton.translate(x)
        found["off"] = off = float((got - wanted).abs().mean())
        if not off <= ALLOWED[precision]:
            return found | {"triton": f"wrong: its pictures are off by {off:.2g} on average"}
        found["triton"] = latency(triton, n, height, width)["ms"]
        found["torch"] = latency(TorchEngine(copy.deepcopy(net), modes, device, precision), n, height, width)["ms"]
    except Exception as error:  # whatever a kernel, a compiler or a driver raises
        found["triton"] = one_line(error)
    return found


def keep(cache: PlanCache, config: Generator, modes: Modes, precision: str, found: dict[str, float | str]) -> None:
    """For `chosen`; but not that memory was short. EnvironmentFailed where the disk refuses."""
    if OUT_OF_MEMORY in found.values():
        return
    cache.save(_subject(config, modes, precision), dict(found))


def chosen(cache: PlanCache, config: Generator, modes: Modes, precision: str) -> str:
    """ "triton" or "torch", which is what runs where nothing was measured."""
    return "triton" if triton_wins(cache.load(_subject(config, modes, precision)) or {}) else "torch"


def triton_wins(found: dict[str, Any]) -> bool:
    """Whether what `compare` gave speaks for it."""
    return clearly_faster(found.get("triton"), found.get("torch"))


def in_words(found: dict[str, Any]) -> str:
    """One line."""
    took = {name: found[name] for name in ("triton", "torch") if name in found}
    shown = ", ".join(f"{name} {f'{ms:.4f} ms' if isinstance(ms, float) else ms}" for name, ms in took.items())
    return f"backend = auto: {'triton' if triton_wins(found) else 'torch'} ({shown})"


def _subject(config: Generator, modes: Modes, precision: str) -> dict[str, Any]:
    kinds = {"norm_stats": modes.norm_stats, "noise": modes.noise}
    engines = source_hash(__file__)
    return {"kind": "backend", "generator": asdict(config), **kinds, "precision": precision, "engines": engines}

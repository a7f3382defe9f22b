"""A build with everything resolved that does not depend on the precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Build, Direction, Form, Modes, Precision
from ..device import resolve_device
from ..errors import InputError
from ..model import Unet
from ..model.load import load_generator
from ..model.unet import check_modes
from ..runtime.load import resolve_modes
from ..runtime.plan import model_hash
from ..runtime.tensorrt_library import Library, library
from .onnx_graph import import_onnx
from .samples import Samples, samples
from .tensorrt import not_supported_reasons, wanted

Say = Callable[[str], None]
Count = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What every precision of one build has in common."""

    options: Build
    net: Unet
    record: dict[str, Any]
    modes: Modes
    sizes: tuple[tuple[int, int], ...]
    device: torch.device | None  # the GPU that runs what is built; None: there is none
    capabilities: tuple[str, ...]
    library: Library | None  # None for onnx
    samples: Samples
    progress: Count | None
    stop: Callable[[], bool] | None
    say: Say

    def form(self, precision: Precision) -> Form:
        """What is exported: an axis with one number is fixed, one with three is dynamic."""
        o, (height, width) = self.options, self.sizes[0]
        batch = o.batches[0] if len(o.batches) == 1 else None
        if len(self.sizes) == 3:
            return Form(precision, batch, None, None, o.pixels)
        return Form(precision, batch, height, width, o.pixels)

    def plan(self, form: Form, parity: Mapping[str, Any]) -> dict[str, Any]:
        """What the sidecar of an engine says, but for latency and whether it has weights."""
        assert self.library is not None
        o = self.options
        return {
            "model": model_hash(self.net),
            "record": self.record,
            "modes": self.modes,
            "form": form,
            "sizes": self.sizes,
            "batches": o.batches,
            "target": o.target,
            "version": self.library.version,
            "capabilities": self.capabilities,
            "gpu": torch.cuda.get_device_name(self.device) if o.target == "tensorrt" and self.device else None,
            "parity": dict(parity),
        }


def prepare(model: str | Path, o: Build, progress: Count | None, stop: Callable[[], bool] | None, say: Say) -> Job:
    """Load the model and refuse what cannot be built of it here. Raises as building.build."""
    import_onnx()
    net, record = load_generator(model)
    config = net.config
    modes, source = resolve_modes(record, o.norm_stats, o.noise, o.seed)
    check_modes(config, modes)
    usual = record.get("size") or max(256, config.multiple)
    sizes = o.sizes or ((usual, usual),)
    if odd := [f"{h}x{w}" for h, w in sizes if h % config.multiple or w % config.multiple]:
        raise InputError(
            f"size = {', '.join(odd)}: a generator of depth {config.depth} takes multiples of {config.multiple} pixels"
        )
    device = resolve_device(o.device)
    gpu = device if device.type == "cuda" else None
    here = "sm{}{}".format(*torch.cuda.get_device_capability(gpu)) if gpu else None
    needs_library = o.target != "onnx" and not (o.target == "tensorrt" and gpu is None)  # refused below, GPU first
    found = library(o.target) if needs_library else None
    known = found.capabilities if found else ()
    if reasons := not_supported_reasons(o, o.precision, known, here):
        raise InputError(f"target = {o.target}: {'; '.join(reasons)}")
    direction: Direction = o.direction or record.get("direction") or "AtoB"
    quantised = o.precision in ("int8", "fp8") or (o.precision == "auto" and o.calibration is not None)
    images = samples(o, config, direction, sizes, quantised)
    say(f"modes: {', '.join(f'{name} {getattr(modes, name)} ({why})' for name, why in source.items())}")
    if quantised and o.calibration is None:
        say(f"calibrated on {images.source}: give images of your own with --calibration DATA")
    capabilities = wanted(o, here)
    if o.target != "onnx" and here not in capabilities:
        gpu = None  # the engine is for other GPUs
    return Job(o, net, record, modes, sizes, gpu, capabilities, found, images, progress, stop, say)

"""Engines that `infer` builds for itself: any image size, kept in the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from ..device import resolve_device
from ..errors import EnvironmentFailed
from ..model.load import load_generator
from ..runtime.engine_cache import EngineCache, key_of
from ..runtime.load import resolve_modes
from ..runtime.plan import SUFFIX, model_hash
from ..runtime.tensorrt_engine import machine, not_supported_reasons
from ..runtime.tensorrt_library import library
from .build import build
from .job import Count, Say

_LARGEST = 1024  # side of the largest image, pixels


@contextmanager
def engine_for(
    model: str | Path,  # run folder, .safetensors or junyanz .pth
    target: str,  # tensorrt or tensorrt-rtx
    *,
    cache: EngineCache | None,  # None: build, and remove it in the end
    batch: int = 1,  # most images of a call
    say: Say = lambda line: None,
    progress: Count | None = None,
    stop: Callable[[], bool] | None = None,  # as of build
    **options: Any,  # precision, norm_stats, noise, seed and device, as of config.Build
) -> Iterator[Path]:
    """An engine of a model for images of any size up to 1024 pixels a side, from the cache or built now.

    Raises as `build`, and EnvironmentFailed where it could not run here.
    """
    device = resolve_device(options.get("device", "auto"))
    if reasons := not_supported_reasons(target, device):
        raise EnvironmentFailed(f"backend = {target}: {'; '.join(reasons)}. Or use another backend: torch, onnxruntime")
    net, record = load_generator(model)
    multiple = net.config.multiple
    usual = -(-(record.get("size") or 256) // multiple) * multiple
    largest = max(_LARGEST // multiple * multiple, usual)
    full = {
        **options,
        "target": target,
        "precision": "fp16" if options.get("precision", "auto") == "auto" else options["precision"],
        "size": f"{multiple},{usual},{largest}",
        "batch": f"1,{batch},{batch}" if batch > 1 else "1",
    }
    modes, _ = resolve_modes(record, full.get("norm_stats"), full.get("noise"), full.get("seed", 0))

    def make(path: Path) -> None:
        say(f"building an engine of {model} for {target}: once for this model, GPU and version")
        build(model, path, progress=progress, stop=stop, say=say, **full)

    if cache is None:
        with tempfile.TemporaryDirectory(prefix="fastpix2pix-") as scratch:
            path = Path(scratch) / f"model{SUFFIX}"
            make(path)
            yield path
        return
    said = False

    def waiting() -> None:
        nonlocal said
        if not said:
            say(f"waiting for another process, which builds an engine in {cache.folder}")
        said = True
        if stop and stop():
            raise KeyboardInterrupt

    decides = {name: value for name, value in full.items() if name != "device"}  # the machine says which GPU it is
    here = {**asdict(machine(library(target), device)), "builder": __version__}
    key = key_of(model=model_hash(net), modes=asdict(modes), options=decides, machine=here)
    yield cache.get(key, make, waiting)

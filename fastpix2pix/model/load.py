"""MODEL of the command line: a run folder, a model file or a junyanz checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import InputError
from .junyanz import load_pth
from .unet import Unet
from .weights import load_network


def load_generator(path: str | Path, which: Literal["best", "latest"] = "best") -> tuple[Unet, dict[str, Any]]:
    """The generator of MODEL: a run folder, a .safetensors file or a junyanz .pth. On the CPU and in eval mode.

    Of a run folder: best.safetensors, or the newest checkpoint where there is none or `which` is "latest".
    A .pth has no record but its architecture.
    """
    path = Path(path)
    if which not in ("best", "latest"):
        raise InputError(f"which = {which!r}: allowed are best, latest")
    if path.is_dir():
        path = _of_run(path, which)
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model is a run folder, a .safetensors file or a junyanz .pth")
    if path.suffix == ".pth":
        net = load_pth(path)
        if not isinstance(net, Unet):
            raise InputError(f"{path} is a discriminator; a generator is wanted here")
        return net, {"network": "generator", "architecture": dataclasses.asdict(net.config)}
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: unknown kind of model; allowed are a run folder, .safetensors and junyanz .pth")
    return cast(tuple[Unet, dict[str, Any]], load_network(path, "generator"))


def _of_run(run: Path, which: str) -> Path:
    best = run / "best.safetensors"
    if which == "best" and best.is_file():
        return best
    # unfinished checkpoints have other names than numbers
    found = [p for p in run.glob("checkpoints/*/generator.safetensors") if p.parent.name.isdecimal()]
    if not found:
        raise InputError(f"{run}: no best.safetensors and no finished checkpoint in this folder; is it a run folder?")
    return max(found, key=lambda p: int(p.parent.name))

"""MODEL of the command line: a run folder, a checkpoint in it, a model file or a junyanz checkpoint."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import InputError
from .junyanz import load_pth
from .patchgan import PatchGAN
from .unet import Unet
from .weights import Kind, load_network


def load_generator(path: str | Path, which: Literal["best", "latest"] = "best") -> tuple[Unet, dict[str, Any]]:
    """The generator of MODEL: a run folder, a checkpoint in it, a .safetensors file or a junyanz .pth.

    On the CPU and in eval mode. Of a run folder: best.safetensors, or the newest checkpoint where there is none or
    `which` is "latest". A .pth has no record but its architecture. Raises InputError for what is no model.
    """
    path = model_path(path)
    if which not in ("best", "latest"):
        raise InputError(f"which = {which!r}: allowed are best, latest")
    best = path / "best.safetensors"
    return cast(tuple[Unet, dict[str, Any]], _load(best if which == "best" and best.is_file() else path, "generator"))


def load_discriminator(path: str | Path) -> tuple[PatchGAN, dict[str, Any]]:
    """The discriminator of a checkpoint, of a run folder's newest, of a .safetensors file or of a junyanz .pth."""
    return cast(tuple[PatchGAN, dict[str, Any]], _load(model_path(path), "discriminator"))


def model_path(model: object) -> Path:
    """MODEL as a path; InputError for what is none, as a model that is loaded already."""
    if isinstance(model, str | os.PathLike):
        return Path(model)
    raise InputError(f"model is of type {type(model).__name__}: give the path of a run folder or of a model's file")


def _load(path: Path, kind: Kind) -> tuple[Unet | PatchGAN, dict[str, Any]]:
    if path.is_dir():
        own = path / f"{kind}.safetensors"  # where the folder is one checkpoint
        path = own if own.is_file() else _of_newest_checkpoint(path, kind)
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model is a run folder, a .safetensors file or a junyanz .pth")
    if path.suffix == ".pth":
        net = load_pth(path)
        found = "generator" if isinstance(net, Unet) else "discriminator"
        if found != kind:
            raise InputError(f"{path} is a {found}; a {kind} is wanted here")
        return net, {"network": kind, "architecture": dataclasses.asdict(net.config)}
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: unknown kind of model; allowed are a run folder, .safetensors and junyanz .pth")
    return load_network(path, kind)


def _of_newest_checkpoint(run: Path, kind: Kind) -> Path:
    # unfinished checkpoints have other names than numbers
    found = [p for p in run.glob(f"checkpoints/*/{kind}.safetensors") if p.parent.name.isdecimal()]
    if not found:
        best = "no best.safetensors and " if kind == "generator" else ""
        raise InputError(f"{run}: {best}no finished checkpoint with a {kind} in this folder; is it a run folder?")
    return max(found, key=lambda p: int(p.parent.name))

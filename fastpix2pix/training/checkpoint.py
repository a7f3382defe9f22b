"""Checkpoints: everything a bit-exact resume needs, in safetensors and JSON, complete or absent.

RUN/checkpoints/<step>/
    generator.safetensors       the model (the average where there is one), loadable by every command
    discriminator.safetensors
    training.safetensors        Adam's moments, random states, image pool, raw generator beside an average
    training.json               counters, loss scale, best validation so far
    process-<rank>.safetensors  of processes 1, 2, ...: random states, image pool
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from ..errors import InputError
from ..files import remove_folder, written_aside
from ..model import PatchGAN, Unet
from ..model.weights import load_network, load_state, save_network
from .state import State

FORMAT = 1
_LEFT = re.compile(r"\.(?P<step>\d+)(?=\.)(?P<aside>\.tmp-\d+-\d+)?(?P<old>\.old)?")  # names of files.py
_OWN = ("rng/", "pool/", "loop/")  # what differs from process to process


def save(
    folder: Path,  # checkpoints/<step>
    state: State,
    counters: dict[str, Any],  # JSON-ready, the loop's own
    tensors: dict[str, Tensor],  # the loop's own
    record: dict[str, Any],  # for the model file
    others: Sequence[dict[str, Tensor]] = (),  # own_tensors of processes 1, 2, ...
) -> None:
    """Write a checkpoint, complete or not at all; EnvironmentFailed where the disk fails."""
    with written_aside(folder) as aside:
        aside.mkdir()
        save_network(aside / "generator.safetensors", state.model, **record)
        if state.discriminator is not None:
            save_network(aside / "discriminator.safetensors", state.discriminator, step=record["step"])
        (aside / "training.safetensors").write_bytes(serialise(_contiguous(_all_tensors(state, tensors))))
        for rank, own in enumerate(others, 1):
            (aside / f"process-{rank}.safetensors").write_bytes(serialise(own))
        meta = {"format": FORMAT, "counters": counters, "pool": len(state.pool.images)}
        (aside / "training.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for file in aside.iterdir():
            _sync(file)


def own_tensors(state: State, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a process has that the others have not, of what `save` saves; on the CPU."""
    return _contiguous({k: t for k, t in _all_tensors(state, tensors).items() if k.startswith(_OWN)})


def restore(folder: Path, state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load a checkpoint into `state`, in place; returns the loop's counters and tensors."""
    try:
        meta = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "training.safetensors")
        if state.group.rank:
            tensors |= load_file(folder / f"process-{state.group.rank}.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        older = "remove this folder to go on from the one before it"
        raise InputError(f"{folder}: incomplete or damaged checkpoint ({error}); {older}") from error
    try:
        if meta["format"] != FORMAT:
            raise InputError(f"{folder}: checkpoint format {meta['format']}, this version reads {FORMAT}")
        _load_network(folder / "generator.safetensors", "generator", state.model)
        if state.discriminator is not None:
            _load_network(folder / "discriminator.safetensors", "discriminator", state.discriminator)
        _restore_tensors(state, tensors, meta, folder)
    except KeyError as error:
        raise InputError(
            f"{folder}: the checkpoint has no {error}, which this run needs; resume with the version that wrote it "
            "(config.json), or start a new run"
        ) from error
    return meta["counters"], {name.removeprefix("loop/"): t for name, t in tensors.items() if name.startswith("loop/")}


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None."""
    found = all_checkpoints(run)
    return found[-1] if found else None


def all_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if re.fullmatch(r"\d+", p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name))


def tidy(run: Path) -> None:
    """Remove what saving and pruning leave in checkpoints/ when they are killed."""
    folder = run / "checkpoints"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not (parts := _LEFT.fullmatch(path.name)):
            continue
        replaced = folder / parts["step"]
        if parts["aside"] and parts["old"] and not replaced.exists():  # killed between the two renames of a replacement
            os.replace(path, replaced)
        else:
            shutil.rmtree(path, ignore_errors=True)


def prune(run: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for old in all_checkpoints(run)[:-keep]:
        remove_folder(old)


def _all_tensors(state: State, loop: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = state.tensors()
    if state.average is not None:
        tensors |= {f"generator/{key}": t for key, t in state.generator.state_dict().items()}
    tensors |= {f"pool/{i}": image for i, image in enumerate(state.pool.images)}
    return tensors | {f"loop/{name}": t for name, t in loop.items()}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}


def _restore_tensors(state: State, tensors: dict[str, Tensor], meta: dict[str, Any], folder: Path) -> None:
    if state.average is not None:
        raw = {k.removeprefix("generator/"): t for k, t in tensors.items() if k.startswith("generator/")}
        load_state(state.generator, raw, str(folder / "training.safetensors"))
    state.pool.images = [tensors[f"pool/{i}"].to(state.device) for i in range(meta["pool"])]
    state.load_tensors(tensors, meta["counters"]["step"])


def _load_network(path: Path, network: Literal["generator", "discriminator"], into: Unet | PatchGAN) -> None:
    saved, _ = load_network(path, network)
    load_state(into, saved.state_dict(), str(path))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

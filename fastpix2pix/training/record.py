"""config.json of a run folder: what the run is, and whether a continuation still is the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .. import __version__
from ..config import Data, Generator, Train, by_owner, from_record
from ..data.pairs import Pair
from ..errors import InputError
from ..files import write_text

FORMAT = 1
Resume = bool | Literal["auto"]

# what may differ between a run and its continuation: nothing that the weights, the order or the jitter depend on
CHANGEABLE = frozenset(
    (
        *(
            "epochs",
            "schedule",
            "decay_epochs",
            "lr",
            "device",
            "max_steps",
            "max_minutes",
            "log_steps",
            "validate_epochs",
        ),
        *(
            "checkpoint_minutes",
            "checkpoint_steps",
            "keep_checkpoints",
            "check_data",
            "tensorboard",
            "profile",
            "loader",
            "workers",
            "tune_minutes",
        ),
    )
)


def make_record(config: Train, data: Path, pairs: Sequence[Pair], processes: int = 1) -> dict[str, Any]:
    """What config.json holds; written before the first step."""
    import torch

    names = "\n".join(p.name for p in pairs)
    return {
        "format": FORMAT,
        "data": str(data),
        "pairs": len(pairs),
        "names": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
        "processes": processes,
        "train": dataclasses.asdict(config),
        "versions": {"fastpix2pix": __version__, "torch": torch.__version__},
    }


def write_record(run: Path, record: dict[str, Any]) -> None:
    """RUN/config.json"""
    write_text(run / "config.json", json.dumps(record, indent=1) + "\n")


def read_record(run: Path) -> dict[str, Any]:
    """RUN/config.json; InputError where there is none or it is damaged."""
    path = run / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise InputError(f"{path}: record format {record['format']}, this version reads {FORMAT}")
        known = {key: record[key] for key in ("train", "pairs", "names", "data")}
        return {"processes": record.get("processes", 1), **known}
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{run} is no run folder (it has no config.json): nothing to resume there") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the record of a run ({error})") from error


def recorded_config(run: Path) -> Train:
    """The options of the run in a folder."""
    return from_record(Train, read_record(run)["train"])


def replace_options(config: Train, options: dict[str, Any]) -> Train:
    """`config` with flat options (fields of Train, Generator, Data) put in their places."""
    parts = by_owner(options, Train, Generator, Data)
    generator = dataclasses.replace(config.generator, **parts[Generator])
    data = dataclasses.replace(config.data, **parts[Data])
    return dataclasses.replace(config, generator=generator, data=data, **parts[Train])


def resumes(run: Path, resume: Resume) -> bool:
    """Whether a run is continued; auto: where the folder holds one. InputError: another word."""
    if resume not in (True, False, "auto"):
        raise InputError(f"resume = {resume!r}: allowed are True, False and 'auto' (where the folder holds a run)")
    return (run / "config.json").exists() if resume == "auto" else bool(resume)


def check_new(run: Path) -> None:
    """Refuse a folder that holds something already."""
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    raise InputError(f"{run} exists and is not an empty folder: add --resume to continue it, or choose another --out")


def check_same_run(run: Path, record: dict[str, Any]) -> list[str]:
    """Refuse what would make the continuation another run; returns one line per option that changed."""
    before = read_record(run)
    if (record["pairs"], record["names"]) != (before["pairs"], before["names"]):
        raise InputError(
            f"{record['data']}: the {record['pairs']} pairs there are not the {before['pairs']} that the run in {run} "
            "was started with; resume needs the same pairs, or start a new run"
        )
    if record["processes"] != before["processes"]:
        raise InputError(
            f"{record['processes']} processes, but the run in {run} was started with {before['processes']}: a step "
            "takes a batch of each, so resume needs as many (torchrun --nproc-per-node), or start a new run"
        )
    was = dataclasses.asdict(from_record(Train, before["train"]))  # options that are newer than the run have defaults
    changed = _differences(was, record["train"])
    if wrong := [f"{name} (was {old!r}, now {new!r})" for name, old, new in changed if name not in CHANGEABLE]:
        raise InputError(f"cannot change on resume: {', '.join(wrong)}; start a new run with another --out")
    return [f"changed on resume: {name} {old} -> {new}" for name, old, new in changed]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for name, new in now.items():
        old = before.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new)
        elif old != new:
            found.append((name, old, new))
    return found

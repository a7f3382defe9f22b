"""The file of a built engine and its sidecar FILE.json, which says what the engine is and detects damage.

Engines hold native code. The sidecar tells a damaged or unsuitable file from a good one, not a malicious one: load only
engines you built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..config import Form, Generator, Modes, from_record
from ..errors import InputError
from ..files import write_text, written_aside

FORMAT = 1
SUFFIX = ".engine"
SUFFIXES = (SUFFIX, ".plan")  # of files that are taken for engines


@dataclass(frozen=True)
class Machine:
    """What a plan has to fit."""

    version: str  # of the target's library
    capability: str  # of the GPU: sm80
    gpu: str  # its name


@dataclass(frozen=True)
class Plan:
    """The sidecar: everything about an engine that its bytes do not say."""

    engine: str  # SHA-256 of the engine file
    size: int  # of the engine file, bytes
    model: str  # SHA-256 of architecture and weights (model_hash)
    record: dict[str, Any]  # of the model file
    modes: Modes
    form: Form
    sizes: tuple[tuple[int, int], ...]  # (height, width) in pixels: one, or smallest, usual and largest
    batches: tuple[int, ...]  # images of a call: one number, or smallest, usual and largest
    target: str  # tensorrt or tensorrt-rtx
    version: str  # of the target's library
    capabilities: tuple[str, ...]  # GPUs it runs on: sm80, ...
    gpu: str | None  # name of the GPU that a TensorRT plan was measured on; None: any of the capabilities
    stripped: bool  # has no weights
    parity: dict[str, Any]  # figures of the gate
    latency: dict[str, Any] | None = None  # of one call; None until it first ran on a GPU
    builder: str = __version__  # version of this package

    def __post_init__(self) -> None:
        if len(self.sizes) not in (1, 3) or len(self.batches) not in (1, 3):
            raise InputError("sizes and batches have one entry or three")

    @property
    def generator(self) -> Generator:
        """The architecture."""
        return from_record(Generator, self.record["architecture"])

    def rebuild(self, path: Path) -> str:
        """The command that makes such an engine again."""
        modes, form = self.modes, self.form
        options = {
            "target": self.target,
            "for": ",".join(self.capabilities) if self.target == "tensorrt-rtx" else "",
            "precision": form.precision,
            "norm-stats": modes.norm_stats,
            "noise": modes.noise,
            "seed": modes.seed or "",
            "size": ",".join(f"{height}x{width}" for height, width in self.sizes),
            "batch": ",".join(map(str, self.batches)),
            "pixels": form.pixels if form.pixels != "float" else "",
        }
        given = " ".join(f"--{name} {value}" for name, value in options.items() if value != "")
        return f"fastpix2pix build MODEL {given} --overwrite --out {path}"

    def mismatches(self, here: Machine, model: str | None = None) -> list[str]:
        """Every reason why the engine does not run here, or is not of the model with this hash."""
        found = []
        if model is not None and model != self.model:
            found.append(f"it was built from another model ({self.model[:12]}, this one is {model[:12]})")
        if self.version != here.version:
            found.append(f"it was built by version {self.version} of {self.target}, here is {here.version}")
        if here.capability not in self.capabilities:
            found.append(f"it was built for {', '.join(self.capabilities)}, this GPU is {here.capability}")
        if self.gpu not in (None, here.gpu):
            found.append(f"it was built on {self.gpu}, this GPU is {here.gpu}")
        if self.stripped:
            found.append("it was built with strip and has no weights")
        return found

    def check(self, path: Path, here: Machine, model: str | None = None) -> None:
        """Refuse an engine that does not fit: InputError with every reason and the command that mends it."""
        if reasons := self.mismatches(here, model):
            here_too = replace(self, capabilities=(here.capability,))
            raise InputError(f"{path}: {'; '.join(reasons)}. Build it again: {here_too.rebuild(path)}")


def sidecar(path: Path) -> Path:
    """FILE.json of FILE."""
    return path.with_name(path.name + ".json")


def kernels(path: Path) -> Path:
    """FILE.kernels of FILE: what TensorRT-RTX compiled for the GPU when it first ran there."""
    return path.with_name(path.name + ".kernels")


def model_hash(net: nn.Module) -> str:
    """SHA-256 of a network's architecture and weights: the same for every kind of file they come from."""
    digest = hashlib.sha256(json.dumps(asdict(net.config), sort_keys=True).encode())  # type: ignore[call-overload]
    for name, tensor in sorted(net.state_dict().items()):
        plain = tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_plan(path: Path, engine: bytes, **values: Any) -> Plan:
    """Write an engine and its sidecar; `values` are the fields of Plan that are not figures of `engine`.

    Where one of the two fails, neither stays. Kernels compiled for an engine of that name are removed.
    """
    plan = Plan(engine=hashlib.sha256(engine).hexdigest(), size=len(engine), **values)
    with written_aside(sidecar(path)) as aside:
        aside.write_text(_json(plan), encoding="utf-8")
        with written_aside(path) as engine_aside:
            engine_aside.write_bytes(engine)
    kernels(path).unlink(missing_ok=True)
    return plan


def update_plan(path: Path, plan: Plan, **changes: Any) -> Plan:
    """Write the sidecar again with some fields changed."""
    plan = replace(plan, **changes)
    write_text(sidecar(path), _json(plan))
    return plan


def read_plan(path: str | Path) -> Plan:
    """The plan of an engine file whose bytes and sidecar are those that were written; read_engine gives the bytes.

    Raises InputError in one line for a missing, foreign, truncated or changed file.
    """
    return read_engine(path)[0]


def read_engine(path: str | Path) -> tuple[Plan, bytes]:
    """The plan and the bytes of an engine file. See read_plan."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    beside = sidecar(path)
    if not beside.is_file():
        raise InputError(f"{path}: no {beside.name} beside it; engines come from `fastpix2pix build`, copy both files")
    plan = _parse(beside)
    engine = path.read_bytes()
    if len(engine) != plan.size:
        what = "cut short" if len(engine) < plan.size else "not the engine of its sidecar"
        raise InputError(f"{path}: {len(engine)} bytes of {plan.size}: {what}; copy it again, or {plan.rebuild(path)}")
    if hashlib.sha256(engine).hexdigest() != plan.engine:
        raise InputError(f"{path}: its bytes were changed after the build; copy it again, or {plan.rebuild(path)}")
    return plan, engine


def _json(plan: Plan) -> str:
    content = {"format": FORMAT, **asdict(plan)}
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(beside: Path) -> Plan:
    again = "copy it again, or build the engine again"
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
        written, version = content.pop("checksum"), content["format"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{beside}: not the sidecar of an engine, or damaged ({error}); {again}") from None
    if version != FORMAT:
        raise InputError(f"{beside}: format {version}, this version reads {FORMAT}; build the engine again")
    if written != _checksum(content):
        raise InputError(f"{beside}: changed after the build; {again}")
    del content["format"]
    try:
        if names := {f.name for f in fields(Plan)} ^ set(content):
            raise InputError(f"fields {', '.join(sorted(names))}")
        content["modes"], content["form"] = from_record(Modes, content["modes"]), from_record(Form, content["form"])
        content["sizes"] = tuple((height, width) for height, width in content["sizes"])
        for name in ("batches", "capabilities"):
            content[name] = tuple(content[name])
        plan = Plan(**content)
        _ = plan.generator
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{beside}: written by another version ({error}); build the engine again") from None
    return plan

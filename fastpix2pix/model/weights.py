"""Model files: safetensors whose metadata holds one JSON record with everything needed to build the network again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import __version__
from ..config import Discriminator, Generator, Modes, from_record
from ..errors import InputError
from ..files import written_aside
from .layers import init_weights
from .patchgan import PatchGAN
from .unet import Unet, check_modes

__all__ = [
    "check_state", "empty_network", "infer_config", "init_weights", "load_network", "load_state", "read_record",
    "save_network",
]  # fmt: skip

KEY = "fastpix2pix"  # of the metadata
FORMAT = 1
SHOWN = 4  # names per kind of difference
Kind = Literal["generator", "discriminator"]
_KINDS: dict[str, tuple[type, Callable[[Any], Unet | PatchGAN]]] = {
    "generator": (Generator, Unet),
    "discriminator": (Discriminator, PatchGAN),
}


def save_network(path: str | Path, net: Unet | PatchGAN, **record: Any) -> None:
    """Write a model file. `record` (direction, modes, step, ...) is JSON for the metadata; None is left out."""
    full = {name: value for name, value in record.items() if value is not None}
    if isinstance(full.get("modes"), Modes):
        full["modes"] = dataclasses.asdict(full["modes"])
    full |= {
        "format": FORMAT,
        "network": "generator" if isinstance(net, Unet) else "discriminator",
        "architecture": dataclasses.asdict(net.config),
        "versions": {"fastpix2pix": __version__, "torch": torch.__version__},
    }
    # safetensors refuses channels-last. Its save_file would leave a file only the owner can read.
    state = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in net.state_dict().items()}
    content = safetensors.torch.save(state, metadata={KEY: json.dumps(full)})
    with written_aside(Path(path)) as aside:
        aside.write_bytes(content)


def read_record(path: str | Path) -> dict[str, Any]:
    """The record of a model file, without its tensors. Raises InputError naming the file where it is none of ours."""
    return _open(Path(path), tensors=False)[0]


def load_network(path: str | Path, network: Kind | None = None) -> tuple[Unet | PatchGAN, dict[str, Any]]:
    """The network of a model file, on the CPU and in eval mode, and its record.

    `network` is what the caller needs; the other kind is refused. A generator gets the recorded modes, else Modes().
    """
    path = Path(path)
    record, state = _open(path)
    kind = record["network"]
    if network not in (None, kind):
        raise InputError(f"{path} is a {kind}; a {network} is wanted here")
    config_type, build = _KINDS[kind]
    try:
        config = from_record(config_type, record["architecture"])
        modes = from_record(Modes, record.get("modes") or {})
        if isinstance(config, Generator):
            check_modes(config, modes)
        with torch.device("meta"):
            shapes = build(config).state_dict()
    except (InputError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged record: {error}") from error
    check_state(config, shapes, state, str(path))  # before any memory is taken on the record's word
    net = empty_network(config)
    if isinstance(net, Unet):
        net.modes = modes
    load_state(net, state, str(path))
    return net, record


def load_state(net: Unet | PatchGAN, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into the network's own tensors (addresses and memory formats stay); all of it or, on a mismatch,
    nothing and an InputError with the difference."""
    own = net.state_dict()
    check_state(net.config, own, state, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def check_state(
    config: Generator | Discriminator, own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str
) -> None:
    """Refuse a state that does not fit `own`, the state of a network of `config`, with a short readable difference."""
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    wrong = [
        f"{name}: file {_shape(state[name])}, model {_shape(tensor)}"
        for name, tensor in own.items()
        if name in state and _shape(state[name]) != _shape(tensor)
    ]
    if not (missing or unexpected or wrong):
        return
    lines = [f"{source} does not fit the model"]
    if summary := _summary(infer_config(state), config):
        lines.append(f"  {summary}")
    for title, names, separator in (
        ("missing", missing, ", "),
        ("unexpected", unexpected, ", "),
        ("wrong shape", wrong, "\n    "),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {title} ({len(names)}): {separator.join(names[:SHOWN])}{more}")
    raise InputError("\n".join(lines))


def infer_config(state: Mapping[str, Tensor]) -> Generator | Discriminator | None:
    """The architecture a state belongs to, as far as names and shapes tell (not dropout); None for a foreign state."""
    try:
        if "down.0.conv.weight" in state:
            return _infer_generator(state)
        return _infer_discriminator(state)
    except (InputError, KeyError, IndexError, ValueError):
        return None


def empty_network(config: Generator | Discriminator) -> Unet | PatchGAN:
    """A network in eval mode whose tensors are allocated, not initialised: to be filled by load_state."""
    with torch.device("meta"):
        net = Unet(config) if isinstance(config, Generator) else PatchGAN(config)
    return net.to_empty(device="cpu").eval()


def _infer_generator(state: Mapping[str, Tensor]) -> Generator:
    depth = _count(state, r"(?:down|up)\.(\d+)\.")
    ngf, in_channels = state["down.0.conv.weight"].shape[:2]
    last, second = state[f"up.{depth - 1}.conv.weight"], state["up.1.conv.weight"]
    resize = last.shape[2] == 3
    # weights are (in, out, ...) of a transposed and (out, in, ...) of an ordinary convolution
    kind = "unet" if second.shape[1 if resize else 0] == 16 * ngf else "encoder_decoder"
    out = last.shape[0 if resize else 1]
    up = "resize" if resize else "transposed"
    return Generator(kind, depth, in_channels, out, ngf, _norm(state, "down.1"), up=up)  # type: ignore[arg-type]


def _infer_discriminator(state: Mapping[str, Tensor]) -> Discriminator:
    blocks = _count(state, r"blocks\.(\d+)\.")
    ndf, in_channels, kernel = state["blocks.0.conv.weight"].shape[:3]
    return Discriminator(in_channels, ndf, 0 if kernel == 1 else blocks - 2, _norm(state, "blocks.1"))


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """1 + the largest number in the names, which a missing tensor does not change."""
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))


def _norm(state: Mapping[str, Tensor], block: str) -> Literal["batch", "instance", "none"]:
    if f"{block}.norm.weight" in state:
        return "batch"
    return "instance" if f"{block}.conv.bias" in state else "none"


def _summary(file: Generator | Discriminator | None, model: Generator | Discriminator) -> str:
    """One line on what the file is, where that can be told and differs."""
    if file is None:
        return ""
    kinds = {Generator: "generator", Discriminator: "discriminator"}
    if type(file) is not type(model):
        return f"the file is a {kinds[type(file)]}; the model asked for is a {kinds[type(model)]}"
    fields = [f.name for f in dataclasses.fields(file) if f.name != "dropout"]
    differs = [f"{name} {getattr(model, name)}" for name in fields if getattr(file, name) != getattr(model, name)]
    if not differs:
        return ""
    what = ", ".join(f"{name} {getattr(file, name)}" for name in fields)
    return f"the file is a {kinds[type(file)]} of {what}; the model asked for has {', '.join(differs)}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _open(path: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of a model file; every way in which it can be bad becomes one line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            state = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file, or damaged ({error}); copy it again") from error
    if text is None:
        raise InputError(f"{path}: a safetensors file without a {KEY} record; only models saved by {KEY} can be loaded")
    try:
        record = json.loads(text)
        version = record["format"]
        if version != FORMAT:
            raise InputError(f"{path}: format {version}, this version reads {FORMAT}; update {KEY}")
        if record["network"] not in _KINDS or not isinstance(record["architecture"], dict):
            raise KeyError("network, architecture")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged record ({type(error).__name__}: {error}); copy the file again") from error
    return record, state

"""Checkpoints of junyanz/pytorch-CycleGAN-and-pix2pix: U-Net generators and PatchGAN discriminators, both ways."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Discriminator, Generator
from ..errors import InputError
from ..files import written_aside
from .patchgan import PatchGAN
from .unet import Unet
from .weights import check_state, empty_network, infer_config, load_network, load_state, save_network

_LAYOUT: Literal["junyanz"] = "junyanz"  # of dropout, assumed of every .pth


def to_junyanz(net: Unet | PatchGAN) -> dict[str, Tensor]:
    """The state dict junyanz's code loads: its names, contiguous copies on the CPU.

    Raises InputError for what that code cannot build: resize up-blocks and the encoder-decoder.
    """
    if isinstance(net, Unet):
        config = net.config
        if config.up != "transposed":
            raise InputError(
                f"up = {config.up}: junyanz's generator has transposed convolutions only; keep .safetensors"
            )
        if config.kind != "unet":
            raise InputError(f"kind = {config.kind}: junyanz's generator is a U-Net with skips only; keep .safetensors")
        names = _generator_names(config.depth)
    else:
        names = _discriminator_names(len(net.blocks), pixel=net.config.n_layers == 0)
    theirs = {own: jz for jz, own in names.items()}
    state = {}
    for key, tensor in net.state_dict().items():
        module, name = key.rsplit(".", 1)
        state[f"{theirs[module]}.{name}"] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return state


def from_junyanz(
    state: Mapping[str, Tensor], source: str = "the state dict"
) -> tuple[Generator | Discriminator, dict[str, Tensor]]:
    """Architecture, inferred from names and shapes alone, and the state under our names (tensors are shared).

    A `module.` prefix is stripped, running statistics of old InstanceNorm files are dropped, a batch counter that old
    files lack is 0. The file does not tell the dropout layout: junyanz's is assumed. `source` is named in errors.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    names = _names(state, source)
    own: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, name = key.rpartition(".")
        statistic = name.startswith("running_") or name == "num_batches_tracked"
        if statistic and f"{module}.weight" not in state:
            continue  # of an affine-free InstanceNorm, which uses none
        own[f"{names[module]}.{name}" if module in names else key] = tensor
        if name == "running_var":
            own.setdefault(f"{names.get(module, module)}.num_batches_tracked", torch.zeros((), dtype=torch.int64))

    config = infer_config(own)
    if config is None or (isinstance(config, Generator) and (config.kind, config.up) != ("unet", "transposed")):
        raise _foreign(state, source)
    if isinstance(config, Generator):
        config = dataclasses.replace(config, dropout=_LAYOUT)
    with torch.device("meta"):
        shapes = (Unet(config) if isinstance(config, Generator) else PatchGAN(config)).state_dict()
    check_state(config, shapes, own, source)
    return config, own


def load_pth(path: str | Path) -> Unet | PatchGAN:
    """The network of a junyanz `<epoch>_net_G.pth` or `_net_D.pth`, on the CPU, in eval mode. Runs no pickled code."""
    path = Path(path)
    config, state = from_junyanz(_read(path), str(path))
    net = empty_network(config)
    load_state(net, state, str(path))
    return net


def save_pth(path: str | Path, net: Unet | PatchGAN) -> None:
    """Write a network as a plain state dict that junyanz's code loads."""
    state = to_junyanz(net)
    with written_aside(Path(path)) as aside, aside.open("wb") as file:
        torch.save(state, file)


def convert(src: str | Path, dst: str | Path, overwrite: bool = False) -> str:
    """Convert a model file between junyanz .pth and .safetensors; returns a line saying what it was."""
    src, dst = Path(src), Path(dst)
    if src.is_dir():
        raise InputError(
            f"{src} is a folder; of a run, convert {src / 'best.safetensors'}, of a checkpoint "
            f"{src / 'generator.safetensors'}"
        )
    if (src.suffix, dst.suffix) not in ((".pth", ".safetensors"), (".safetensors", ".pth")):
        raise InputError(f"{src} -> {dst}: allowed are .pth -> .safetensors and .safetensors -> .pth")
    if dst.exists() and not overwrite:
        raise InputError(f"{dst} exists; choose another name or give overwrite")
    note = ""
    if src.suffix == ".pth":
        net = load_pth(src)
        save_network(dst, net)
        if isinstance(net, Unet):
            note = f"; a .pth does not tell the dropout layout: {_LAYOUT} is assumed"
    else:
        net, record = load_network(src)
        save_pth(dst, net)
        lost: list[str] = [name for name in ("modes", "direction") if name in record]
        if isinstance(net, Unet) and net.config.dropout != _LAYOUT:
            lost.append(f"dropout layout (converted back it is {_LAYOUT})")
        if lost:
            note = f"; a .pth does not keep its {' and '.join(lost)}"
    return f"{src} -> {dst}: {_describe(net.config)}{note}"


def _describe(config: Generator | Discriminator) -> str:
    if isinstance(config, Generator):
        shape = f"{config.in_channels} -> {config.out_channels} channels, ngf {config.ngf}"
        return f"generator unet_{config.multiple}, {shape}, norm {config.norm}, dropout {config.dropout}"
    kind = "PixelGAN" if config.n_layers == 0 else f"PatchGAN n_layers {config.n_layers}"
    return f"discriminator {kind}, {config.in_channels} channels, ndf {config.ndf}, norm {config.norm}"


def _generator_names(depth: int) -> dict[str, str]:
    """Their module names -> ours. Their blocks are nested: each level is the submodule of the one outside it."""
    names = {"model.model.0": "down.0.conv", "model.model.3": f"up.{depth - 1}.conv"}
    level = "model.model.1.model"
    for k in range(1, depth - 1):
        up = f"up.{depth - 1 - k}"
        names |= {f"{level}.1": f"down.{k}.conv", f"{level}.2": f"down.{k}.norm"}
        names |= {f"{level}.5": f"{up}.conv", f"{level}.6": f"{up}.norm"}
        level += ".3.model"
    # the innermost has no norm between its convolutions
    return names | {f"{level}.1": f"down.{depth - 1}.conv", f"{level}.3": "up.0.conv", f"{level}.4": "up.0.norm"}


def _discriminator_names(blocks: int, pixel: bool) -> dict[str, str]:
    """Their module names -> ours: conv, LeakyReLU, then conv, norm, LeakyReLU in a row."""
    root = "net" if pixel else "model"
    names = {f"{root}.0": "blocks.0.conv"}
    for i in range(1, blocks):
        names |= {f"{root}.{3 * i - 1}": f"blocks.{i}.conv", f"{root}.{3 * i}": f"blocks.{i}.norm"}
    return names


def _names(state: Mapping[str, Tensor], source: str) -> dict[str, str]:
    """The table of names for the kind of network a state is of."""
    if any("conv_block" in key for key in state):
        raise InputError(f"{source}: resnet generators are not supported; unet only")
    if "model.model.0.weight" in state:
        return _generator_names(max(key.split(".").count("model") for key in state) - 1)
    pixel = "net.0.weight" in state
    if pixel or "model.0.weight" in state:
        last = max(int(match[1]) for key in state if (match := re.match(r"(?:model|net)\.(\d+)\.", key)))
        return _discriminator_names((last + 1) // 3 + 1, pixel)
    raise _foreign(state, source)


def _foreign(state: Mapping[str, Any], source: str) -> InputError:
    return InputError(
        f"{source}: neither a U-Net generator nor a PatchGAN discriminator of pytorch-CycleGAN-and-pix2pix; it holds "
        f"{_some(state)}"
    )


def _some(state: Mapping[str, Any]) -> str:
    keys = [str(key) for key in state]
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "") if keys else "nothing"


def _read(path: Path) -> dict[str, Tensor]:
    """A .pth's state dict, read without executing anything in it."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    plain = "a plain state dict is needed: torch.save(net.state_dict(), file)"
    with path.open("rb") as file:
        if not file.read(4).startswith((b"PK\x03\x04", b"\x80")):  # zip, and pickle for files older than torch 1.6
            raise InputError(f"{path}: empty or not a PyTorch file; {plain}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # damaged files raise nearly anything
        if "GLOBAL" in str(error) or "TorchScript" in str(error):
            raise InputError(f"{path}: holds Python objects or code, which are never run; {plain}") from error
        reason = "it is not a pickle torch reads" if isinstance(error, pickle.UnpicklingError) else _first_line(error)
        raise InputError(f"{path}: truncated or damaged ({reason}); copy it again") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}; {plain}")
    if others := {key: value for key, value in state.items() if not isinstance(value, Tensor)}:
        raise InputError(f"{path}: holds {_some(others)} that are not tensors; {plain}")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]

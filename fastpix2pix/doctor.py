"""What is installed, what is usable, what "auto" means here, and what to do about the rest."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import __version__
from .device import resolve_device, resolve_precision
from .errors import EnvironmentFailed
from .runtime.load import TABLE
from .runtime.tensorrt_library import missing

# module, what it is for, what to do where it is missing
_OPTIONAL = (
    ("nvidia.dali", "GPU image decoding (loader = dali)", "pip install 'fastpix2pix[cuda13]' (or cuda12)"),
    ("triton", "kernels of step = explicit", "pip install triton (Linux)"),
    ("torch.utils.tensorboard", "TensorBoard events of a run", "pip install tensorboard"),
    ("matplotlib", "loss curves of a run", "pip install matplotlib"),
    ("torchmetrics", "PSNR and SSIM", "pip install torchmetrics"),
    ("onnxscript", "the ONNX export of build", "pip install 'fastpix2pix[onnx]'"),
    ("av", "video", "pip install 'fastpix2pix[video]'"),
    ("onnxruntime", "ONNX files, and the comparison of build", "pip install 'fastpix2pix[onnx]'"),
)
_LIBRARIES = (
    ("tensorrt-rtx", "engines, built with or without a GPU"),
    ("tensorrt", "engines, built on the GPU they are for"),
)


def examine() -> dict[str, Any]:
    """JSON-ready: {"versions", "cores", "devices", "auto", "parts": [{"name", "for", "usable", "todo"}, ...],
    "backends": {name: reasons why it cannot run here}}."""
    device = resolve_device("auto")
    parts = [_part(*row) for row in _OPTIONAL] + [_library(*row) for row in _LIBRARIES]
    parts.append(_native(torch.version.cuda if device.type == "cuda" else None))
    dali = parts[0]["usable"]
    backend = "torch" if device.type == "cpu" else "torch, or triton for what tune --model found it faster for"
    return {
        "versions": {
            "fastpix2pix": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            **{name: _version(name) for name in ("numpy", "pillow", "safetensors", "tyro")},
        },
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": _devices(),
        "auto": {
            "device": str(device),
            "precision": resolve_precision("auto", device),
            "loader": "dali" if device.type == "cuda" and dali else "torch",
            "step": "modules" if device.type == "cpu" else "explicit where this GPU measures it faster, else modules",
            "backend": f"{backend}; of files made by build, what they were built for",
        },
        "parts": parts,
        "backends": {name: row.reasons(device) for name, row in TABLE.items()},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The findings of `examine` for a person."""
    text = [f"{name:14} {number or 'none'}" for name, number in found["versions"].items()]
    text.append(f"{'cores':14} {found['cores']}")
    text += [f"{'GPU ' + str(i):14} {d['name']}, {d['memory_gib']:.0f} GiB, sm_{d['capability']}"
             for i, d in enumerate(found["devices"])]  # fmt: skip
    if not found["devices"]:
        cuda = found["versions"]["cuda of torch"]
        todo = "check the driver with nvidia-smi" if cuda else "for a GPU, install a CUDA build of torch"
        text.append(f"{'GPU':14} none usable; {todo}")
    text += [f"auto {name:9} {choice}" for name, choice in found["auto"].items()]
    for part in found["parts"]:
        text.append(f"{part['name']:14} {'ok' if part['usable'] else 'missing: ' + part['todo']} ({part['for']})")
    for name, reasons in found["backends"].items():
        text.append(f"backend {name:12} {'cannot run here: ' + '; '.join(reasons) if reasons else 'ok'}")
    return text


def _devices() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        capability = f"{card.major}{card.minor}"
        found.append({"name": card.name, "memory_gib": card.total_memory / 2**30, "capability": capability})
    return found


def _part(module: str, purpose: str, todo: str) -> dict[str, Any]:
    try:
        importlib.import_module(module)
        problem = ""
    except Exception as error:  # a broken installation raises anything, and saying so is what this is for
        problem = "" if isinstance(error, ModuleNotFoundError) else f" (it is there but fails: {error})"
        return {"name": module.split(".")[-1], "for": purpose, "usable": False, "todo": todo + problem}
    return {"name": module.split(".")[-1], "for": purpose, "usable": True, "todo": ""}


def _library(target: str, purpose: str) -> dict[str, Any]:
    """TensorRT or TensorRT-RTX, which import under several names."""
    todo = missing(target)
    return {"name": target, "for": purpose, "usable": not todo, "todo": todo}


def _native(cuda_of_torch: str | None) -> dict[str, Any]:
    """The extension; with a GPU (cuda_of_torch is not None) it and torch have to be of one CUDA major version."""
    row = {"name": "frame runtime", "for": "video; built for the CPU", "usable": True, "todo": ""}
    try:
        from .runtime.native import CUDA
    except EnvironmentFailed as error:
        return row | {"for": "video", "usable": False, "todo": str(error)}
    if CUDA is not None:
        row["for"] = f"video; built for the CPU and CUDA {CUDA}"
    majors = [text and text.split(".")[0] for text in (CUDA, cuda_of_torch)]
    if cuda_of_torch is None or majors[0] == majors[1]:
        return row
    has = f"CUDA {CUDA}" if CUDA else "no CUDA"
    todo = f"it has {has}, torch has {cuda_of_torch}; for the GPU install again with nvcc {majors[1]} in CUDA_HOME"
    return row | {"usable": False, "todo": todo}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Device and precision names, resolved in one place for training, evaluation and inference."""

from __future__ import annotations

import re

import torch

from .errors import EnvironmentFailed, InputError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def resolve_device(name: str | torch.device) -> torch.device:
    """The torch device of "auto" (cuda where there is one, else cpu), "cpu", "cuda" or "cuda:1".

    Raises InputError for another name, EnvironmentFailed where the device asked for is not there.
    """
    name = str(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"device = {name!r}: allowed are auto, cpu, cuda and cuda:N with N the number of the GPU")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        todo = "check the driver with nvidia-smi" if torch.version.cuda else "install a CUDA build of torch"
        raise EnvironmentFailed(
            f"device = {name}: torch {torch.__version__} {build} and sees no GPU; {todo}, or use device = cpu"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise EnvironmentFailed(f"device = {name}: torch sees {count} CUDA device(s), cuda:0 to cuda:{count - 1}")
    return device


def with_index(device: torch.device) -> torch.device:
    """As its tensors name it: "cuda" alone is the current GPU, and equals the device of none of them."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def resolve_precision(
    precision: str,  # auto, fp32, bf16 or fp16
    device: torch.device,
) -> str:
    """fp32, bf16 or fp16: "auto" is bf16 on a CUDA device that has it, else fp16; fp32 on the CPU.

    Raises InputError for another name, EnvironmentFailed where bf16 is asked for and the GPU has none.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision = {precision!r}: allowed are {', '.join(PRECISIONS)}")
    if device.type != "cuda":
        return "fp32" if precision == "auto" else precision
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp16"
    if precision == "bf16" and not has_bf16:
        raise EnvironmentFailed(f"precision = bf16: {torch.cuda.get_device_name(device)} has no bf16; use fp16 or fp32")
    return precision

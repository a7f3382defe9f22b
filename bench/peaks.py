"""The peaks that floors are computed from: of a known card, or as measured here."""

from __future__ import annotations

import os

import torch

from .roofline import Device, named_device
from .timing import device_ms


def peaks_of(device: torch.device, sides: tuple[int, int]) -> Device:
    """The card's row of roofline.DEVICES, or what this device reaches: matmul and copy of matrices of these sides.

    Measured in half precision on a GPU, in fp32 on a CPU, with as many threads as torch has now: the best of several
    runs, for a floor.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if known := named_device(properties.name):
            return known
        name, processors, dtype = properties.name, properties.multi_processor_count, torch.bfloat16
    else:
        name, processors, dtype = "this CPU", os.cpu_count() or 1, torch.float32
    side, wide = sides
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    matmul = device_ms([lambda: torch.mm(a, b)] * 6, device).fastest
    source = torch.randn(wide, wide, device=device)
    target = torch.empty_like(source)
    copy = device_ms([lambda: target.copy_(source)] * 6, device).fastest
    what = f"measured here: {str(dtype)[6:]} matmul of {side} cubed, copy of {source.nbytes >> 20} MiB"
    if device.type != "cuda":
        what += f", {torch.get_num_threads()} threads"
    return Device(name, 2 * side**3 / matmul / 1e9, 2 * source.nbytes / copy / 1e9, processors, what)

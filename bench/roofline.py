"""What a device allows: its peaks, and the least time that a number of operations and bytes can take."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Peaks of one GPU."""

    name: str
    tflops: float  # dense half-precision products with fp32 accumulation
    tb_s: float  # device memory
    processors: int  # streaming multiprocessors
    source: str


NODE_US = 2.0  # a dependent kernel inside a CUDA graph: an assumption until measured

DEVICES = {
    "A100": Device("A100", 312, 2.0, 108, "NVIDIA A100 data sheet, 80 GB SXM"),
    "H100": Device("H100", 990, 3.35, 132, "NVIDIA H100 data sheet, SXM"),
    "H200": Device("H200", 790, 4.3, 132, "8192 cubed bf16 matmul and device copy, as measured on one"),
    "RTX 4090": Device("RTX 4090", 165, 1.008, 128, "NVIDIA Ada GPU architecture paper"),
    "RTX 5090": Device("RTX 5090", 209.5, 1.792, 170, "NVIDIA RTX Blackwell GPU architecture paper"),
    "L4": Device("L4", 121, 0.3, 60, "NVIDIA L4 data sheet"),
    "Orin": Device("AGX Orin", 42.6, 0.2048, 16, "NVIDIA Jetson AGX Orin series technical brief"),
}


def compute_us(flops: float, device: Device) -> float:
    """Time of the operations at the peak."""
    return flops / device.tflops / 1e6


def memory_us(bytes_: float, device: Device) -> float:
    """Time of the bytes at the peak."""
    return bytes_ / device.tb_s / 1e6


def floor_us(flops: float, bytes_: float, device: Device) -> float:
    """The longer of the two: no implementation is faster."""
    return max(compute_us(flops, device), memory_us(bytes_, device))

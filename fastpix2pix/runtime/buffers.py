"""Input and output of an exported generator: the shapes and types its form gives them, and the refusal of others."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Form
from ..errors import InputError
from .engine import INPUT, OUTPUT, Layout


def buffer_dtype(form: Form) -> torch.dtype:
    """Of input and output."""
    return torch.uint8 if form.pixels == "uint8" else torch.float32


def buffer_layout(form: Form) -> Layout:
    """Of a picture in them."""
    return "nhwc" if form.pixels == "uint8" else "nchw"


def buffer_shape(form: Form, images: int, height: int, width: int, channels: int) -> tuple[int, int, int, int]:
    """Of a batch, contiguous in the order of its axes."""
    return (images, height, width, channels) if form.pixels == "uint8" else (images, channels, height, width)


def check_buffers(
    form: Form,
    input: Tensor,
    output: Tensor,
    channels: tuple[int, int],  # of input and output
    device: torch.device,
) -> tuple[int, int, int]:
    """(images, height, width) of a caller's two buffers; InputError where they are not what a form takes."""
    if input.ndim != 4:
        raise InputError(f"{INPUT} of shape {list(input.shape)}: four axes are wanted")
    images, *rest = input.shape
    height, width = rest[:2] if form.pixels == "uint8" else rest[1:]
    for name, tensor, count in ((INPUT, input, channels[0]), (OUTPUT, output, channels[1])):
        shape, dtype = buffer_shape(form, images, height, width, count), buffer_dtype(form)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            given = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise InputError(f"{name} {given}: the engine takes {list(shape)} {dtype} on {device}")
        if not tensor.is_contiguous():
            raise InputError(f"{name} is not contiguous in the order of its axes")
    return images, height, width

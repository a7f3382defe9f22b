"""A generator as a function of images: PIL, uint8 arrays and float tensors of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..config import Modes
from ..data.images import MAX_PIXELS, as_array, to_8_bit, to_uint8, to_unit
from ..errors import InputError
from .engine import Engine
from .padding import pad_to_multiple

T = TypeVar("T", Image.Image, NDArray[np.uint8], Tensor)


class Translator:
    """`g(image)`: the same kind comes back as was given, with the model's output channels and the same size.

    - PIL image of any mode, converted as image files are (gray expanded, alpha dropped, 16-bit gray scaled), but not
      turned upright by EXIF.
    - uint8 array [H, W], [H, W, C] or [N, H, W, C]; for a model that takes 3 channels, 1 is expanded and the alpha of
      4 is dropped. [H, W] comes back as [H, W] from a model of one output channel, else as [H, W, C].
    - float tensor [C, H, W] or [N, C, H, W] in [-1, 1]; comes back on its device, in its dtype.

    Height and width are any number of pixels >= 1: the picture is padded by reflection to the multiple that the model's
    depth needs and cropped back, and the padded pixels count in image statistics. Images are numbered over all calls
    (`count`): with random noise the same seed gives the same sequence of pictures.

    Raises InputError for another type, dtype, rank or number of channels, and above data.images.MAX_PIXELS.
    """

    def __init__(
        self, engine: Engine, modes_source: Mapping[str, str] | None = None, record: Mapping[str, Any] | None = None
    ) -> None:
        self.engine = engine
        self.modes_source = dict(modes_source or {"norm_stats": "given", "noise": "given"})
        self.record = dict(record or {})
        self.count = 0  # images translated so far; set to 0 to start the sequence of random noise again

    @property
    def modes(self) -> Modes:
        """What the generator normalises with and whether its dropout is on."""
        return self.engine.modes

    def describe(self) -> dict[str, Any]:
        """Engine, channels, multiple and modes with their sources, JSON-ready."""
        engine, modes = self.engine, self.modes
        return {
            **engine.describe(),
            "in_channels": engine.in_channels,
            "out_channels": engine.out_channels,
            "multiple": engine.multiple,
            "norm_stats": modes.norm_stats,
            "noise": modes.noise,
            "seed": modes.seed,
            "modes_source": dict(self.modes_source),
        }

    def __call__(self, image: T) -> T:
        if isinstance(image, Image.Image):
            return self._pil(image)
        if isinstance(image, np.ndarray):
            return self._array(image)
        if isinstance(image, Tensor):
            return self._tensor(image)
        raise InputError(f"{type(image).__name__} given: allowed are a PIL image, a uint8 array or a float tensor")

    def _pil(self, image: Image.Image) -> Image.Image:
        channels = self.engine.out_channels
        if channels not in (1, 3, 4):
            raise InputError(f"PIL image given: the model makes {channels} channels, PIL has 1, 3 or 4; give an array")
        out = self._array(as_array(to_8_bit(image), self.engine.in_channels))
        return Image.fromarray(out[:, :, 0] if channels == 1 else out)

    def _array(
        self,
        image: NDArray[np.uint8],  # [H, W], [H, W, C] or [N, H, W, C]
    ) -> NDArray[np.uint8]:
        given = f"array {list(image.shape)} of {image.dtype}"
        if image.dtype != np.uint8:
            raise InputError(f"{given}: arrays are uint8 in 0..255; give floats as a torch tensor in [-1, 1]")
        if image.ndim not in (2, 3, 4):
            raise InputError(f"{given}: allowed are [H, W], [H, W, C] and [N, H, W, C]")
        batch = image[None, :, :, None] if image.ndim == 2 else image[None] if image.ndim == 3 else image
        want, has = self.engine.in_channels, batch.shape[-1]
        if want == 3 and has == 1:
            batch = np.repeat(batch, 3, axis=-1)
        elif want == 3 and has == 4:
            batch = batch[..., :3]
        elif has != want:
            also = " (or 1, expanded, or 4, alpha dropped)" if want == 3 else ""
            raise InputError(f"{given}: {has} channels; the model takes {want}{also}, as the last axis")
        batch = np.require(batch, requirements=["C", "W"])  # torch warns about read-only memory
        out = self._run(torch.from_numpy(batch).permute(0, 3, 1, 2), given).permute(0, 2, 3, 1).cpu().numpy()
        out = np.ascontiguousarray(out)
        if image.ndim == 4:
            return out
        return out[0, :, :, 0] if image.ndim == 2 and out.shape[-1] == 1 else out[0]

    def _tensor(
        self,
        image: Tensor,  # [C, H, W] or [N, C, H, W] float in [-1, 1]
    ) -> Tensor:
        given = f"tensor {list(image.shape)} of {image.dtype}"
        if not image.is_floating_point():
            raise InputError(f"{given}: tensors are float in [-1, 1] (x / 127.5 - 1); give uint8 as an array [H, W, C]")
        if image.ndim not in (3, 4):
            raise InputError(f"{given}: allowed are [C, H, W] and [N, C, H, W]")
        batch = image[None] if image.ndim == 3 else image
        if batch.shape[1] != self.engine.in_channels:
            raise InputError(
                f"{given}: {batch.shape[1]} channels; the model takes {self.engine.in_channels}, as the axis before H"
            )
        out = self._run(batch.detach().float(), given).to(image.device, image.dtype)
        return out[0] if image.ndim == 3 else out

    def _run(
        self,
        batch: Tensor,  # [N, C, H, W] uint8, or float32 in [-1, 1]
        given: str,  # for the errors
    ) -> Tensor:  # the same dtype, on the engine's device
        if 0 in batch.shape:
            raise InputError(f"{given}: has no pixels")
        height, width = batch.shape[-2:]
        if height * width > MAX_PIXELS:
            raise InputError(f"{given}: {height * width} pixels; allowed are {MAX_PIXELS} per image")
        padded, crop = pad_to_multiple(batch.to(self.engine.device), self.engine.multiple)
        x = to_unit(padded) if padded.dtype == torch.uint8 else padded
        y = crop(self.engine.translate(x.contiguous(memory_format=torch.channels_last), self.count))
        self.count += len(batch)
        return to_uint8(y) if batch.dtype == torch.uint8 else y

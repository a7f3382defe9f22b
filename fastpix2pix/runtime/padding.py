"""Any image size for a network that takes multiples: pad by repeated reflection, crop back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Crop:
    """Where the picture lies inside its padded form; calling it cuts the picture out (a view)."""

    top: int  # rows above the picture
    left: int  # columns left of it
    height: int  # of the picture
    width: int  # of the picture

    def __call__(
        self,
        padded: Tensor,  # [N, C, H, W] any dtype
    ) -> Tensor:
        return padded[..., self.top : self.top + self.height, self.left : self.left + self.width]


def pad_to_multiple(
    x: Tensor,  # [N, C, H, W] any dtype, contiguous or channels-last
    multiple: int,
) -> tuple[Tensor, Crop]:
    """Pad height and width up to the next multiple by reflection, and the crop that undoes it.

    Top and left get the smaller half of an odd pad. Reflection does not repeat the edge pixel (cv2 REFLECT_101,
    torch "reflect") and goes on to and fro where the pad is wider than the picture; a single pixel is repeated.
    The memory format is kept. A picture that fits comes back as `x` itself.
    """
    height, width = x.shape[-2:]
    pad_h, pad_w = -height % multiple, -width % multiple
    crop = Crop(pad_h // 2, pad_w // 2, height, width)
    if pad_h == pad_w == 0:
        return x, crop
    rows = _reflected(height, crop.top, height + pad_h, x.device)
    columns = _reflected(width, crop.left, width + pad_w, x.device)
    if x.is_contiguous(memory_format=torch.channels_last):  # index_select writes the order of its view
        x = x.permute(0, 2, 3, 1).index_select(1, rows).index_select(2, columns).permute(0, 3, 1, 2)
    else:
        x = x.index_select(2, rows).index_select(3, columns)
    return x, crop


def _reflected(size: int, before: int, total: int, device: torch.device) -> Tensor:
    """The source index of each of `total` padded positions: a triangle wave of period 2 (size - 1)."""
    if size == 1:
        return torch.zeros(total, dtype=torch.int64, device=device)
    period = 2 * (size - 1)
    position = torch.arange(-before, total - before, device=device) % period
    return torch.minimum(position, period - position)

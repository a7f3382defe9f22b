"""The pix2pix objective (arXiv 1611.07004, section 3.1) and its ablations (section 4.2)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def gan_loss(
    logits: Tensor,  # [N, 1, h, w], any float dtype
    real: bool,
    kind: Literal["bce", "lsgan"] = "bce",
) -> Tensor:  # [] fp32
    """Mean over all patches of -log p(real) or -log p(fake) ("bce"), or the squared distance to 1 or 0 ("lsgan")."""
    logits = logits.float()
    target = torch.full_like(logits, float(real))
    if kind == "lsgan":
        return F.mse_loss(logits, target)
    return F.binary_cross_entropy_with_logits(logits, target)


def seen_by_discriminator(
    x: Tensor,  # [N, Ci, H, W] condition
    image: Tensor,  # [N, Co, H, W] real or translated image
    conditional: bool,
) -> Tensor:  # [N, Ci + Co or Co, H, W]
    """The discriminator's input: condition and image, or the image alone (unconditional ablation)."""
    return torch.cat((x, image), 1) if conditional else image

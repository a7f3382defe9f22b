"""The gate: what was built against the fp32 generator in PyTorch, image by image, as 8-bit pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Modes
from ..data.images import to_uint8, to_unit
from ..errors import CheckFailed
from ..evaluation import finite, image_metrics
from ..model import Unet

Run = Callable[[Tensor, int], Tensor]  # (batch [N, C, H, W] fp32 in [-1, 1], number of its first image) -> the same
_SHOWN = 3  # worst images named


@dataclass(frozen=True)
class Tolerance:
    """How far the worst image may be from the fp32 generator's: levels of 255, dB."""

    max: float  # largest difference of a pixel
    mean: float  # mean difference of an image
    psnr: float  # least PSNR
    ssim: float  # least SSIM


# Measured are the worst of 16 validation images of a U-Net-256 (ngf 16) after 16 epochs on facades, image and running
# statistics, by ONNX Runtime. Allowed is several times that, because longer trained models have steeper layers.
TOLERANCES = {
    # 1, 0.0001, 91 dB: the same arithmetic in another order; what lies on the border of two levels rounds to the other
    "fp32": Tolerance(max=1, mean=0.02, psnr=60, ssim=0.9999),
    # 1, 0.03, 64 dB, 0.9999: 11 bits through some 30 layers
    "fp16": Tolerance(max=8, mean=0.25, psnr=50, ssim=0.998),
    # 6, 0.3, 51 dB, 0.999: 8 bits, so 8 times the rounding of fp16
    "bf16": Tolerance(max=32, mean=1.5, psnr=42, ssim=0.99),
    # 19, 1.7, 40 dB, 0.996: 255 equal steps for all that a layer takes in; outliers make them coarse
    "int8": Tolerance(max=64, mean=4, psnr=32, ssim=0.97),
    # 43, 3.3, 34 dB, 0.989: 4 bits for every number, small or large
    "fp8": Tolerance(max=96, mean=6, psnr=29, ssim=0.96),
}


@dataclass(frozen=True)
class ImageParity:
    """One image's difference."""

    name: str
    max: float  # levels of 255
    mean: float  # levels of 255
    psnr: float  # dB; inf for equal pictures
    ssim: float

    def failures(self, allowed: Tolerance) -> list[str]:
        """What is beyond tolerance; a figure that is not a number always is."""
        rows = [
            ("max difference", self.max, "over", allowed.max, self.max <= allowed.max),
            ("mean difference", self.mean, "over", allowed.mean, self.mean <= allowed.mean),
            ("PSNR", self.psnr, "under", allowed.psnr, self.psnr >= allowed.psnr),
            ("SSIM", self.ssim, "under", allowed.ssim, self.ssim >= allowed.ssim),
        ]
        return [f"{name} {value:.4g} {how} {limit:.4g}" for name, value, how, limit, passes in rows if not passes]


@dataclass(frozen=True)
class Parity:
    """The gate's figures."""

    ran: str  # what was compared, and on what: the engine itself, or what stands in for it
    images: tuple[ImageParity, ...]
    tolerance: Tolerance

    @property
    def failed(self) -> list[ImageParity]:
        """Images beyond tolerance, the worst first."""
        found = [image for image in self.images if image.failures(self.tolerance)]
        return sorted(found, key=lambda image: -image.mean if math.isfinite(image.mean) else -math.inf)

    def worst(self) -> dict[str, float]:
        """The worst figure of each kind over the images."""
        return {
            "max": max(i.max for i in self.images),
            "mean": max(i.mean for i in self.images),
            "psnr": min(i.psnr for i in self.images),
            "ssim": min(i.ssim for i in self.images),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; what is not finite is None."""
        content = {"ran": self.ran, "worst": self.worst(), **asdict(replace(self, images=()))}
        content["images"] = [asdict(image) for image in self.images]
        return finite(content)

    def check(self) -> None:
        """CheckFailed where an image is beyond tolerance, naming the worst."""
        failed = self.failed
        if not failed:
            return
        named = "; ".join(f"{i.name}: {', '.join(i.failures(self.tolerance))}" for i in failed[:_SHOWN])
        more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
        raise CheckFailed(
            f"{len(failed)} of {len(self.images)} images differ too much from the fp32 generator ({self.ran}): "
            f"{named}{more}. Nothing was written; use a higher precision, or allow more with max_difference = LEVELS "
            "and mean_difference = LEVELS"
        )


def tolerance(precision: str, max_difference: float | None = None, mean_difference: float | None = None) -> Tolerance:
    """The table's row, or what was asked for instead: then PSNR and SSIM decide nothing."""
    row = TOLERANCES[precision]
    if max_difference is None and mean_difference is None:
        return row
    return Tolerance(max_difference or 255, mean_difference or 255, 0, -1)


def compare(
    net: Unet,  # fp32, in eval mode, on the CPU
    modes: Modes,
    run: Run,
    ran: str,  # what `run` is
    images: Sequence[tuple[str, Tensor]],  # (name, [C, H, W] uint8)
    allowed: Tolerance,
    batch: int = 1,  # images of equal size in a row that `run` gets together; the generator gets them one by one
) -> Parity:
    """Translate every image with `run` and with the generator, in the same modes, and compare the 8-bit pictures.

    Image number i is translated as number i of a sequence, so that random noise is the same on both sides. A picture
    with a value that is not finite fails: its differences are NaN.
    """
    rows: list[ImageParity] = []
    while len(rows) < len(images):
        first = len(rows)
        ahead = [image for _, image in images[first : first + batch]]
        alike = next((i for i, image in enumerate(ahead) if image.shape != ahead[0].shape), len(ahead))
        x = to_unit(torch.stack(ahead[:alike]))
        got = run(x, first).float().cpu()
        for i in range(alike):
            with torch.no_grad():
                wanted = net(x[i : i + 1].contiguous(memory_format=torch.channels_last), modes, first + i).float()
            rows.append(_difference(images[first + i][0], got[i : i + 1], wanted))
    return Parity(ran, tuple(rows), allowed)


def _difference(
    name: str,
    got: Tensor,  # [1, C, H, W] fp32
    wanted: Tensor,  # [1, C, H, W] fp32
) -> ImageParity:
    if not bool(torch.isfinite(got).all()):
        return ImageParity(name, math.nan, math.nan, math.nan, math.nan)
    both = [to_uint8(picture) for picture in (got, wanted)]
    levels = (both[0].double() - both[1].double()).abs()
    _, psnr, ssim = image_metrics(*(picture.float() / 255 for picture in both))
    return ImageParity(name, float(levels.max()), float(levels.mean()), float(psnr), float(ssim))

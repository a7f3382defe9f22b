"""How good a generator is on pairs: L1, PSNR, SSIM and match@1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Direction, Modes
from .data.batches import Batch
from .data.images import to_uint8, to_unit, write_image
from .data.loader import validation_batches
from .data.pairs import Pair, find_pairs, hold_out
from .errors import InputError
from .files import check_new_folder, written_aside
from .model.load import model_path
from .pages import address, table, text, write_page
from .runtime.load import built_for, load

if TYPE_CHECKING:
    from .model import Unet

_HALF_WINDOW = 5  # of SSIM's Gaussian, pixels
THUMBNAIL = 32  # side of the pictures that match@1 compares
_LUMA = (0.299, 0.587, 0.114)  # BT.601
_CONSTANT = 1e-6  # norm of a thumbnail's deviations below which the picture counts as constant
_SHOWN, _PAGE = ("input", "output", "target"), "index.html"  # what a folder of an evaluation holds
_TIE = 1e-9  # correlations closer than this are equal: two targets of the same picture
_ROWS = 256  # outputs correlated at a time: of 50,000 images, all at once are 20 GB


@dataclass(frozen=True)
class ImageMetrics:
    """One output against its target."""

    name: str
    l1: float  # mean |y - G(x)|, range 1
    psnr: float  # dB; inf for equal pictures
    ssim: float
    match: bool  # no other target correlates better


@dataclass(frozen=True)
class Evaluation:
    """Means over images (`match`: a share), and the rows they are the means of."""

    l1: float
    psnr: float
    ssim: float
    match: float
    images: int
    modes: Modes
    per_image: tuple[ImageMetrics, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite PSNR is None."""
        return finite(asdict(self))


def evaluate(
    model: str | Path,  # run folder, .safetensors, junyanz .pth, .onnx or an engine
    data: str | Path,  # as for training: A|B folder, or folder with A/ and B/
    *,
    split: str = "val",  # or train, test; holdout: the pairs that the model's training set aside
    direction: Direction | None = None,  # AtoB or BtoA; default: the model's record, else AtoB
    norm_stats: str | None = None,  # image or running; default: the model's record, else image
    noise: str | None = None,  # off, fixed or random; default: the model's record, else off
    seed: int = 0,  # of the noise
    device: str = "auto",  # auto, cpu, cuda, cuda:1
    batch: int = 1,  # images per forward pass; the result does not depend on it
    size: int | None = None,  # side the whole image is resized to, pixels; default: the model's record, else 256
    out: str | Path | None = None,  # folder for the pictures and a page of them, worst first
    overwrite: bool = False,  # replace that of an earlier call
    progress: Callable[[int, int], None] | None = None,  # called with (images done, images in all)
) -> Evaluation:
    """L1, PSNR, SSIM and match@1 of a model's outputs, whole images resized to size x size.

    A network computes in fp32; a file of `fastpix2pix build` as it was built.

    Pictures are compared as floats on [0, 1] (x/2 + 1/2 of the generator's output, not rounded), each on its own; every
    figure is the mean over images.

    - l1: mean |y - G(x)| over channels and pixels.
    - psnr: 10 log10(1 / mean (y - G(x))^2) in dB (torchmetrics, data_range 1).
    - ssim: Gaussian window of 11 pixels, sigma 1.5, k1 0.01, k2 0.03, mean over channels and the pixels whose window
      lies inside the picture (Wang et al. 2004; torchmetrics' map, data_range 1).
    - match: see match_at_1; chance is 1 / images.

    `out` gets input/NAME.png, output/NAME.png and target/NAME.png, as other programs that compare folders want them,
    and index.html; it is made when all is done.

    For scale: the mean training photo of facades, given as the answer to all 100 validation pairs (BtoA, 256x256), has
    L1 0.178, PSNR 13.41, SSIM 0.261, match@1 0.01.

    Raises InputError for a bad model, data folder, direction, size, pair of modes or `out`.
    """
    if out is not None:
        check_new_folder(Path(out), overwrite, [Path(data)], ours=(*_SHOWN, _PAGE))
    if batch < 1:
        raise InputError(f"batch = {batch}: must be at least 1")
    if direction not in (None, "AtoB", "BtoA"):
        raise InputError(f"direction = {direction!r}: allowed are AtoB and BtoA")
    precision = "fp32" if built_for(model_path(model)) is None else "auto"
    g = load(model, norm_stats=norm_stats, noise=noise, seed=seed, device=device, precision=precision)
    engine = g.engine
    size = size if size is not None else g.record.get("size") or 256
    if size < 1 or size % engine.multiple:
        raise InputError(f"size = {size}: this model takes multiples of {engine.multiple} pixels")
    used: Direction = direction or g.record.get("direction") or "AtoB"
    pairs: Sequence[Pair] = find_pairs(data, "train" if split == "holdout" else split)
    if split == "holdout":
        held = g.record.get("holdout")
        if held is None:
            raise InputError(f"split = holdout: {model} does not say what pairs its training set aside")
        pairs = hold_out(pairs, held["count"], held["seed"])[1]
    batches = validation_batches(pairs, used, engine.in_channels, engine.out_channels, size, batch, engine.device)

    def seen() -> Iterable[Batch]:
        done = 0
        for one in batches:
            yield one
            done += len(one.input)
            if progress:
                progress(done, len(pairs))

    names = [pair.name for pair in pairs]
    if out is None:
        return _evaluate(engine.translate, seen(), engine.modes, engine.device, names)
    with written_aside(Path(out)) as aside:
        found = _evaluate(engine.translate, seen(), engine.modes, engine.device, names, partial(_write, aside, names))
        _write_page(aside, f"{model} on {split} of {data}", found)
    return found


def evaluate_network(
    net: Unet,
    batches: Iterable[Batch] | Callable[[], Iterable[Batch]],  # .input and .target uint8 [N, C, H, W]; read once
    modes: Modes,
    device: torch.device,  # where the network is
    names: Sequence[str] | None = None,  # of the images, in order; default "0", "1", ...
) -> Evaluation:
    """The figures of `evaluate` for a network in memory, without a trace in it.

    Runs in eval mode and puts every module's training flag back; no gradients, no use of the global random numbers.
    Computes in the network's own precision: call it under torch.autocast for another. Raises InputError for no images.
    """
    training = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            found = batches() if callable(batches) else batches
            return _evaluate(lambda x, first: net(x, modes, first).float(), found, modes, device, names)
    finally:
        for module, was in training:
            module.training = was


def _evaluate(
    run: Callable[[Tensor, int], Tensor],  # (batch [N, C, H, W] fp32 in [-1, 1], number of its first image) -> the same
    batches: Iterable[Batch],
    modes: Modes,
    device: torch.device,  # where `run` takes and gives batches
    names: Sequence[str] | None,
    show: Callable[[int, dict[str, Tensor]], None] = lambda first, pictures: None,  # number of a batch's first image
) -> Evaluation:
    rows: list[tuple[float, ...]] = []
    thumbnails: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        translated = run(to_unit(batch.input.to(device)), len(rows))
        show(len(rows), {"input": batch.input, "output": to_uint8(translated), "target": batch.target})
        output = translated / 2 + 0.5
        target = to_unit(batch.target.to(device)) / 2 + 0.5
        thumbnails.append((_thumbnails(output), _thumbnails(target)))
        rows.extend(zip(*(column.tolist() for column in image_metrics(output, target)), strict=True))
    if not rows:
        raise InputError("no validation images: nothing to evaluate")
    outputs, targets = (torch.cat(column) for column in zip(*thumbnails, strict=True))
    match = _match(outputs, targets).tolist()
    labels = [str(i) for i in range(len(rows))] if names is None else names
    per_image = tuple(
        ImageMetrics(name, l1, psnr, ssim, own) for name, (l1, psnr, ssim), own in zip(labels, rows, match, strict=True)
    )
    l1, psnr, ssim, share = (
        math.fsum(getattr(row, name) for row in per_image) / len(per_image) for name in ("l1", "psnr", "ssim", "match")
    )
    return Evaluation(l1, psnr, ssim, share, len(per_image), modes, per_image)


def _write(out: Path, names: Sequence[str], first: int, pictures: dict[str, Tensor]) -> None:
    """Of a batch: uint8 [N, C, H, W] by folder."""
    for folder, batch in pictures.items():
        for name, picture in zip(names[first:], batch.permute(0, 2, 3, 1).cpu().numpy(), strict=False):
            write_image(out / folder / _file(name), picture)


def _file(name: str) -> Path:
    """Of a pair's picture, in its folder: names in archives may have folders, and lead nowhere else."""
    parts = [part for part in PurePosixPath(f"{name}.png").parts if part not in ("/", "..")]
    return Path(*parts)


def _write_page(out: Path, title: str, found: Evaluation) -> None:
    figures = ("l1", "psnr", "ssim", "match")
    mean = [f"{getattr(found, name):.4f}" for name in figures]
    parts = [table(["images", "modes", *figures], [[str(found.images), text(found.modes), *mean]])]
    rows = []
    for row in sorted(found.per_image, key=lambda row: -row.l1):
        shown = [f'<img loading="lazy" src="{address(f / _file(row.name))}" alt="{f}">' for f in map(Path, _SHOWN)]
        lines = [text(row.name), f"L1 {row.l1:.4f}", f"PSNR {row.psnr:.2f} dB", f"SSIM {row.ssim:.4f}"]
        rows.append([*shown, "<br>".join([*lines, "match" if row.match else "no match"])])
    head = [*_SHOWN, "largest L1 first"]
    write_page(out / _PAGE, title, [*parts, table(head, rows)])


def image_metrics(
    output: Tensor,  # [N, C, H, W] float in [0, 1], H and W >= 11
    target: Tensor,  # [N, C, H, W] float in [0, 1]
) -> tuple[Tensor, Tensor, Tensor]:
    """L1, PSNR in dB and SSIM of every image: three [N]. See `evaluate` for the definitions."""
    # Imported here because torchmetrics takes seconds, and training needs it late.
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    l1 = (output - target).abs().mean(dim=(1, 2, 3))
    psnr = peak_signal_noise_ratio(output, target, data_range=1.0, reduction="none", dim=(1, 2, 3))
    # The mean over the map, because whether torchmetrics' own mean has the padded border in it differs by version.
    _, ssim = structural_similarity_index_measure(output, target, data_range=1.0, return_full_image=True)
    return l1, psnr, ssim[..., _HALF_WINDOW:-_HALF_WINDOW, _HALF_WINDOW:-_HALF_WINDOW].mean(dim=(1, 2, 3))


def match_at_1(
    outputs: Tensor,  # [N, C, H, W] float, any range
    targets: Tensor,  # [N, C, H, W] float
) -> Tensor:  # [N] bool
    """Whether the best-correlated among all targets is the output's own.

    Compared are 32x32 thumbnails (area-averaged luminance: BT.601 of 3 channels, else the mean of the channels) by
    Pearson's correlation. A constant picture correlates 0 with everything; a match needs a positive correlation with
    the own target; targets that are the same picture share the first place. The share of matches is match@1.
    """
    return _match(_thumbnails(outputs), _thumbnails(targets))


def _thumbnails(
    pictures: Tensor,  # [N, C, H, W] float
) -> Tensor:  # [N, 1024] float64 on the CPU: zero mean and norm 1, or all zero for a constant picture
    wide = pictures.double()
    channels = wide.shape[1]
    weight = wide.new_tensor(_LUMA if channels == 3 else [1 / channels] * channels)
    luma = (wide * weight[:, None, None]).sum(1, keepdim=True)
    flat = F.interpolate(luma, size=(THUMBNAIL, THUMBNAIL), mode="area").flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    norm = flat.norm(dim=1, keepdim=True)
    return torch.where(norm > _CONSTANT, flat / norm.clamp_min(_CONSTANT), 0.0).cpu()


def _match(
    outputs: Tensor,  # [N, 1024] thumbnails
    targets: Tensor,  # [N, 1024] thumbnails
) -> Tensor:  # [N] bool
    found = []
    for first in range(0, len(outputs), _ROWS):
        correlation = outputs[first : first + _ROWS] @ targets.T
        own = correlation.diagonal(first)
        found.append((own > _TIE) & (own >= correlation.amax(dim=1) - _TIE))
    return torch.cat(found)


def finite(value: Any) -> Any:
    """JSON-ready content: what is not a finite number becomes None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

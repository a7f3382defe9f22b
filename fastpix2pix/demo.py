"""The whole way in a few minutes on a small machine: paint pairs, train, evaluate, translate pictures and a video."""

from __future__ import annotations

import shutil
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .config import Infer
from .console import Progress, say
from .data.images import read_image, write_image
from .data.pairs import find_pairs, read_pair
from .data.synthetic import write_demo_set
from .errors import EnvironmentFailed, InputError
from .evaluation import evaluate
from .runtime.load import load
from .runtime.translate import translate_files
from .runtime.translator import Translator
from .training.loop import train
from .training.report import grid

SIZE = 128  # pixels: small enough to learn something in minutes without a GPU
# shown to the person as the command that does the same, and given to train
OPTIONS: dict[str, Any] = {
    "crop_size": SIZE,
    "depth": 7,
    "ngf": 24,
    "ndf": 24,
    "batch": 1,
    "epochs": 40,
    "validate_epochs": 4,
}


def demo(out: Path, *, minutes: float = 3.0, device: str = "auto") -> int:
    """Leave data, a trained run, translated pictures and a sheet of them in `out`; returns the exit code."""
    if not minutes > 0:  # 0 would be no limit
        raise InputError(f"minutes = {minutes}: must be positive")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: remove it or choose another --out")
    data, run, pictures = out / "facades", out / "run", out / "pictures"
    with Progress("paint") as progress:
        write_demo_set(data, train=300, val=24, size=SIZE, progress=progress.count)

    result = train(data, run, **OPTIONS, max_minutes=minutes, device=device)
    if result.stopped not in ("done", "time"):
        say(f"{result.stopped}: the run in {run} is complete up to step {result.step}")
        return {"SIGINT": 130, "SIGTERM": 143}[result.stopped]
    found = evaluate(run, data, device=device)

    g = load(run, device=device)
    labels = [pair.a for pair in find_pairs(data, "val")]
    translate_files(g, [str(p) for p in labels], str(pictures), Infer(direction="AtoB", device=device))
    sheet = out / "samples.png"
    write_image(sheet, contact_sheet(data, pictures))
    shutil.copyfile(run / "curves.png", out / "curves.png")
    film = street(data, g, out / "street.mp4")

    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in OPTIONS.items() if name != "epochs")
    say(
        f"""
{result.step} steps in {result.seconds:.0f} s; on {found.images} unseen labels: L1 {found.l1:.3f}, \
PSNR {found.psnr:.1f} dB, SSIM {found.ssim:.2f}, match@1 {found.match:.2f} (chance {1 / found.images:.2f})

look at   {sheet}   (input | output | target)
          {film}
          {out / "curves.png"}
          {run / "index.html"}

go on     fastpix2pix train {data} --out {run} --resume --epochs 200 --max-minutes 0
          fastpix2pix infer {run} {data / "val"} {out / "more"} --direction AtoB --side-by-side
          fastpix2pix infer {run} VIDEO out.mp4
your own  fastpix2pix data check PAIRS
          fastpix2pix train PAIRS --out RUN                (256x256, the paper's networks)
this one  fastpix2pix train {data} --out RUN {flags}"""
    )
    return 0


def street(
    data: Path,
    g: Translator,
    out: Path,  # .mp4
    frames: int = 75,
    step: int = 4,  # pixels from frame to frame
) -> str:  # where it is, or why it is not
    """A walk along the houses of the validation labels, translated frame by frame, as a video of 25 frames a second."""
    try:
        from .streaming.stream import Stream
    except EnvironmentFailed as error:
        return f"(no video: {error})"

    labels = [read_pair(pair, "AtoB", 3, 3)[0] for pair in find_pairs(data, "val")]
    houses = np.concatenate(labels[: (frames * step + 2 * SIZE) // SIZE + 1], axis=1)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(frames):
            write_image(Path(folder) / f"{k:03d}.png", houses[:, k * step : k * step + 2 * SIZE])
        Stream(g, folder, out, fps=25).run()
    return f"{out}   (a walk along unseen labels, translated)"


def contact_sheet(
    data: Path,
    pictures: Path,
    rows: int = 6,
    columns: int = 2,
) -> np.ndarray:  # [H, W, 3] uint8
    """input | output | target of the first validation pairs, `columns` triples in a row."""
    triples = []
    for pair in find_pairs(data, "val")[: rows * columns]:
        label, photo = read_pair(pair, "AtoB", 3, 3)
        triples.append([label, read_image(pictures / f"{pair.name}.png"), photo])
    return grid([list(chain(*triples[i : i + columns])) for i in range(0, len(triples), columns)])

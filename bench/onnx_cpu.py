"""Milliseconds per image on a CPU: an exported generator in ONNX Runtime beside PyTorch eager in both memory formats.

python -m bench.onnx_cpu: equal pictures first, then times in turns; exit code 4 where ONNX Runtime is not faster by as
much as it should be.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from fastpix2pix.building.onnx_graph import export_onnx
from fastpix2pix.config import Form, Generator, Modes, NormStats
from fastpix2pix.data.images import to_uint8
from fastpix2pix.model import Unet, build_generator
from fastpix2pix.runtime.engine import TorchEngine
from fastpix2pix.runtime.onnx_engine import OnnxEngine

from .baselines import generator_nchw
from .devices import facts
from .report import Mismatch
from .timing import Ratio, Timing, interleaved

Translate = Callable[[Tensor], Tensor]  # [1, C, H, W] fp32 in [-1, 1] -> the same
ENGINE = "ONNX Runtime"
LEAST = {"running": 1.3, "image": 1.1}  # times as fast as PyTorch eager in its faster format
LEVELS = 1  # of 255: largest difference of a pixel from the generator's


def ways(net: Unet, modes: Modes, size: int, folder: Path) -> dict[str, Translate]:
    """The same generator, fp32: PyTorch's two and the engine, which is exported into `folder`."""
    file = folder / f"{modes.norm_stats}.onnx"
    export_onnx(net, modes, file, Form(height=size, width=size), record={})
    nchw = copy.deepcopy(net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return {
        "eager channels-last": TorchEngine(net, modes).translate,
        "eager NCHW": torch.no_grad()(partial(generator_nchw, nchw, modes=modes)),
        ENGINE: OnnxEngine(file).translate,
    }


def check(runs: dict[str, Translate], x: Tensor) -> None:
    """Mismatch where two of them make different pictures."""
    pictures = {name: to_uint8(run(x)).int() for name, run in runs.items()}
    (first, wanted), *others = pictures.items()
    for name, got in others:
        if (off := int((got - wanted).abs().max())) > LEVELS:
            raise Mismatch(f"{name} is off from {first} by {off} of 255, allowed {LEVELS}")


def compare(net: Unet, modes: Modes, size: int, rounds: int, folder: Path) -> tuple[dict[str, Timing], Ratio]:
    """Times of all, and how many times as fast as the faster eager the engine is, round by round."""
    runs = ways(net, modes, size, folder)
    x = torch.rand(1, net.config.in_channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    check(runs, x)
    times: dict[str, Timing] = {}
    for name, timing in interleaved({n: partial(f, x) for n, f in runs.items()}, x.device, rounds, 0).items():
        if not isinstance(timing, Timing):
            raise timing
        times[name] = timing
    faster = min((timing for name, timing in times.items() if name != ENGINE), key=lambda timing: timing.median)
    return times, Ratio.of(faster.values, times[ENGINE].values)


def main(argv: list[str] | None = None) -> int:
    """Compare both ways to normalise; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.onnx_cpu", description=__doc__)
    parser.add_argument("--ngf", type=int, default=64, help="feature channels of the first level")
    parser.add_argument("--depth", type=int, default=8, help="levels of the generator")
    parser.add_argument("--size", type=int, default=256, help="side of the picture, pixels")
    parser.add_argument("--rounds", type=int, default=25, help="samples of each")
    given = parser.parse_args(argv)
    import onnxruntime

    found = facts(torch.device("cpu"))
    print(
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {found['torch']}, "
        f"onnxruntime {onnxruntime.__version__}, commit {found['commit']}; ngf {given.ngf}, {given.size}x{given.size}"
    )
    torch.manual_seed(0)
    net = build_generator(Generator(depth=given.depth, ngf=given.ngf)).eval()
    with torch.no_grad():
        net.up[-1].conv.weight.mul_(10)  # type: ignore[union-attr, operator] # outputs over most of [-1, 1]
    slow = 0
    with tempfile.TemporaryDirectory() as folder:
        for statistics in get_args(NormStats):
            times, ratio = compare(net, Modes(statistics), given.size, given.rounds, Path(folder))
            for name, timing in times.items():
                low, high = timing.quartiles
                print(f"{statistics:8} {name:20} {timing.median:8.1f} ms  ({low:.1f} to {high:.1f})")
            enough = ratio.median >= LEAST[statistics]
            slow += not enough
            print(
                f"{statistics:8} {ENGINE} is {ratio.median:.2f} times as fast as the faster eager "
                f"({ratio.low:.2f} to {ratio.high:.2f}); at least {LEAST[statistics]}: {'yes' if enough else 'NO'}"
            )
    return 4 if slow else 0


if __name__ == "__main__":
    sys.exit(main())

"""Milliseconds per translated batch: built engines beside PyTorch's ways of running the same generator.

Every competitor is compared with the generator in fp32 before it is timed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from fastpix2pix.config import Modes, NormStats
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.model import Unet, build_generator
from fastpix2pix.runtime.triton_engine import TritonEngine
from fastpix2pix.tuning.products import Ways

from .baselines import graphed_translate
from .devices import Setting, synthetic_pairs
from .report import Mismatch, Report, Skipped, Values
from .timing import WARM_UP, Timing, interleaved

PART = "engines"
MEAN = 0.25 / 127.5  # of the difference from fp32 that passes: the gate's for fp16
Translate = Callable[[Tensor], Tensor]  # [N, C, H, W] fp32 in [-1, 1], channels-last -> the same


def run(report: Report, at: Setting) -> None:
    """Check, then time, each of the two ways to normalise at the smallest batch."""
    config = at.config(at.batches[0])
    torch.manual_seed(0)
    net = build_generator(config.generator).eval().requires_grad_(False)
    with torch.no_grad():
        net.get_parameter(f"up.{config.generator.depth - 1}.conv.weight").mul_(10)  # outputs over most of [-1, 1]
    x = synthetic_pairs(config, 1, at.device, seed=9)[0][0]
    for statistics in get_args(NormStats):
        _run_modes(report, at, net, Modes(norm_stats=statistics), x)
        torch._dynamo.reset()


def _run_modes(report: Report, at: Setting, net: Unet, modes: Modes, x: Tensor) -> None:
    with torch.no_grad():
        wanted = net(x.cpu(), modes)
    ready: dict[str, Translate] = {}
    compiling = 70.0 if at.compile_backend == "inductor" else 0.0  # and time left to measure all of them
    kernels, building = (10.0, 60.0) if at.device.type == "cuda" else (0.0, 0.0)
    makers: dict[str, tuple[Callable[[], Translate], float]] = {
        "eager fp32": (partial(_eager, at, net, modes, torch.float32), 0.0),
        "eager fp16": (partial(_eager, at, net, modes, torch.float16), 0.0),
        "eager fp16, CUDA graph": (partial(_graphed, at, net, modes, x), 0.0),
        "own kernels fp16, CUDA graph": (partial(_own, at, net, modes, Ways()), kernels),
        "own kernels fp16 that overlap, CUDA graph": (partial(_own, at, net, modes, Ways(overlap=True)), kernels),
        "own kernels fp16, readers normalise, CUDA graph": (partial(_own, at, net, modes, Ways(lazy=True)), kernels),
        "engine fp16, CUDA graph": (partial(_engine, at, net, modes, x), building),
        "torch.compile fp16": (partial(_compiled, at, net, modes), compiling),
    }
    for name, (make, needs) in makers.items():
        row = f"batch {len(x)} {modes.norm_stats} {name}"
        required = name.startswith(("engine", "own"))
        report.run(PART, f"{row}: check", partial(_check, make, x, wanted, ready, row), needs=needs, required=required)
    if ready:
        report.run(PART, f"batch {len(x)} {modes.norm_stats} timing", lambda: _time(report, at, x, ready))


def _check(make: Callable[[], Translate], x: Tensor, wanted: Tensor, ready: dict[str, Translate], row: str) -> Values:
    """Compare what a competitor makes, after as many calls as a graph needs; it is `ready` then."""
    translate = make()
    for _ in range(WARM_UP):
        got = translate(x)
    mean = float((got.cpu().float() - wanted).abs().mean())
    if not mean <= MEAN:
        raise Mismatch(f"mean difference {mean:.3g}, allowed {MEAN:.3g}", {"mean": mean})
    ready[row] = translate
    return {"mean": mean}


def _time(report: Report, at: Setting, x: Tensor, ready: dict[str, Translate]) -> Values:
    """Interleaved rounds over all that passed; one row each."""
    times = interleaved({row: partial(f, x) for row, f in ready.items()}, at.device, at.rounds, at.sample_s)
    for row, timing in times.items():
        if not isinstance(timing, Timing):
            report.add(PART, row, "failed", f"{type(timing).__name__}: {' '.join(str(timing).split())[:600]}")
            continue
        values: Values = {
            "ms": round(timing.median, 4),
            "quartiles_ms": [round(q, 4) for q in timing.quartiles],
            "images_per_s": float(f"{len(x) * 1e3 / timing.median:.4g}"),
        }
        report.add(PART, row, "ok", **values)
    return {"rounds": at.rounds}


def _eager(at: Setting, net: Unet, modes: Modes, dtype: torch.dtype) -> Translate:
    own = copy.deepcopy(net).to(at.device, dtype)

    def translate(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return own(x.to(dtype), modes).float()

    return translate


def _own(at: Setting, net: Unet, modes: Modes, ways: Ways) -> Translate:
    """The Triton engine; where its kernels overlap they give the same bits."""
    if at.device.type != "cuda":
        raise Skipped("a CUDA graph needs a CUDA device")
    try:
        return TritonEngine(net, modes, at.device, "fp16", **ways._asdict()).translate
    except EnvironmentFailed as error:
        raise Skipped(str(error)) from None


def _compiled(at: Setting, net: Unet, modes: Modes) -> Translate:
    own = copy.deepcopy(net).to(at.device, torch.float16)
    own.compile(backend=at.compile_backend, dynamic=False, fullgraph=True)

    def translate(x: Tensor) -> Tensor:
        with torch.no_grad():
            return own(x.half(), modes).float()

    return translate


def _graphed(at: Setting, net: Unet, modes: Modes, x: Tensor) -> Translate:
    """Half weights, captured once; the input is copied in, as an engine's is."""
    if at.device.type != "cuda":
        raise Skipped("a CUDA graph needs a CUDA device")
    return graphed_translate(_eager(at, net, modes, torch.float16), x)


def _engine(at: Setting, net: Unet, modes: Modes, x: Tensor) -> Translate:
    """Built here, through the gate, by the library that knows this GPU."""
    if at.device.type != "cuda":
        raise Skipped("an engine, with its CUDA graph, needs a CUDA device")
    try:
        from fastpix2pix.building.build import build
        from fastpix2pix.model.weights import save_network
        from fastpix2pix.runtime.tensorrt_engine import TensorRTEngine
        from fastpix2pix.runtime.tensorrt_library import target_for

        target = target_for("sm{}{}".format(*torch.cuda.get_device_capability(at.device)))
    except (ImportError, EnvironmentFailed) as error:
        raise Skipped(str(error)) from None
    size = f"{x.shape[2]}x{x.shape[3]}"
    with tempfile.TemporaryDirectory() as folder:
        model, file = Path(folder) / "model.safetensors", Path(folder) / "model.engine"
        save_network(model, net, modes=modes)
        build(
            model, file, target=target, precision="fp16", size=size, batch=str(len(x)),
            norm_stats=modes.norm_stats, gate_images=4, device=str(at.device),
        )  # fmt: skip
        return TensorRTEngine(file, at.device).translate

"""Raw frames through the frame runtime on a GPU: frames per second and latency, without an engine and with each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastpix2pix.config import Modes
from fastpix2pix.model import build_generator
from fastpix2pix.runtime.engine import Engine, TorchEngine
from fastpix2pix.runtime.triton_engine import TritonEngine

from .devices import ROOT, Setting
from .report import Mismatch, Report, Skipped, Values

if TYPE_CHECKING:
    from fastpix2pix.runtime.native import FrameRuntime

PART = "frames"
SIZES = ((256, 256), (512, 512), (720, 1280), (1080, 1920))  # height, width of frames; the network's: rounded up
STREAMS = 4


def run(report: Report, at: Setting) -> None:
    """The extension is built first: what is in place may be for the CPU."""
    if not report.run(PART, "extension built with CUDA", partial(_build, at)):
        return
    for size in SIZES:
        name = "{}x{}".format(*size)
        report.run(PART, f"{name}, no engine", partial(rate, at, size, None))
        for kind in (TorchEngine, TritonEngine):
            report.run(PART, f"{name}, {kind.__name__}", partial(rate, at, size, partial(_engine, at, kind)))
    streams = partial(rate, at, SIZES[0], partial(_engine, at, TritonEngine))
    report.run(PART, f"256x256, TritonEngine, {STREAMS} streams", partial(streams, count=STREAMS))
    report.run(PART, "256x256, TritonEngine, drop-oldest", partial(streams, policy="drop-oldest"))


def _build(at: Setting) -> Values:
    if at.device.type != "cuda":
        raise Skipped("rates of the frame runtime need a CUDA GPU; bench.pixels has those of a CPU")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "FASTPIX2PIX_CUDA": "on"}, capture_output=True, text=True
    )
    if done.returncode:
        raise Skipped(f"the extension could not be built: {done.stderr.strip()[-600:]}")
    from fastpix2pix.runtime import native

    if native.CUDA is None:
        raise Mismatch("FASTPIX2PIX_CUDA=on built an extension without CUDA")
    return {"cuda": native.CUDA}


def _engine(at: Setting, kind: Callable[..., Engine]) -> Engine:
    torch.manual_seed(0)
    return kind(build_generator(at.config(1).generator).eval(), Modes("running"), at.device, "auto")


def rate(
    at: Setting,
    size: tuple[int, int],
    make: Callable[[], Engine] | None,
    count: int = 1,  # of streams, each with a runtime and threads of its own
    policy: str = "block",
    frames: int = 2000,
) -> Values:
    """Frames per second of all streams and latency of the first, after its frames were compared with another way."""
    from fastpix2pix.runtime.native import FrameRuntime, InputSpec, OutputSpec
    from fastpix2pix.streaming.device import DeviceNetwork

    height, width = size
    multiple = at.config(1).generator.multiple
    network = size if make is None else (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    frames = max(200, frames * SIZES[0][0] * SIZES[0][1] // (height * width))
    source = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    engines = [None if make is None else make() for _ in range(count)]  # each owns the memory between its layers

    def runtime(engine: Engine | None) -> FrameRuntime:
        if engine is None:
            specs = InputSpec("rgb", size, network), OutputSpec("rgb", size, network)
            return FrameRuntime(*specs, None, device=str(at.device), slots=6, policy=policy)
        made = DeviceNetwork(engine, *network)
        specs = (
            InputSpec("rgb", size, network, layout=made.layout, place=(0, 0, *size)),  # the rest is reflected
            OutputSpec("rgb", size, network, layout=made.layout, region=(0, 0, *size)),
        )
        return FrameRuntime(*specs, made.engine, **made.options, slots=6, policy=policy)

    runtimes = [runtime(engine) for engine in engines]
    backs = [np.empty_like(source) for _ in runtimes]
    _compare(engines[0], runtimes[0], source, backs[0], network)
    with ThreadPoolExecutor(count) as pool:
        times = list(pool.map(lambda one, back: streamed(one, source, back, frames), runtimes, backs))
    stats = runtimes[0].stats()
    graph = runtimes[0].describe()["graph"]
    for one in runtimes:
        one.close()
    latency: dict[str, Any] = dict(stats["latency"])
    values: Values = {f"{stage} p50_ms": found["p50_ms"] for stage, found in latency.items()}
    out = stats["frames"]["collected"] * count
    return {
        **values,
        "frames_per_s": round(out / max(times), 1),
        "p99_ms": latency["total"]["p99_ms"],
        "graph": graph,
        "frames": stats["frames"],
    }


def streamed(
    runtime: FrameRuntime,
    source: np.ndarray,  # a frame, submitted by a thread of its own
    back: np.ndarray,  # where results are collected
    frames: int,
) -> float:
    """Seconds from the first frame in to the last one out."""

    def submit() -> None:
        for i in range(frames):
            runtime.submit(source, i)
        runtime.finish()

    submitter = threading.Thread(target=submit)
    start = time.perf_counter()
    submitter.start()
    while runtime.collect(back) is not None:
        pass
    seconds = time.perf_counter() - start
    submitter.join()
    return seconds


def _compare(
    engine: Engine | None, runtime: FrameRuntime, source: np.ndarray, back: np.ndarray, network: tuple
) -> None:
    """One frame; against itself, or against the engine called on its own. Half precision may turn a level or two."""
    runtime.submit(source, 0)
    runtime.collect(back)
    wanted, allowed = source, 0
    if engine is not None:
        height, width, _ = source.shape
        padded = np.pad(source, ((0, network[0] - height), (0, network[1] - width), (0, 0)), mode="reflect")
        x = torch.from_numpy(padded).to(engine.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        y = engine.translate(x)[0, :, :height, :width].permute(1, 2, 0)
        wanted, allowed = ((y + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy(), 2
    off = int(np.abs(back.astype(int) - wanted.astype(int)).max())
    if off > allowed:
        raise Mismatch(f"a frame is off by {off} levels of 255, allowed are {allowed}")

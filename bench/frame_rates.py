"""Raw frames through the frame runtime on a GPU: frames per second and latency, without an engine and with each."""

from __future__ import annotations

import copy
import importlib
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
from fastpix2pix.model import Unet, build_generator
from fastpix2pix.runtime.engine import Engine, TorchEngine
from fastpix2pix.runtime.triton_engine import TritonEngine
from fastpix2pix.tuning.numerics import exact_fp32

from .devices import ROOT, Setting
from .report import Mismatch, Report, Skipped, Values

if TYPE_CHECKING:
    from fastpix2pix.runtime.native import FrameRuntime

PART = "frames"
SIZES = ((256, 256), (512, 512), (720, 1280), (1080, 1920))  # height, width of frames; the network's: rounded up
STREAMS = 4
ALONE = 200  # frames for the latency


def run(report: Report, at: Setting) -> None:
    """The extension is built first: what is in place may be for the CPU."""
    if not report.run(PART, "extension built with CUDA", partial(_build, at)):
        return
    net = _network(at)
    for size in SIZES:
        name = "{}x{}".format(*size)
        report.run(PART, f"{name}, no engine", partial(rate, at, size))
        for kind in (TorchEngine, TritonEngine):
            report.run(PART, f"{name}, {kind.__name__}", partial(rate, at, size, net, kind))
    streams = partial(rate, at, SIZES[0], net, TritonEngine)
    report.run(PART, f"256x256, TritonEngine, {STREAMS} streams", partial(streams, count=STREAMS))
    report.run(PART, "256x256, TritonEngine, drop-oldest", partial(streams, policy="drop-oldest"))


def _build(at: Setting) -> Values:
    if at.device.type != "cuda":
        raise Skipped("rates of the frame runtime need a CUDA GPU; bench.pixels has those of a CPU")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    here = "{}{}".format(*torch.cuda.get_device_capability(at.device))  # compiles in half the time of the usual two
    environment = {"FASTPIX2PIX_CUDA_ARCHS": here, **os.environ, "FASTPIX2PIX_CUDA": "on"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()  # ninja prints what compilers say
        told = [line for line in lines if "error" in line.lower() or line.startswith("fastpix2pix:")]
        failed = any("non-zero exit status" in line for line in lines)  # of a compiler; else a tool is missing
        kind = Mismatch if failed else Skipped
        raise kind(f"the extension could not be built: {'; '.join(told or lines[-3:])[:2000]}")
    importlib.invalidate_caches()
    from fastpix2pix.runtime import native

    if native.CUDA is None:
        raise Mismatch("FASTPIX2PIX_CUDA=on built an extension without CUDA")
    return {"cuda": native.CUDA}


def _network(at: Setting) -> Unet:
    """Its outputs are no even gray, which would look right whatever is computed."""
    torch.manual_seed(0)
    net = build_generator(at.config(1).generator).eval()
    with torch.no_grad():
        net.get_parameter(f"up.{net.config.depth - 1}.conv.weight").mul_(10)
    return net


def _engine(at: Setting, net: Unet, kind: Callable[..., Engine], precision: str = "auto") -> Engine:
    return kind(copy.deepcopy(net), Modes("running"), at.device, precision)


def rate(
    at: Setting,
    size: tuple[int, int],
    net: Unet | None = None,
    kind: Callable[..., Engine] | None = None,
    count: int = 1,  # of streams, each with a runtime and threads of its own
    policy: str = "block",
    frames: int = 2000,
) -> Values:
    """Frames per second of all streams, each with as many frames inside as it takes; and latency of a frame that is
    alone, since there it is the time in the queue. One frame of every runtime is compared first."""
    from fastpix2pix.runtime.native import FrameRuntime, InputSpec, OutputSpec
    from fastpix2pix.streaming.device import DeviceNetwork

    height, width = size
    multiple = 1 if net is None else net.config.multiple
    network = -(-height // multiple) * multiple, -(-width // multiple) * multiple
    frames = max(200, frames * SIZES[0][0] * SIZES[0][1] // (height * width))
    source = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    engine: Engine | None = None
    wanted = source
    if net is not None and kind is not None:
        engine = _engine(at, net, kind)
        wanted = _translated(_engine(at, net, TorchEngine, "fp32"), source, network)

    # up, through the network and down at once; or, of frames that may be dropped, as few on the way as there can be
    depth = 3 if policy == "block" else 1

    def runtime() -> FrameRuntime:
        if engine is None:
            specs = InputSpec("rgb", size, network), OutputSpec("rgb", size, network)
            return FrameRuntime(*specs, None, device=str(at.device), slots=6, depth=depth, policy=policy)
        made = DeviceNetwork(engine, *network)
        specs = (
            InputSpec("rgb", size, network, layout=made.layout, place=(0, 0, *size)),  # the rest is reflected
            OutputSpec("rgb", size, network, layout=made.layout, region=(0, 0, *size)),
        )
        return FrameRuntime(*specs, made.engine, **made.options, slots=6, depth=depth, policy=policy)

    first, *backs = [np.empty_like(source) for _ in range(count + 1)]
    one = runtime()
    graph = one.describe()["graph"]
    if at.device.type == "cuda" and graph not in ("captured", "child"):
        raise Mismatch(f"runs without a CUDA graph: {graph}")
    allowed = 0 if engine is None else 2  # levels of half precision
    off = _compare(one, source, first, wanted, allowed)
    alone = sorted(_alone(one, source, first) for _ in range(ALONE))
    one.close()
    del one
    runtimes = [runtime() for _ in range(count)]
    off = max(off, *(_compare(r, source, back, wanted, allowed) for r, back in zip(runtimes, backs, strict=True)))
    with ThreadPoolExecutor(count) as pool:
        times = list(pool.map(lambda r, back: streamed(r, source, back, frames), runtimes, backs))
    stats = runtimes[0].stats()
    for r in runtimes:
        r.close()
    latency: dict[str, Any] = dict(stats["latency"])
    values: Values = {f"{stage} p50_ms": found["p50_ms"] for stage, found in latency.items()}
    out = stats["frames"]["collected"] * count
    return {
        **values,
        "frames_per_s": round(out / max(times), 1),
        "p50_ms": round(alone[ALONE // 2], 4),
        "p99_ms": round(alone[ALONE * 99 // 100], 4),
        "graph": graph,
        "off_levels": off,
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

    submitter = threading.Thread(target=submit, daemon=True)
    start = time.perf_counter()
    submitter.start()
    while runtime.collect(back) is not None:
        pass
    seconds = time.perf_counter() - start
    submitter.join()
    return seconds


def _alone(runtime: FrameRuntime, source: np.ndarray, back: np.ndarray) -> float:
    """Milliseconds from one frame in to the same out, with nothing else inside."""
    start = time.perf_counter()
    runtime.submit(source, 0)
    runtime.collect(back)
    return 1e3 * (time.perf_counter() - start)


def _translated(engine: Engine, source: np.ndarray, network: tuple[int, int]) -> np.ndarray:
    """A frame through an engine called on its own, without a search for its fastest convolutions."""
    height, width, _ = source.shape
    padded = np.pad(source, ((0, network[0] - height), (0, network[1] - width), (0, 0)), mode="reflect")
    x = torch.from_numpy(padded).to(engine.device).permute(2, 0, 1)[None].float() / 127.5 - 1
    with exact_fp32():
        y = engine.translate(x)[0, :, :height, :width].permute(1, 2, 0)
    return ((y + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _compare(runtime: FrameRuntime, source: np.ndarray, back: np.ndarray, wanted: np.ndarray, allowed: int) -> int:
    """By how many levels one frame is off."""
    runtime.submit(source, 0)
    runtime.collect(back)
    off = int(np.abs(back.astype(int) - wanted.astype(int)).max())
    if off > allowed:
        raise Mismatch(f"a frame is off by {off} levels of 255, allowed are {allowed}")
    return off

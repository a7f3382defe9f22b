"""Pixel conversions on the CPU beside numpy and PyTorch, and frames per second of the runtime without an engine.

    python -m bench.pixels [--threads 1,2] [--size 1080x1920] [--rounds 15] [--frames 3000]

Every competitor's result is compared with the specification before it is timed. numpy is the straightforward form; of
PyTorch several forms in place, into memory given beforehand, the fastest counts. Ratios are medians of rounds in turns,
so that a busy machine disturbs both sides alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastpix2pix.runtime import native
from fastpix2pix.runtime.native import FrameRuntime, InputPlan, InputSpec, OutputPlan, OutputSpec
from fastpix2pix.runtime.pixel_spec import frame_planes, network_input

from .devices import machine
from .frame_rates import streamed
from .report import Mismatch
from .timing import Ratio, Run, Timing, interleaved

CPU = torch.device("cpu")
NETWORK = (256, 256)  # of the resize and the runtime
Array = NDArray[Any]


class Case(NamedTuple):
    """One conversion: each run writes `out`, which is compared with `wanted` before anything is timed."""

    name: str
    out: Array
    wanted: Array
    allowed: float  # difference of the competitors; ours has none
    ours: Run
    numpy: Run
    torch: dict[str, Run]


def input_case(size: tuple[int, int], layout: str, dtype: str, threads: int) -> Case:
    """uint8 rgb [H, W, 3] -> units."""
    frame = _frame(size)
    out = _tensor(size, layout, dtype)
    source, into = torch.from_numpy(frame), torch.from_numpy(out)
    source = source.permute(2, 0, 1) if layout == "nchw" else source
    work = into if dtype == "float32" else torch.empty(into.shape)

    def numpy() -> None:
        units = frame.astype(np.float32) / 127.5 - 1.0
        out[:] = units.transpose(2, 0, 1) if layout == "nchw" else units

    def finish(form: Callable[[], object]) -> None:
        form()
        if work is not into:
            into.copy_(work)

    forms = {
        "copy, div, sub": lambda: work.copy_(source).div_(127.5).sub_(1.0),
        "div, sub": lambda: torch.div(source, 127.5, out=work).sub_(1.0),
        "sub, mul": lambda: torch.sub(source, 127.5, out=work).mul_(1.0 / 127.5),
    }
    plan = InputPlan(InputSpec("rgb", size, size, layout=layout, dtype=dtype), threads)
    wanted = network_input([frame], format="rgb", frame=size, network=size, layout=layout, dtype=dtype, real=np.float32)
    runs: dict[str, Run] = {name: partial(finish, form) for name, form in forms.items()}
    return Case(f"rgb -> {layout} {dtype}", out, wanted, 1e-3, lambda: plan.run(out, frame), numpy, runs)


def output_case(size: tuple[int, int], layout: str, dtype: str, threads: int) -> Case:
    """Units -> uint8 rgb [H, W, 3], rounded to nearest."""
    units = _units(size, layout, dtype)
    out = np.empty((*size, 3), np.uint8)
    source, into = torch.from_numpy(units), torch.from_numpy(out)
    into = into.permute(2, 0, 1) if layout == "nchw" else into
    work = torch.empty(source.shape)

    def numpy() -> None:
        levels = np.clip(np.round((units.astype(np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)
        out[:] = levels.transpose(1, 2, 0) if layout == "nchw" else levels

    def exact() -> None:
        into.copy_(work.copy_(source).add_(1.0).mul_(127.5).round_().clamp_(0.0, 255.0))

    half, middle = torch.tensor(127.5), torch.tensor(128.0)  # the copy truncates: half up instead of half to even

    def truncating() -> None:
        into.copy_(torch.add(middle, source, alpha=127.5, out=work).clamp_(0.0, 255.0))

    def scaling() -> None:
        into.copy_(torch.mul(source, half, out=work).add_(middle).clamp_(0.0, 255.0))

    plan = OutputPlan(OutputSpec("rgb", size, size, layout=layout, dtype=dtype), threads)
    given: dict[str, Any] = {"frame": size, "network": size, "layout": layout, "dtype": dtype, "real": np.float32}
    [wanted] = frame_planes(units, format="rgb", **given)
    runs: dict[str, Run] = {"add, mul, round, clamp, copy": exact, "mul, add, clamp, copy": scaling}
    if dtype == "float32":
        runs["add, clamp, copy"] = truncating
    return Case(f"{layout} {dtype} -> rgb", out, wanted, 1.0, lambda: plan.run(out, units), numpy, runs)


def nv12_case(size: tuple[int, int], threads: int) -> Case:
    """nv12, BT.709 limited -> nchw float32."""
    height, width = size
    rng = np.random.default_rng(2)
    y = rng.integers(16, 236, size, dtype=np.uint8)
    uv = rng.integers(16, 241, (height // 2, width // 2, 2), dtype=np.uint8)
    out = _tensor(size, "nchw", "float32")
    r_of_v, g_of_u, g_of_v, b_of_u = 1.792741, -0.213249, -0.532909, 2.112402  # of BT.709, limited

    def numpy() -> None:
        luma = (y.astype(np.float32) - 16.0) * (255.0 / 219.0)
        u, v = (np.kron(uv[..., c].astype(np.float32) - 128.0, np.ones((2, 2), np.float32)) for c in (0, 1))
        rgb = np.stack([luma + r_of_v * v, luma + g_of_u * u + g_of_v * v, luma + b_of_u * u])
        out[:] = np.clip(rgb, 0.0, 255.0) / 127.5 - 1.0

    into, source, chroma = torch.from_numpy(out), torch.from_numpy(y), torch.from_numpy(uv)
    planes = into.view(3, height // 2, 2, width // 2, 2)
    small = torch.empty(2, height // 2, width // 2)
    tint = torch.empty(3, height // 2, width // 2)
    luma = torch.empty(size)

    def in_place() -> None:
        torch.sub(source, 16.0, out=luma).mul_(255.0 / 219.0 / 127.5).sub_(1.0)
        small.copy_(chroma.permute(2, 0, 1)).sub_(128.0).mul_(1.0 / 127.5)
        u, v = small
        torch.mul(v, r_of_v, out=tint[0])
        torch.mul(u, g_of_u, out=tint[1]).add_(v, alpha=g_of_v)
        torch.mul(u, b_of_u, out=tint[2])
        torch.add(luma.view(1, height // 2, 2, width // 2, 2), tint[:, :, None, :, None], out=planes)
        into.clamp_(-1.0, 1.0)

    plan = InputPlan(InputSpec("nv12", size, size), threads)
    wanted = network_input([y, uv], format="nv12", frame=size, network=size, real=np.float32)
    ours = partial(plan.run, out, (y, uv))
    return Case("nv12 -> nchw float32", out, wanted, 1e-3, ours, numpy, {"planes in place": in_place})


def resize_case(size: tuple[int, int], filter: str, threads: int) -> Case:
    """Fused: uint8 rgb resized to a network's size by an antialiased filter, bilinear or bicubic, and normalised."""
    frame = 64 + _frame(size) // 2  # so that bicubic overshoots stay in range: Pillow clips between its two passes
    out = _tensor(NETWORK, "nchw", "float32")
    into, source = torch.from_numpy(out), torch.from_numpy(frame).permute(2, 0, 1)[None]

    def pillow() -> None:
        small = Image.fromarray(frame).resize(NETWORK[::-1], Image.Resampling[filter.upper()])
        out[:] = (np.asarray(small).astype(np.float32) / 127.5 - 1.0).transpose(2, 0, 1)

    def interpolate(source: torch.Tensor, as_float: bool) -> None:
        given = source.float() if as_float else source
        small = torch.nn.functional.interpolate(given, NETWORK, mode=filter, antialias=True)
        into.copy_(small[0]).div_(127.5).sub_(1.0)

    plan = InputPlan(InputSpec("rgb", size, NETWORK, filter=filter), threads)
    wanted = network_input([frame], format="rgb", frame=size, network=NETWORK, filter=filter, real=np.float32)
    runs: dict[str, Run] = {
        "interpolate uint8": partial(interpolate, source, False),
        "interpolate float": partial(interpolate, source, True),
    }
    name = f"{filter} to {NETWORK[0]}x{NETWORK[1]} + normalise"
    return Case(name, out, wanted, 2.0 / 127.5, lambda: plan.run(out, frame), pillow, runs)


def cases(size: tuple[int, int], threads: int) -> Iterator[Case]:
    for layout in ("nchw", "nhwc"):
        for dtype in ("float32", "float16"):
            yield input_case(size, layout, dtype, threads)
            yield output_case(size, layout, dtype, threads)
    yield nv12_case(size, threads)
    yield resize_case(size, "bilinear", threads)
    yield resize_case(size, "bicubic", threads)


def check(case: Case) -> None:
    """Ours has the specification's bits; the competitors compute the same up to rounding."""
    for name, run in {"ours": case.ours, "numpy": case.numpy, **case.torch}.items():
        case.out.fill(0)
        run()
        difference = float(np.abs(case.out.astype(np.float64) - case.wanted.astype(np.float64)).max())
        if not difference <= (0.0 if name == "ours" else case.allowed):
            raise Mismatch(f"{case.name}, {name}: differs by {difference:.3g} from the specification")


def measure(case: Case, rounds: int) -> str:
    """A row: our milliseconds, and how many times as long numpy and the fastest PyTorch form take."""
    times = interleaved({"ours": case.ours, "numpy": case.numpy, **case.torch}, CPU, rounds, 0.02)
    found = {name: timing for name, timing in times.items() if isinstance(timing, Timing)}
    best = min(case.torch, key=lambda name: found[name].median)
    ours = found["ours"].values
    ratios = [Ratio.of(found[name].values, ours) for name in ("numpy", best)]
    columns = [f"{ratio.median:6.2f} ({ratio.low:.2f}-{ratio.high:.2f})" for ratio in ratios]
    return f"{case.name:32s} {found['ours'].median:8.2f} ms  {columns[0]:20s} {columns[1]:20s} {best}"


def frames_per_second(frames: int, threads: int = 1, device: str = "cpu") -> tuple[float, float]:
    """Of one thread that submits and one that collects 256x256 frames, the input being the output; and p99 in ms."""
    spec: dict[str, Any] = {"format": "rgb", "frame": NETWORK, "network": NETWORK}
    runtime = FrameRuntime(InputSpec(**spec), OutputSpec(**spec), None, device=device, threads=threads, slots=6)
    source, back = _frame(NETWORK), np.empty((*NETWORK, 3), np.uint8)
    seconds = streamed(runtime, source, back, frames)
    if not np.array_equal(back, source):
        raise Mismatch("frames came back different from how they went in")
    p99 = runtime.stats()["latency"]["total"]["p99_ms"]
    runtime.close()
    return frames / seconds, p99


def _frame(size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def _tensor(size: tuple[int, int], layout: str, dtype: str) -> Array:
    return np.empty((3, *size) if layout == "nchw" else (*size, 3), dtype)


def _units(size: tuple[int, int], layout: str, dtype: str) -> Array:
    return np.random.default_rng(1).uniform(-1.1, 1.1, _tensor(size, layout, dtype).shape).astype(dtype)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pixels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", default="1,2", help="comma-separated numbers of threads, of both sides")
    parser.add_argument("--size", default="1080x1920", help="height x width of the frames; even numbers")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each, taken in turns")
    parser.add_argument("--frames", type=int, default=3000, help="frames through the runtime")
    options = parser.parse_args(arguments)
    height, width = (int(side) for side in options.size.split("x"))
    print(f"{machine()}, torch {torch.__version__}, numpy {np.__version__}; frames of {height}x{width}")
    before = torch.get_num_threads()
    try:
        for threads in (int(n) for n in options.threads.split(",")):
            torch.set_num_threads(threads)
            header = (f"{threads} thread(s)", "ours", "numpy / ours", "torch / ours", "its fastest form")
            print("{:32s} {:>11s}  {:20s} {:20s} {}".format(*header))
            for case in cases((height, width), threads):
                check(case)
                print(measure(case, options.rounds), flush=True)
    finally:
        torch.set_num_threads(before)
    ways: dict[str, dict[str, Any]] = {f"{threads} thread(s) for pixels": {"threads": threads} for threads in (1, 2)}
    if native.CUDA and torch.cuda.is_available():
        ways[torch.cuda.get_device_name()] = {"device": "cuda"}
    for name, how in ways.items():
        rate, p99 = frames_per_second(options.frames, **how)
        print(f"runtime, 256x256, no engine, {name}: {rate:.0f} frames/s, p99 {p99:.3f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

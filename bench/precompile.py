"""Compile the kernels of the checks ahead, in several processes that fill Triton's cache: one alone would need minutes.

python -m bench.precompile cuda 0 8     the first of eight shares; parent: `run`
TRITON_CACHE_DIR=DIR python -m bench.precompile sm_90    without a GPU, all that one of that capability will need

DIR then serves on another machine, at the same path, with the same versions of Triton and Python; of what is in it,
*.json, *.cubin and *.so are enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpix2pix.config import Modes, NormStats, Train
from fastpix2pix.kernels.dispatch import OVERLAP, Launch, recorded
from fastpix2pix.model import build_generator
from fastpix2pix.runtime.triton_engine import TritonEngine
from fastpix2pix.training.convolution import Plans
from fastpix2pix.training.explicit_step import ExplicitStep
from fastpix2pix.training.plan_choice import Key
from fastpix2pix.training.plan_sites import Candidates, candidates_of
from fastpix2pix.training.plans import static_plans
from fastpix2pix.training.stages import How
from fastpix2pix.tuning.cache import machine
from fastpix2pix.tuning.products import Ways

from .devices import ROOT, Setting, setting
from .frame_rates import SIZES
from .kernel_cases import DTYPES, Case, cases
from .report import LONGEST, Report, Skipped, Values

MEMORY_GIB = 4  # that one process may take on the device: a context and one case at batch 16
CPU = torch.device("cpu")  # of fake tensors


def run(report: Report, at: Setting) -> None:
    """Start the processes and wait for them, for at most half of the time that the kernels have."""
    if at.device.type == "cuda":
        seconds = report.left("kernels") / 2
        report.run("kernels", "compiled ahead", lambda: _processes(at, seconds), longest=seconds + LONGEST)


def share(at: Setting, number: int, of: int) -> list[Case]:
    """Every `of`-th case of the smaller batch sizes: between them they use nearly every kernel."""
    smaller = at.batches[:2]
    every = [case for dtype in DTYPES for batch in smaller for case in cases(at, batch, dtype)]
    return every[number::of]


def _processes(at: Setting, seconds: float) -> Values:
    major, minor = torch.cuda.get_device_capability(at.device)
    if _mark(10 * major + minor).is_file():
        raise Skipped(f"all were compiled before: {_mark(10 * major + minor)}")
    memory = torch.cuda.get_device_properties(at.device).total_memory >> 30
    count = max(1, min(8, (os.cpu_count() or 1) // 2, memory // MEMORY_GIB // 2))
    command = [sys.executable, "-m", "bench.precompile", str(at.device)]
    end = time.monotonic() + seconds
    started = [
        subprocess.Popen([*command, str(i), str(count)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(count)
    ]
    ended = 0
    for process in started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
            ended += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {"processes": count, "ended in time": ended}


# ---- what will be launched, recorded on fake tensors
def step_launches(at: Setting) -> Iterator[Launch]:
    """Of the explicit step in bf16 with its own convolutions, and with the library's."""
    for batch in at.batches:
        config = _config(at, batch)
        yield from _of_steps(config, [static_plans(config), {}])


def trial_launches(at: Setting) -> Iterator[Launch]:
    """With every candidate of every node: where all products are own, and one kind alone."""
    for batch in at.batches:
        config = _config(at, batch)
        every = candidates_of(config)
        kinds = ("forward", "dgrad", "wgrad"), ("forward",), ("dgrad",), ("wgrad",)
        yield from _of_steps(
            config,
            [{key: _nth(found, n, kind) for key, found in every.items()} for n in range(4) for kind in kinds],
        )


def _nth(found: Candidates, n: int, kinds: Sequence[str]) -> Plans:
    """The n-th candidates of those products, or the last there are."""
    every = {kind: getattr(found, kind) for kind in kinds}
    return Plans(**{kind: plans[min(n, len(plans) - 1)] for kind, plans in every.items() if plans})


def _config(at: Setting, batch: int) -> Train:
    return at.config(batch, step="explicit", precision="bf16", impl="triton", graph="off")


def _of_steps(config: Train, ways: Sequence[Mapping[Key, Plans]]) -> Iterator[Launch]:
    """Of a step with each of these plans."""
    state = ExplicitStep(config, CPU, How({}, "triton"))  # real parameters, which fake operations see as fake
    shape = config.batch, 3, config.data.crop_size, config.data.crop_size
    for plans in ways:
        state.how = How(plans, "triton")
        with FakeTensorMode(allow_non_fake_inputs=True), recorded(run=False) as tape:
            levels = torch.empty(shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
            state.step(levels, levels, 0, config.lr)
        yield from tape


def case_launches(at: Setting) -> Iterator[Launch]:
    """Of the checks of single kernels, as far as fake tensors lead: to where numbers are compared."""
    for batch in at.batches:
        for dtype in DTYPES:
            for _, function in cases(at, batch, dtype):
                fake = FakeTensorMode(allow_non_fake_inputs=True)
                with contextlib.suppress(Exception), fake, recorded(run=False) as tape:
                    function()
                yield from tape


def engine_launches(at: Setting, overlaps: Sequence[bool] = (False, True)) -> Iterator[Launch]:
    """Of the Triton engine, at the sizes that are timed."""
    net = build_generator(at.config(1).generator).eval()
    multiple = net.config.multiple
    ways = [Ways(overlap, lazy) for overlap in overlaps for lazy in (False, True)]
    for statistics, precision, way in product(get_args(NormStats), ("fp16", "bf16"), ways):
        with recorded(run=False) as tape:
            engine = TritonEngine(net, Modes(norm_stats=statistics), CPU, precision, **way._asdict())
            for size in SIZES:
                height, width = (-(-side // multiple) * multiple for side in size)
                with FakeTensorMode(allow_non_fake_inputs=True):
                    engine.translate(torch.empty(1, net.config.in_channels, height, width))
        yield from tape


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One of each that Triton compiles anew: types, which numbers are 1 or multiples of 16, constants."""

    def kind(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return argument[3]
        return (argument == 1, argument % 16 == 0) if type(argument) is int else type(argument)

    found = {(launch.kernel, tuple(map(kind, launch.arguments)), launch.options): launch for launch in launches}
    return list(found.values())


def compile_launch(launch: Launch) -> None:
    """Fill Triton's cache: the kernel, and what starts it."""
    arguments = [a[3] if isinstance(a, tuple) else a for a in launch.arguments]
    launch.function.warmup(*arguments, grid=launch.grid, **dict(launch.options)).run  # noqa: B018


# ---- without a GPU
class NoGpu:
    """Triton's driver where there is no GPU: it names the target and loads nothing."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.target, self.launcher_cls, self.utils = GPUTarget("cuda", capability, 32), CudaLauncher, CudaUtils()
        self.utils.get_device_properties = lambda device: {"max_shared_mem": 227 << 10}
        self.utils.load_binary = lambda *arguments: (1, 1, 0, 0, 1024)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _without_gpu(capability: int) -> None:
    """Let Triton compile for a GPU that is not here; what it links with finds a libcuda of empty functions."""
    import triton
    from triton.backends.nvidia import driver

    sources = Path(driver.__file__), Path(driver.__file__).with_suffix(".c")
    called = {name for file in sources for name in re.findall(r"\b(cu[A-Z]\w+)\(", file.read_text(encoding="utf-8"))}
    library = Path(tempfile.mkdtemp()) / "libcuda.so.1"
    source = "".join(f"void {name}(void) {{}}\n" for name in sorted(called))
    command = ["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    triton.runtime.driver.set_active(NoGpu(capability))


def _mark(capability: int) -> Path:
    """The file in Triton's cache that says that all kernels of this source have been compiled."""
    import triton

    found = machine(CPU)
    return Path(triton.knobs.cache.dir) / f"sm_{capability}-{found['triton']}-{found['kernels']}"


def ahead(device: str) -> int:
    """Everything, in as many processes as there are processors; 0 where all of it could be compiled."""
    count = os.cpu_count() or 1
    command = [sys.executable, "-m", "bench.precompile", device]
    started = [subprocess.Popen([*command, str(i), str(count)], cwd=ROOT) for i in range(count)]
    codes = [process.wait() for process in started]
    if any(codes):
        return 1
    _mark(int(device[3:])).touch()
    return 0


def ahead_share(capability: int, number: int, of: int) -> int:
    """Every `of`-th launch; 1 where one could not be compiled."""
    at = setting(CPU, small=False)
    engines = partial(engine_launches, overlaps=(False, True) if capability >= OVERLAP else (False,))
    kinds = step_launches, trial_launches, engines, case_launches
    mine = distinct(launch for kind in kinds for launch in kind(at))[number::of]
    _without_gpu(capability)
    failed = 0
    for launch in mine:
        try:
            compile_launch(launch)
        except Exception as error:
            failed = 1
            print(f"{launch.kernel} {dict(launch.options)}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"{len(mine)} kernels of share {number} of {of}", flush=True)
    return failed


def main(device: str, number: str = "", of: str = "1") -> int:
    if device.startswith("sm_"):
        return ahead_share(int(device[3:]), int(number), int(of)) if number else ahead(device)
    for launch in distinct(step_launches(setting(CPU, False)))[int(number) :: int(of)]:
        with contextlib.suppress(Exception):  # the check itself, in the parent, will tell
            compile_launch(launch)
    for _, function in share(setting(torch.device(device), False), int(number), int(of)):
        with contextlib.suppress(Exception):
            function()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

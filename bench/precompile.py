"""Compile the kernels of the checks ahead, in several processes that fill Triton's cache: one alone would need minutes.

TRITON_CACHE_DIR=DIR python -m bench.precompile sm_90    without a GPU, all that one of that capability will need
python -m bench.precompile sm_90 100 132    what single checks and steps launch, in 100 seconds at most, on a GPU of 132
                                            multiprocessors; parent: `run`

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
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpix2pix.config import Modes, NormStats, Train
from fastpix2pix.kernels.dispatch import OVERLAP, PROCESSORS, Launch, processors, recorded
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
from .kernel_cases import DTYPES, cases
from .report import LONGEST, Report, Skipped, Values

SECONDS = 100.0  # at most, of a budget; of a small one SHARE
SHARE = 0.25
USERS = ("kernels", "gradients", "steps", "curves")  # parts that launch what is compiled
DAY = 86400.0  # seconds: time enough for everything
ALL, CHECKS = "", "-checks"  # ends of the names of marks
CPU = torch.device("cpu")  # of fake tensors
CARDS = {80: 108, 86: 84, 89: 128, 90: 132, 120: 170}  # multiprocessors of the usual one: A100, 3090, 4090, H100, 5090


def run(report: Report, at: Setting) -> None:
    """Compile what single checks and steps launch, once for all parts: they share out what is left of the budget."""
    part = next((part for part in report.shares if part in USERS), None)
    if at.device.type != "cuda" or part is None or report.goes_on:  # the process before this one had its time for it
        return
    seconds = min(SECONDS, SHARE * report.budget)
    check = partial(_in_time, at, seconds)  # not required: whoever launches a kernel compiles it
    report.run(part, "compiled ahead", check, longest=seconds + LONGEST, required=False)
    report.share_out()


def _in_time(at: Setting, seconds: float) -> Values:
    """By a process that never uses the GPU, so that it can fork."""
    major, minor = torch.cuda.get_device_capability(at.device)
    for which in (ALL, CHECKS):
        if (mark := _mark(10 * major + minor, which)).is_file():
            raise Skipped(f"all were compiled before: {mark}")
    what = f"sm_{major}{minor}", f"{seconds:.0f}", str(processors(at.device))
    command = [sys.executable, "-m", "bench.precompile", *what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"all": done.returncode == 0, "said": [*done.stderr.splitlines(), *done.stdout.splitlines()][-8:]}


# ---- what will be launched, recorded on fake tensors
def step_launches(at: Setting, processors: int) -> Iterator[Launch]:
    """Of the explicit step in bf16 with its own convolutions, and with the library's."""
    for batch in at.batches:
        config = _config(at, batch)
        yield from _of_steps(config, [static_plans(config, processors), {}])


def trial_launches(at: Setting, processors: int) -> Iterator[Launch]:
    """With every candidate of every node: where all products are own, and one kind alone."""
    for batch in at.batches:
        config = _config(at, batch)
        every = candidates_of(config, processors)
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


def case_launches(at: Setting, number: int = 0, of: int = 1) -> Iterator[Launch]:
    """Of every `of`-th check of single kernels, as far as fake tensors lead: to where numbers are compared."""
    for batch in at.batches:
        for dtype in DTYPES:
            for _, function in list(cases(at, batch, dtype))[number::of]:
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


def _mark(capability: int, which: str) -> Path:
    """The file in Triton's cache that says that these kernels of this source have been compiled."""
    import triton

    found = machine(CPU)
    return Path(triton.knobs.cache.dir) / f"sm_{capability}-{found['triton']}-{found['kernels']}{which}"


def ahead(capability: int, which: str, seconds: float, processors: int) -> int:
    """All or the checks' kernels, in as many processes as there are processors; 0 where all could be compiled in time.

    Launches are recorded once, and forked with. Only those of single checks, which take a minute to record, are
    recorded by the processes that compile them.
    """
    end, count = time.monotonic() + seconds, os.cpu_count() or 1
    at, context = setting(CPU, small=False), get_context("fork")
    torch.set_num_threads(1)  # threads would be missing after a fork, and so would CUDA's, which fake tensors look for
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    overlaps = (False, True) if capability >= OVERLAP else (False,)
    kinds = [step_launches(at, processors)]
    if which == ALL:
        kinds += [trial_launches(at, processors), engine_launches(at, overlaps)]
    started = []

    def start(shares: Iterable[Iterable[Launch]], nice: int = 0) -> None:
        for share in shares:
            started.append(context.Process(target=_compile, args=(share, capability, nice), daemon=True))
            started[-1].start()

    start((case_launches(at, number, count) for number in range(count)), nice=10)  # what follows is wanted more
    known: list[Launch] = []
    for kind in kinds:
        every = distinct([*known, *kind])
        new, known = every[len(known) :], every
        start(new[number::count] for number in range(count))
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    late, wrong = codes.count(None), sum(code not in (0, None) for code in codes)
    print(f"{count} processors, {len(codes)} shares: {late} not through in time, {wrong} that failed", flush=True)
    if late or wrong:
        return 1
    _mark(capability, which).touch()
    return 0


def _compile(launches: Iterable[Launch], capability: int, nice: int) -> None:
    """A process: exit code 1 where one could not be compiled."""
    os.nice(nice)
    mine, failed = distinct(launches), 0
    _without_gpu(capability)
    for launch in mine:
        try:
            compile_launch(launch)
        except Exception as error:
            failed = 1
            print(f"{launch.kernel} {dict(launch.options)}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    sys.exit(failed)


def main(device: str, seconds: str = "", processors: str = "") -> int:
    capability = int(device.removeprefix("sm_"))
    which, most = (CHECKS, float(seconds)) if seconds else (ALL, DAY)
    return ahead(capability, which, most, int(processors or CARDS.get(capability, PROCESSORS)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The training step and the whole training loop, against the ways others train the same networks.

Every way first trains a twin without dropout from the same weights on the same batches: its losses must be those of the
plain step in fp32. Then the real one, with dropout, is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.training.explicit_step import ExplicitStep
from fastpix2pix.training.graph import WARM_UP
from fastpix2pix.training.module_step import ModuleStep
from fastpix2pix.training.stages import How
from fastpix2pix.training.state import State

from ..baselines import CompiledGraphStep, CompiledStep, StandardStep
from ..comparison import Comparison, Make, release
from ..devices import Pair, Setting, synthetic_pairs
from ..report import Mismatch, Skipped
from ..roofline import FULL, HALF, Device, training_work
from ..timing import Run

PLAIN = "eager fp32 nchw, losses read"
STEPS = {"cuda": WARM_UP + 2, "cpu": 3}  # checked: the last two of a graphed step are replays
# Relative, of the first step and of later ones: several times what correct ways are off by. A learning rate 10 % too
# high is off by 0.02. On a GPU, fp32 convolutions are TF32 by default.
ALLOWED = {"fp32": (1e-4, 5e-3), "tf32": (5e-3, 0.05), "bf16": (0.01, 0.1)}
Build = Callable[..., State]  # (**options of train_config)


def comparisons(at: Setting) -> Iterator[Comparison]:
    """Every batch size; on a CPU, the paper's own networks at batch 1 as well."""
    for batch in at.batches:
        yield _comparison(at, batch)
    if at.device.type != "cuda" and at.scale == "full":
        paper = at._replace(options={})
        yield _comparison(paper, 1, ", unet_256")


def _comparison(at: Setting, batch: int, note: str = "") -> Comparison:
    half = at.device.type == "cuda"
    width = HALF if half else FULL

    def floor_ms(device: Device) -> float:
        return training_work(at.config(batch), batch, width).floor_ms(device)

    ways: dict[str, Make] = {}
    for name, (build, precision, nchw) in _ways(at, batch, brief=bool(note)).items():
        ways[name] = partial(_checked, at, batch, build, precision, nchw)
    ours = "explicit bf16, one CUDA graph" if half else "modules fp32"
    slow = frozenset(name for name in ways if name.startswith("torch.compile"))
    name = f"batch {batch}{note}"
    return Comparison("steps", name, ways, ours, PLAIN, images=batch, floor_ms=floor_ms, slow=slow)


def _ways(at: Setting, batch: int, *, brief: bool) -> dict[str, tuple[Build, str, bool]]:
    """name -> (build, precision, whether it is fed NCHW)."""

    def config_of(precision: str, **options: object):  # type: ignore[no-untyped-def]
        return at.config(batch, precision=precision, **options)

    def standard(precision: str, channels_last: bool, read: bool, **options: object) -> State:
        if precision == "bf16" and at.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise Skipped("this CPU has no bf16, and would emulate it")
        return StandardStep(config_of(precision, **options), at.device, read=read, channels_last=channels_last)

    def modules(precision: str, **options: object) -> State:
        return ModuleStep(config_of(precision, **options), at.device)

    def explicit(precision: str, graph: str, **options: object) -> State:
        if graph == "on" and at.device.type != "cuda":
            raise Skipped("a CUDA graph needs a CUDA device")
        return ExplicitStep(config_of(precision, step="explicit", graph=graph, **options), at.device, How())

    def compiled(kind: type[CompiledStep], mode: str | None, **options: object) -> State:
        if kind is CompiledGraphStep and at.device.type != "cuda":
            raise Skipped("a CUDA graph needs a CUDA device")
        more = {} if mode is None else {"mode": mode}
        return kind(config_of(fast, **options), at.device, at.compile_backend, **more)

    fast = "bf16" if at.device.type == "cuda" else "fp32"
    found: dict[str, tuple[Build, str, bool]] = {
        PLAIN: (partial(standard, "fp32", False, True), "fp32", True),
        f"modules {fast}": (partial(modules, fast), fast, False),
    }
    if brief:
        return found
    found["eager bf16 autocast, channels-last"] = (partial(standard, "bf16", True, False), "bf16", False)
    found[f"explicit {fast}"] = (partial(explicit, fast, "off"), fast, False)
    if at.device.type == "cuda":
        found["explicit bf16, one CUDA graph"] = (partial(explicit, "bf16", "on"), "bf16", False)
    found[f"torch.compile {fast}"] = (partial(compiled, CompiledStep, None), fast, False)
    if at.compile_backend == "inductor":
        autotuned = partial(compiled, CompiledStep, "max-autotune-no-cudagraphs")
        found[f"torch.compile {fast}, max-autotune"] = (autotuned, fast, False)
    if at.device.type == "cuda":
        whole = partial(compiled, CompiledGraphStep, None)
        found["torch.compile bf16, whole-step CUDA graph"] = (whole, "bf16", False)
    return found


def _checked(at: Setting, batch: int, build: Build, precision: str, nchw: bool) -> Run:
    """A run of steps, after a twin without dropout did what the plain step does."""
    try:
        _require_same(at, batch, build, precision, nchw)
        state = build()
    except EnvironmentFailed as error:
        raise Skipped(str(error)) from None
    return stepper(state, _laid_out(synthetic_pairs(at.config(batch), 4, at.device, seed=7), nchw))


def stepper(state: State, pairs: list[Pair]) -> Run:
    """Steps over the pairs in turns."""
    numbers, lr = itertools.count(), state.config.lr

    def step() -> Tensor:
        number = next(numbers)
        return state.step(*pairs[number % len(pairs)], number, lr)

    return step


def _require_same(at: Setting, batch: int, build: Build, precision: str, nchw: bool) -> None:
    wanted = _true_losses(at.device, tuple(sorted(at.options.items())), batch)
    twin = build(dropout="none")
    got = _losses(twin, _laid_out(_pairs(at, batch), nchw))
    del twin
    release(at)
    off = (got - wanted).abs() / wanted.abs().clamp(min=0.1)
    kind = "tf32" if precision == "fp32" and at.device.type == "cuda" else precision
    for what, found, allowed in zip(("first", "later"), (off[0], off[1:]), ALLOWED[kind], strict=True):
        if not float(found.max()) <= allowed:
            raise Mismatch(f"losses of the {what} steps: off by {float(found.max()):.3g}, allowed {allowed:g}")


@cache
def _true_losses(device: torch.device, options: tuple[tuple[str, object], ...], batch: int) -> Tensor:
    """[steps, 4] of the plain step in fp32, without TF32."""
    at = Setting(device, (batch,), dict(options), 0, (1, 1), 1, 0.0, "eager")
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        state = ModuleStep(at.config(batch, precision="fp32", dropout="none"), device)
        return _losses(state, _pairs(at, batch))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def _pairs(at: Setting, batch: int) -> list[Pair]:
    return synthetic_pairs(at.config(batch), STEPS[at.device.type], at.device, seed=5)


def _laid_out(pairs: list[Pair], nchw: bool) -> list[Pair]:
    return [(x.contiguous(), y.contiguous()) for x, y in pairs] if nchw else pairs


def _losses(state: State, pairs: list[Pair]) -> Tensor:
    lr = state.config.lr
    return torch.stack([state.step(x, y, i, lr).clone().cpu() for i, (x, y) in enumerate(pairs)])

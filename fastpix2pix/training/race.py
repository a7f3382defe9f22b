"""The explicit step against the modules, once on every GPU: only where it is right and faster does step = auto take it.

Right: step after step its losses are those of its own plain twins, with the same dropout. All of it happens in a
process of its own, which a kernel may bring down.

python -m fastpix2pix.training.race DEVICE < CONFIG    prints a line when it begins, and at its end
{"explicit": milliseconds or why not, "modules": likewise}
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Train, from_record
from ..device import resolve_precision
from ..errors import EnvironmentFailed
from ..kernels.dispatch import current
from ..tuning.cache import PlanCache, source_hash
from ..tuning.verdicts import OUT_OF_MEMORY, clearly_faster, ended_from_outside, one_line
from .explicit_step import ExplicitStep
from .graph import WARM_UP
from .module_step import ModuleStep
from .stages import How
from .state import LOSSES, State
from .tune import random_pair, subject

Race = dict[str, float | str]  # explicit, modules: milliseconds a step, or why it is not to be used
Pair = tuple[Tensor, Tensor]

CHECKED = WARM_UP + 3  # steps: where the step is a CUDA graph, the last ones are replays
# Relative, of the first step and of later ones, in which roundings have gone through Adam
ALLOWED = {"fp32": (5e-3, 0.05), "bf16": (0.01, 0.1), "fp16": (0.005, 0.1)}
WAY = 0.05  # likewise: one rate or moment that is not the same, and it is several times that
_SAMPLE_S, _ENOUGH_S = 0.2, 2.0  # seconds of a sample and of all, about
_TIME_IS_UP = "time is up"
BEGUN = "begun"  # the package is imported and the GPU can be used: what happens from here on, kernels did


def kept(config: Train, device: torch.device, cache: PlanCache | None = None) -> Race | None:
    """What an earlier race found."""
    return (cache or PlanCache(device)).load(_subject(config, device))


def held(
    config: Train,  # step = auto
    device: torch.device,
    minutes: float,  # of wall time, at most
    cache: PlanCache | None = None,
    command: Sequence[str] | None = None,  # default: this module
) -> Race:
    """Run the race in another process, and keep what it finds of the kernels; not what time or memory decided.

    Raises EnvironmentFailed where the process does not get as far as the race.
    """
    command = command or [sys.executable, "-m", __name__, str(device)]
    try:
        ended = subprocess.run(
            command, input=json.dumps(asdict(config)), capture_output=True, text=True, timeout=60 * minutes, check=False
        )
    except subprocess.TimeoutExpired:
        return {"explicit": f"{_TIME_IS_UP} after {minutes:g} minutes; another run goes on from the kernels compiled"}
    lines, last = ended.stdout.splitlines(), " ".join(ended.stderr.split())[-200:]
    if BEGUN not in lines:
        raise EnvironmentFailed(
            f"the race ended with {ended.returncode} before it began ({last}); run again, or use step = modules"
        )
    try:
        found: Race = json.loads(lines[-1])
    except ValueError:
        found = {"explicit": f"its process ended with {ended.returncode} ({last})"}
    if OUT_OF_MEMORY not in found.values() and not ended_from_outside(ended.returncode):
        (cache or PlanCache(device)).save(_subject(config, device), found)
    return found


class Course(NamedTuple):
    """What some steps did."""

    losses: Tensor  # [CHECKED, 4]
    way: Tensor  # [2]: how far the weights of generator and discriminator have moved, Euclidean


def race(config: Train, device: torch.device, impl: str = "triton") -> Race:
    """Check the explicit step, then time both. Nothing is raised for what one of them does."""
    explicit = replace(config, step="explicit", convolutions="library", init=None, init_discriminator=None)
    precision = resolve_precision(config.precision, device)
    found: Race = {}

    def racer(name: str) -> State:
        return ModuleStep(config, device) if name == "modules" else ExplicitStep(explicit, device, How(impl=impl))

    try:
        pairs = [random_pair(config, device, seed) for seed in (1, 2)]
        twin = ExplicitStep(replace(explicit, graph="off"), device, How(impl="reference"))
        wanted = _course(twin, pairs)
        del twin
        wrong = _wrong(_course(racer("explicit"), pairs), wanted, precision)
        if wrong:
            return {"explicit": wrong}
        for name in ("explicit", "modules"):
            gc.collect()  # a captured step is a cycle and holds memory
            found[name] = _ms(racer(name), pairs, device)
    except Exception as error:  # whatever a kernel, a compiler or a driver raises
        found["explicit"] = one_line(error)
    return found


def explicit_wins(found: Race) -> bool:
    """Whether the explicit step is to be taken."""
    return clearly_faster(found.get("explicit"), found.get("modules"))


def in_words(found: Race) -> str:
    """One line."""
    own, other = found.get("explicit"), found.get("modules")
    if isinstance(own, float) and isinstance(other, float):
        return f"step = auto: on this GPU the explicit step takes {own:.2f} ms, modules {other:.2f} ms"
    return f"step = auto: not the explicit one: {own}"


def _subject(config: Train, device: torch.device) -> dict[str, Any]:
    more = {"kind": "race", "ema": bool(config.ema), "steps": source_hash(__file__)}
    return subject(config, device) | more


def _course(state: State, pairs: list[Pair]) -> Course:
    """CHECKED steps over two batches in turns, the last at another rate: what a stale copy of either would miss."""
    nets = [net for net in (state.generator, state.discriminator) if net is not None]
    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    rates = [state.config.lr * (0.5 if number > WARM_UP else 1) for number in range(CHECKED)]
    losses = torch.stack([state.step(*pairs[n % 2], n, lr).clone().cpu() for n, lr in enumerate(rates)])
    with torch.no_grad():
        moved = [
            [p - old for p, old in zip(net.parameters(), olds, strict=True)]
            for net, olds in zip(nets, before, strict=True)
        ]
        way = [torch.stack(torch._foreach_norm(parts)).norm().cpu() for parts in moved]
    return Course(losses, torch.stack(way))


def _wrong(got: Course, wanted: Course, precision: str) -> str:
    """What differs too much; "" where nothing does."""
    off = (got.losses - wanted.losses).abs() / wanted.losses.abs().clamp(min=0.1)
    for number, row in enumerate(off):
        allowed = ALLOWED[precision][min(number, 1)]
        for name, value in zip(LOSSES, row.tolist(), strict=True):
            if not value <= allowed:
                return f"wrong: {name} of step {number} is off by {value:.2g} of its twin's, allowed {allowed:g}"
    for name, way, right in zip(("generator", "discriminator"), got.way.tolist(), wanted.way.tolist(), strict=False):
        if not abs(way - right) <= WAY * right:
            return f"wrong: the {name}'s weights moved {way:.4g}, its twin's {right:.4g}; allowed are {WAY:.0%} between"
    return ""


def _ms(state: State, pairs: list[Pair], device: torch.device) -> float:
    """Milliseconds a step, the fastest of some samples, with the host's part: what a training loop would see."""
    numbers = iter(range(1 << 30))

    def seconds(steps: int) -> float:
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(steps):
            number = next(numbers)
            state.step(*pairs[number % 2], number, state.config.lr)
        _synchronise(device)
        return time.perf_counter() - start

    seconds(WARM_UP + 2)
    steps = 1 + int(_SAMPLE_S / seconds(1))
    found, end = [seconds(steps)], time.perf_counter() + _ENOUGH_S
    while time.perf_counter() < end:
        found.append(seconds(steps))
    return 1e3 * min(found) / steps


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(name: str) -> None:
    """Race as stdin says."""
    config, device = from_record(Train, json.load(sys.stdin)), torch.device(name)
    torch.backends.cudnn.benchmark = True  # as in training
    with current(device):
        torch.zeros(1, device=device)
        _synchronise(device)
        print(BEGUN, flush=True)
        print(json.dumps(race(config, device)))


if __name__ == "__main__":
    main(*sys.argv[1:])

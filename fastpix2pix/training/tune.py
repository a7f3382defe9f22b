"""Choose who computes each convolution of a step, by measurement on this device.

For every node and pass the candidates are compared with plain torch, then timed with all that they save or cost around
them (plan_sites.py); the best combination is found (plan_choice.py), and has to win once more as a whole step. What was
measured is kept (tuning/cache.py), and continued where the time was short.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..config import Train
from ..device import resolve_precision
from ..errors import EnvironmentFailed
from ..kernels.conv_plan import ConvPlan
from ..kernels.dispatch import current, environment_reasons, processors
from ..kernels.wgrad_plan import WgradPlan
from ..tuning.cache import PlanCache
from ..tuning.measure import step_ms, usable
from ..tuning.verdicts import OUT_OF_MEMORY, one_line
from .convolution import Plans
from .explicit_step import ExplicitStep
from .plan_choice import Key, Times, best_plans
from .plan_sites import sites_of
from .plans import static_plans
from .stages import How
from .trial_processes import process_count, verdicts
from .trials import product_name, tables_of, trials_of

Say = Callable[[str], None]
Count = Callable[[int, int], None]  # done, of how many


@dataclass
class Tuned:
    """What was found."""

    plans: dict[Key, Plans]
    times: dict[str, float | str]  # by Trial.name: milliseconds, or why it was not timed
    steps: dict[str, float | str]  # likewise of whole steps: library, static, searched
    winner: str  # of them
    complete: bool  # nothing is left to be measured

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plans = []
        for (weight, images), found in self.plans.items():
            plans.append([weight, images, *(None if p is None else list(p) for p in found)])
        return {**vars(self), "plans": plans}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Tuned:
        """From its JSON form."""
        kinds, plans = (ConvPlan, ConvPlan, WgradPlan), {}
        for weight, images, *given in record["plans"]:
            found = (None if p is None else kind(*p) for kind, p in zip(kinds, given, strict=True))
            plans[weight, images] = Plans(*found)
        return cls(**{**record, "plans": plans})

    def summary(self) -> str:
        """One line: what was chosen and why."""
        if not self.steps:
            return "convolutions: the library's; too little was measured to choose (raise tune_minutes)"
        own = sum(plan is not None for plans in self.plans.values() for plan in plans)
        took = ", ".join(f"{n} {t:.3f} ms" if isinstance(t, float) else f"{n} failed" for n, t in self.steps.items())
        return f"convolutions: {self.winner}, {own} of {3 * len(self.plans)} by own kernels; whole steps: {took}"

    def table(self) -> list[str]:
        """A line for every product: the library's time, the best own one, what was chosen."""
        rows = []
        for key, plans in self.plans.items():
            for product, chosen in zip(Plans._fields, plans, strict=True):
                start = product_name(key, product)
                found = {name: t for name, t in self.times.items() if name.startswith(start)}
                library = found.pop(f"{start}library", None)
                timed = [t for t in found.values() if isinstance(t, float)]
                failed = len(found) - len(timed)
                rows.append(
                    f"{start}library {_shown(library)}, own {_shown(min(timed, default=None))} -> "
                    + ("library" if chosen is None else ".".join(map(str, chosen)))
                    + (f" ({failed} not timed)" if failed else "")
                )
        return rows


def _shown(t: float | str | None) -> str:
    return f"{t:.4f} ms" if isinstance(t, float) else "not measured"


def cached(config: Train, device: torch.device, cache: PlanCache | None = None) -> Tuned | None:
    """What an earlier run found for this configuration and this machine."""
    record = (cache or PlanCache(device)).load(subject(config, device))
    return None if record is None else Tuned.from_dict(record)


def tune(
    config: Train,  # of a training with step = explicit
    device: torch.device,
    minutes: float,  # of wall time, about
    *,
    impl: str = "triton",
    cache: PlanCache | None = None,
    afresh: bool = False,  # do not go on from what is kept
    count: Count = lambda done, total: None,
    say: Say = lambda text: None,
) -> Tuned:
    """Measure, choose, keep; where something ends it before, what was measured.

    Raises EnvironmentFailed where kernels cannot run, the cache cannot be written, or a kernel broke the device.
    """
    if impl == "triton" and (reasons := environment_reasons(device.type)):
        raise EnvironmentFailed(f"tune: {'; '.join(reasons)}")
    cache, end = cache or PlanCache(device), time.monotonic() + 60 * minutes
    kept = None if afresh else cached(config, device, cache)
    times = dict(kept.times) if kept else {}
    torch.backends.cudnn.benchmark = not config.deterministic  # the library at its best, as in training
    try:
        with current(device):
            tables, searched, complete = _measure(config, device, impl, times, end, count, say)
            plans, steps, winner = _race(config, device, impl, tables, searched)
            complete = complete and OUT_OF_MEMORY not in steps.values()
    except BaseException:  # Ctrl-C too
        before = kept or Tuned({}, {}, {}, "library", False)
        if times != before.times:
            with suppress(EnvironmentFailed):  # a full disk is not what ended it
                cache.save(subject(config, device), replace(before, times=times, complete=False).as_dict())
        raise
    tuned = Tuned(plans, times, steps, winner, complete)
    cache.save(subject(config, device), tuned.as_dict())
    if broken := [name for name, ms in steps.items() if isinstance(ms, str)]:
        _require_usable(device, f"a whole step ({broken[-1]}: {steps[broken[-1]]})")
    return tuned


def subject(config: Train, device: torch.device) -> dict[str, Any]:
    """All of a configuration that changes what a step computes, or how fast."""
    names = ("ndf", "n_layers", "objective", "gan_loss", "batch", "pool", "graph")
    return {
        "kind": "training step",
        "generator": asdict(config.generator),
        "crop_size": config.data.crop_size,
        "precision": resolve_precision(config.precision, device),
        **{name: getattr(config, name) for name in names},
    }


def try_trials(
    config: Train, device: torch.device, impl: str, names: Sequence[str]
) -> Iterator[tuple[str, str | None]]:
    """(name, None) before each trial of these and (name, verdict) after."""
    trials = trials_of(sites_of(config, device, resolve_precision(config.precision, device), impl))
    for name in names:
        yield name, None
        yield name, trials[name].verdict()


def random_pair(config: Train, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of (input, target) as a loader gives it: uint8."""
    size, draws = config.data.crop_size, torch.Generator().manual_seed(seed)

    def images(channels: int) -> torch.Tensor:
        x = torch.randint(256, (config.batch, channels, size, size), generator=draws, dtype=torch.uint8).to(device)
        return x.contiguous(memory_format=torch.channels_last)

    return images(config.generator.in_channels), images(config.generator.out_channels)


def _measure(
    config: Train,
    device: torch.device,
    impl: str,
    times: dict[str, float | str],  # added to
    end: float,  # of the time, as time.monotonic() has it
    count: Count,
    say: Say,
) -> tuple[dict[Key, Times], dict[Key, Plans], bool]:
    """(all that is known, the best of it, whether nothing is left)."""
    found = sites_of(config, device, resolve_precision(config.precision, device), impl)
    trials = trials_of(found)
    left = [name for name in trials if name not in times]
    if device.type == "cuda" and left:  # a kernel may bring its process down, and compiling takes several of them
        say(f"convolutions: {len(left)} ways to compute them are checked, then timed")
        judged = verdicts(config, device, impl, left, process_count(device), 0.7 * (end - time.monotonic()))
        times |= {name: verdict for name, verdict in judged.items() if verdict}
        left = [name for name in left if judged.get(name) == ""]
    for done, name in enumerate(left):
        if time.monotonic() > end:
            break
        wrong = "" if device.type == "cuda" else trials[name].verdict()
        if (measured := wrong or trials[name].ms(device)) != OUT_OF_MEMORY:
            times[name] = measured
        if isinstance(measured, str):
            _require_usable(device, f"{name} ({measured})")
        count(done + 1, len(left))
    tables = tables_of(found, trials, times)
    return tables, best_plans(tables, found.readers), len(times) == len(trials)


def _require_usable(device: torch.device, after: str) -> None:
    if not usable(device):
        raise EnvironmentFailed(
            f"tune: {device} cannot be used any more by this process after {after}; run again: what was measured is "
            "kept, and what is left is measured then"
        )


def _race(
    config: Train, device: torch.device, impl: str, tables: Mapping[Key, Times], searched: dict[Key, Plans]
) -> tuple[dict[Key, Plans], dict[str, float | str], str]:
    """(plans, milliseconds by racer, winner): whole steps, since a sum of parts is a prediction."""
    if not searched:
        return {}, {}, "library"
    static = {key: _known(plans, tables[key]) for key, plans in static_plans(config, processors(device)).items()}
    racers = {"library": dict.fromkeys(searched, Plans()), "static": static, "searched": searched}
    steps: dict[str, float | str] = {}
    for name, plans in racers.items():
        gc.collect()  # a captured step is a cycle and holds memory
        try:
            steps[name] = _step_ms(config, device, impl, plans)
        except Exception as error:
            steps[name] = one_line(error)
            if not usable(device):  # the others would fail too: one of those before has won
                break
    timed = {name: ms for name, ms in steps.items() if isinstance(ms, float)}
    winner = min(timed, key=lambda name: timed[name], default="library")
    return racers[winner], steps, winner


def _known(plans: Plans, table: Times) -> Plans:
    """Only what was found right and timed."""
    forward = {plan for plan, _, _ in table.forward}
    wgrad = {plan for plan, _ in table.wgrad}
    return Plans(
        plans.forward if plans.forward in forward else None,
        plans.dgrad if plans.dgrad in table.dgrad else None,
        plans.wgrad if plans.wgrad in wgrad else None,
    )


def _step_ms(config: Train, device: torch.device, impl: str, plans: Mapping[Key, Plans]) -> float:
    state = ExplicitStep(replace(config, step="explicit", graph="off"), device, How(plans, impl))
    x, y = random_pair(config, device, seed=1)
    with torch.no_grad():
        return step_ms(lambda: state.body(x, y, 0), device)

"""Choose who computes each convolution of a step, by measurement on this device.

For every node and pass the candidates are compared with plain torch, then timed with all that they save or cost around
them (plan_sites.py); the best combination is searched (plan_choice.py), and has to win once more as a whole step. What
was measured is kept (tuning/cache.py) and continued where the time was short.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..config import Train
from ..device import resolve_precision
from ..errors import EnvironmentFailed
from ..kernels.conv_plan import ConvPlan
from ..kernels.dispatch import environment_reasons
from ..kernels.wgrad_plan import WgradPlan
from ..tuning.cache import PlanCache
from ..tuning.measure import device_ms, step_ms
from .convolution import Plans
from .explicit_step import ExplicitStep
from .plan_choice import Key, Times, best_plans
from .plan_sites import Run, Site, sites_of
from .plans import static_plans
from .precompile import compile_ahead
from .stages import How

Say = Callable[[str], None]
Count = Callable[[int, int], None]  # done, of how many
Plan = ConvPlan | WgradPlan | None
RACERS = ("library", "static", "searched")


@dataclass(frozen=True)
class Trial:
    """One thing to measure at a site."""

    key: Key
    product: str  # forward, dgrad, wgrad
    plan: Plan
    own: bool = False  # the input as own products read it
    raw: bool = False  # the output left raw

    @property
    def name(self) -> str:
        """Its key in a record."""
        weight, images = self.key
        plan = "library" if self.plan is None else ".".join(map(str, self.plan))
        return f"{weight} x{images} {self.product} {plan}{' own' * self.own}{' raw' * self.raw}"


@dataclass
class Tuned:
    """What was found."""

    plans: dict[Key, Plans]
    times: dict[str, float | str]  # by Trial.name: milliseconds, or why it was not timed
    steps: dict[str, float | str]  # milliseconds of whole steps by racer
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
        own = sum(p is not None for plans in self.plans.values() for p in plans)
        all_ = 3 * len(self.plans)
        took = ", ".join(f"{n} {t:.3f} ms" if isinstance(t, float) else f"{n} failed" for n, t in self.steps.items())
        return f"convolutions: {self.winner}, {own} of {all_} products by own kernels; whole steps: {took}"

    def table(self) -> list[str]:
        """A line for every product: the library's time, the best own one, what was chosen."""
        rows = []
        for weight, images in self.plans:
            for product in ("forward", "dgrad", "wgrad"):
                start = f"{weight} x{images} {product} "
                found = {name: t for name, t in self.times.items() if name.startswith(start)}
                timed = {name: t for name, t in found.items() if isinstance(t, float) and " library" not in name}
                library = found.get(f"{start}library")
                best = min(timed, key=lambda name: timed[name], default=None)
                chosen = getattr(self.plans[weight, images], product)
                failed = sum(isinstance(t, str) for t in found.values())
                rows.append(
                    f"{start}library {_ms(library)}, own {_ms(timed[best]) if best else 'none'}"
                    f" -> {'library' if chosen is None else '.'.join(map(str, chosen))}"
                    + (f" ({failed} not timed)" if failed else "")
                )
        return rows


def _ms(t: float | str | None) -> str:
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
    """Measure, choose, keep. Raises EnvironmentFailed where kernels cannot run or the cache be written."""
    cache = cache or PlanCache(device)
    end = time.monotonic() + 60 * minutes
    kept = None if afresh else cached(config, device, cache)
    times = dict(kept.times) if kept else {}
    precision = resolve_precision(config.precision, device)
    if impl == "triton" and (reasons := environment_reasons(device.type)):
        raise EnvironmentFailed(f"own kernels cannot run here: {'; '.join(reasons)}")
    found = sites_of(config, device, precision, impl)
    trials = [trial for site in found.sites for trial in _trials(site)]
    sites = {site.key: site for site in found.sites}
    if device.type == "cuda" and any(trial.name not in times for trial in trials):
        say("convolutions: compiling candidates")
        compile_ahead(config, device, torch.cuda.max_memory_allocated(device), (end - time.monotonic()) / 2)
    done = 0
    with torch.no_grad():
        for trial in trials:
            if trial.name not in times and time.monotonic() < end:
                times[trial.name] = _measured(sites[trial.key], trial, device)
            done += trial.name in times
            count(done, len(trials))
    complete = done == len(trials)
    searched = best_plans(_tables(found.sites, trials, times), found.readers)
    del found, sites
    plans, steps, winner = _race(config, device, impl, searched, say)
    tuned = Tuned(plans, times, steps, winner, complete)
    cache.save(subject(config, device), tuned.as_dict())
    return tuned


def try_all(config: Train, device: torch.device, number: int, of: int) -> None:
    """Run every `of`-th trial once, from `number` on, so that its kernels get compiled; failures are ignored."""
    sites = sites_of(config, device, resolve_precision(config.precision, device), "triton").sites
    pairs = [(site, trial) for site in sites for trial in _trials(site) if trial.plan is not None]
    for site, trial in pairs[number::of]:
        with suppress(Exception), torch.no_grad():
            _error(site, trial)
            _run(site, trial)()


def subject(config: Train, device: torch.device) -> dict[str, Any]:
    """All of a configuration that changes what a step computes, or how fast."""
    data = {"crop_size": config.data.crop_size}
    names = ("ndf", "n_layers", "objective", "gan_loss", "batch", "pool", "graph")
    return {
        "kind": "training step",
        "generator": asdict(config.generator),
        "precision": resolve_precision(config.precision, device),
        **data,
        **{name: getattr(config, name) for name in names},
    }


def _trials(site: Site) -> Iterator[Trial]:
    """The library first; then each plan in each form that its neighbours may leave it."""
    key, candidates = site.key, site.candidates
    yield Trial(key, "forward", None)
    for plan in candidates.forward:
        for own in site.forms():
            yield Trial(key, "forward", plan, own)
            if plan.splits == 1 and site.may_stay_raw():
                yield Trial(key, "forward", plan, own, raw=True)
    if site.goes_on:
        yield from (Trial(key, "dgrad", plan) for plan in (None, *candidates.dgrad))
    if site.learns:
        yield Trial(key, "wgrad", None)
        yield from (Trial(key, "wgrad", plan, own) for plan in candidates.wgrad for own in site.forms())


def _measured(site: Site, trial: Trial, device: torch.device) -> float | str:
    """Milliseconds; or the reason why not, where the numbers are wrong or the device refuses."""
    try:
        if trial.plan is not None and (wrong := _error(site, trial)):
            return wrong
        return device_ms(_run(site, trial), device)
    except Exception as error:  # out of registers or memory, a compiler's failure: the library stays
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _error(site: Site, trial: Trial) -> str:
    if isinstance(trial.plan, WgradPlan):
        return site.wgrad_error(trial.plan, trial.own)
    assert trial.plan is not None
    return site.dgrad_error(trial.plan) if trial.product == "dgrad" else site.forward_error(trial.plan, trial.own)


def _run(site: Site, trial: Trial) -> Run:
    if trial.product == "wgrad":
        assert not isinstance(trial.plan, ConvPlan)
        return site.wgrad_run(trial.plan, trial.own)
    assert not isinstance(trial.plan, WgradPlan)
    if trial.product == "dgrad":
        return site.dgrad_run(trial.plan)
    return site.forward_run(trial.plan, trial.own, trial.raw)


def _tables(sites: list[Site], trials: list[Trial], times: dict[str, float | str]) -> dict[Key, Times]:
    """What the search reads. Where a form does not differ, one measurement stands for both."""
    tables = {site.key: Times() for site in sites}
    for trial in trials:
        ms = times.get(trial.name)
        if not isinstance(ms, float):
            continue
        table = tables[trial.key]
        if isinstance(trial.plan, WgradPlan) or trial.product == "wgrad":
            table.wgrad[trial.plan, trial.own] = ms  # type: ignore[index]
        elif trial.product == "dgrad":
            table.dgrad[trial.plan] = ms
        else:
            table.forward[trial.plan, trial.own, trial.raw] = ms
    for site in sites:
        table = tables[site.key]
        if not site.goes_on:
            table.dgrad[None] = 0.0
        if not site.learns:  # its readers' wish alone decides
            for plan in (None, *site.candidates.wgrad[:1]):
                table.wgrad[plan, False] = 0.0
        if True not in site.forms():
            table.forward.update({(p, True, raw): ms for (p, _, raw), ms in table.forward.items() if p is not None})
        for plan in [p for p, own in table.wgrad if p is not None and not own]:
            if not site.learns or True not in site.forms():
                table.wgrad[plan, True] = table.wgrad[plan, False]
    return tables


def _race(
    config: Train, device: torch.device, impl: str, searched: dict[Key, Plans], say: Say
) -> tuple[dict[Key, Plans], dict[str, float | str], str]:
    """(plans, milliseconds by racer, winner): whole steps, since a sum of parts is a prediction."""
    if not searched:
        return {}, {}, "library"
    static = static_plans(config)
    racers = {"library": dict.fromkeys(searched, Plans()), "static": static, "searched": searched}
    steps: dict[str, float | str] = {}
    for name in RACERS:
        gc.collect()  # a captured step is a cycle and holds memory
        try:
            steps[name] = _step_ms(config, device, impl, racers[name])
        except Exception as error:
            steps[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            say(f"convolutions: {name}: {steps[name]}")
    timed = {name: ms for name, ms in steps.items() if isinstance(ms, float)}
    winner = min(timed, key=lambda name: timed[name], default="library")
    return racers[winner], steps, winner


def _step_ms(config: Train, device: torch.device, impl: str, plans: dict[Key, Plans]) -> float:
    state = ExplicitStep(replace(config, step="explicit", graph="off"), device, How(plans, impl))
    size, generator = config.data.crop_size, config.generator
    draws = torch.Generator().manual_seed(1)

    def images(channels: int) -> torch.Tensor:
        x = torch.rand(config.batch, channels, size, size, generator=draws).mul_(2).sub_(1).to(device)
        return x.contiguous(memory_format=torch.channels_last)

    x, y = images(generator.in_channels), images(generator.out_channels)
    with torch.no_grad():
        return step_ms(lambda: state.body(x, y, 0), device)

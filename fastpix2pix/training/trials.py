"""Everything that can be measured at the sites of a step, each by a name under which its time is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..kernels.conv_plan import ConvPlan
from ..kernels.wgrad_plan import WgradPlan
from ..tuning.measure import device_ms
from ..tuning.verdicts import one_line
from .plan_choice import Key, Times
from .plan_sites import Run, Site, Sites


@dataclass(frozen=True)
class Trial:
    """One way to compute one product of one node."""

    site: Site
    product: str  # forward, dgrad, wgrad
    plan: ConvPlan | WgradPlan | None  # None: the library
    own: bool = False  # the input as own products read it
    raw: bool = False  # the output left raw

    @property
    def name(self) -> str:
        """Of the node, the product and the way."""
        plan = "library" if self.plan is None else ".".join(map(str, self.plan))
        return f"{product_name(self.site.key, self.product)}{plan}{' own' * self.own}{' raw' * self.raw}"

    @torch.no_grad()
    def verdict(self) -> str:
        """ "" where it may be timed; else what is wrong with its numbers, or what the compiler or the device says."""
        try:
            wrong = "" if self.plan is None else self._error()
            if not wrong:
                self._run()()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # what goes wrong in it is said here
            return wrong
        except Exception as error:
            return one_line(error)

    @torch.no_grad()
    def ms(self, device: torch.device) -> float | str:
        """Milliseconds, or why there are none."""
        try:
            return device_ms(self._run(), device)
        except Exception as error:
            return one_line(error)

    def _error(self) -> str:
        if isinstance(self.plan, WgradPlan):
            return self.site.wgrad_error(self.plan, self.own)
        assert self.plan is not None
        if self.product == "dgrad":
            return self.site.dgrad_error(self.plan)
        return self.site.forward_error(self.plan, self.own)

    def _run(self) -> Run:
        if self.product == "wgrad":
            assert not isinstance(self.plan, ConvPlan)
            return self.site.wgrad_run(self.plan, self.own)
        assert not isinstance(self.plan, WgradPlan)
        if self.product == "dgrad":
            return self.site.dgrad_run(self.plan)
        return self.site.forward_run(self.plan, self.own, self.raw)


def product_name(key: Key, product: str) -> str:
    """What the names of all trials of one product begin with."""
    weight, images = key
    return f"{weight} x{images} {product} "


def trials_of(found: Sites) -> dict[str, Trial]:
    """By name; of each product the library first."""
    return {trial.name: trial for site in found.sites for trial in _trials_at(site)}


def _trials_at(site: Site) -> Iterator[Trial]:
    """Each plan in each form that the neighbours may leave it."""
    candidates, forms = site.candidates, site.forms()
    yield Trial(site, "forward", None)
    for plan in candidates.forward:
        for own in forms:
            yield Trial(site, "forward", plan, own)
            if plan.splits == 1 and site.may_stay_raw():
                yield Trial(site, "forward", plan, own, raw=True)
    if site.goes_on:
        yield from (Trial(site, "dgrad", plan) for plan in (None, *candidates.dgrad))
    if site.learns:
        yield Trial(site, "wgrad", None)
        yield from (Trial(site, "wgrad", plan, own) for plan in candidates.wgrad for own in forms)


def tables_of(
    found: Sites,
    trials: Mapping[str, Trial],
    times: Mapping[str, float | str],  # milliseconds by name, or why there are none
) -> dict[Key, Times]:
    """What the search reads. Where the form of the input does not differ, one measurement stands for both."""
    tables = {site.key: Times() for site in found.sites}
    for name, trial in trials.items():
        ms, table = times.get(name), tables[trial.site.key]
        if not isinstance(ms, float):
            continue
        alike = trial.plan is not None and True not in trial.site.forms()
        for own in (False, True) if alike else (trial.own,):
            if trial.product == "wgrad":
                assert not isinstance(trial.plan, ConvPlan)
                table.wgrad[trial.plan, own] = ms
                continue
            assert not isinstance(trial.plan, WgradPlan)
            if trial.product == "forward":
                table.forward[trial.plan, own, trial.raw] = ms
            else:
                table.dgrad[trial.plan] = ms
    for site in found.sites:
        table = tables[site.key]
        if not site.goes_on:
            table.dgrad[None] = 0.0
        if not site.learns:  # its own product is free to say that it reads sources
            table.wgrad[None, False] = 0.0
            table.wgrad |= {(plan, own): 0.0 for plan in site.candidates.wgrad[:1] for own in (False, True)}
    return tables

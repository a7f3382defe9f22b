"""Measured plans of single products, for any network that has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..kernels.conv_plan import ConvPlan, Problem, conv_plan
from .cache import PlanCache

Choice = Callable[[Problem], ConvPlan]


def measured_choice(cache: PlanCache, precision: str) -> Choice:
    """What was measured for a product, else its static plan."""
    record = cache.load(_subject(precision)) or {}
    plans = {key: ConvPlan(*plan) for key, plan in record.get("plans", {}).items()}
    return lambda problem: plans.get(str(problem)) or conv_plan(problem)


def measured_overlap(cache: PlanCache, precision: str) -> bool:
    """Whether a generator was faster with kernels that overlap, when one was last measured."""
    return bool((cache.load(_subject(precision)) or {}).get("overlap", False))


def keep_plans(cache: PlanCache, precision: str, plans: Mapping[Problem, ConvPlan], overlap: bool) -> None:
    """Add to what is known. EnvironmentFailed where the disk refuses."""
    record = cache.load(_subject(precision)) or {"plans": {}}
    record["plans"] |= {str(problem): list(plan) for problem, plan in plans.items()}
    cache.save(_subject(precision), record | {"overlap": overlap})


def _subject(precision: str) -> dict[str, Any]:
    return {"kind": "inference products", "precision": precision}

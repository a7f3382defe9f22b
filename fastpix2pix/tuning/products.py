"""Measured plans of single products, for any network that has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..kernels.conv_plan import ConvPlan, Problem, conv_plan
from .cache import PlanCache

Choice = Callable[[Problem], ConvPlan]


def measured_choice(cache: PlanCache, precision: str) -> Choice:
    """What was measured for a product, else its static plan."""
    record = cache.load(_subject(precision)) or {}
    plans = {key: ConvPlan(*plan) for key, plan in record.get("plans", {}).items()}
    return lambda problem: plans.get(str(problem)) or conv_plan(problem)


class Ways(NamedTuple):
    """How a whole generator was fastest, when one was last measured."""

    overlap: bool = False  # kernels begin while those before them end
    lazy: bool = False  # readers of large maps normalise them


def measured_ways(cache: PlanCache, precision: str) -> Ways:
    """What was measured, else neither."""
    record = cache.load(_subject(precision)) or {}
    return Ways(**{name: bool(record.get(name, False)) for name in Ways._fields})


def keep_plans(cache: PlanCache, precision: str, plans: Mapping[Problem, ConvPlan], ways: Ways) -> None:
    """Add to what is known. EnvironmentFailed where the disk refuses."""
    record = cache.load(_subject(precision)) or {"plans": {}}
    record["plans"] |= {str(problem): list(plan) for problem, plan in plans.items()}
    cache.save(_subject(precision), record | ways._asdict())


def _subject(precision: str) -> dict[str, Any]:
    return {"kind": "inference products", "precision": precision}

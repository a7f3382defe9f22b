"""From measured times of each convolution's products to the choice that makes a step shortest.

The times of a node depend on its neighbours: where all readers of a feature map are the project's own products, the map
stays raw and they normalise while loading. Given which nodes read so, every node chooses alone; and which do is a
minimum over one bit per node of a sum of terms with few bits each, found exactly by eliminating one bit after another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from ..kernels.conv_plan import ConvPlan
from ..kernels.wgrad_plan import WgradPlan
from .convolution import Plans

Key = tuple[str, int]  # weight name and images, as in How.plans


@dataclass
class Times:
    """Milliseconds of one node; plans that failed their numerics are not in it. None stands for the library."""

    # (plan, input as own products read it, output left raw): the product and what follows it up to its readers
    forward: dict[tuple[ConvPlan | None, bool, bool], float] = field(default_factory=dict)
    # the product and the backward pass of the normalisation in front; {None: 0} where no gradient goes on
    dgrad: dict[ConvPlan | None, float] = field(default_factory=dict)
    # (plan, input as own products read it); zeros where no kernel gradient is taken
    wgrad: dict[tuple[WgradPlan | None, bool], float] = field(default_factory=dict)

    def complete(self) -> bool:
        """Whether the library's way is known of every product."""
        return (None, False, False) in self.forward and None in self.dgrad and (None, False) in self.wgrad


Readers = Mapping[Key, Sequence[Key]]  # of every node's output, at the same number of images


def best_plans(times: Mapping[Key, Times], readers: Readers) -> dict[Key, Plans]:
    """The plans with the least predicted time. Nodes without complete times are the library's."""
    known = {key: node for key, node in times.items() if node.complete()}
    terms = []
    for key, node in known.items():
        reading = tuple(readers.get(key, ()))
        scope = tuple(bit for bit in dict.fromkeys((key, *reading)) if bit in known)
        table = {}
        for bits in product((False, True), repeat=len(scope)):
            own = dict(zip(scope, bits, strict=True))
            raw = bool(reading) and all(own.get(reader, False) for reader in reading)
            table[bits] = _best(node, own[key], raw)[0]
        terms.append(Term(scope, table))
    own = least(list(known), terms)
    found = {}
    for key, node in known.items():
        reading = tuple(readers.get(key, ()))
        found[key] = _best(node, own[key], bool(reading) and all(own.get(r, False) for r in reading))[1]
    return found


def predicted_ms(choice: Mapping[Key, Plans], times: Mapping[Key, Times], readers: Readers) -> float:
    """The sum over all nodes, each in the form its neighbours leave it."""
    total = 0.0
    for key, node in times.items():
        plans, reading = choice.get(key, Plans()), readers.get(key, ())
        raw = bool(reading) and all(choice.get(reader, Plans()).reads_sources for reader in reading)
        total += _ms(node, plans, plans.reads_sources, raw)
    return total


def _ms(node: Times, plans: Plans, own: bool, raw: bool) -> float:
    forward = node.forward.get((plans.forward, own, raw), node.forward.get((plans.forward, own, False), math.inf))
    return forward + node.dgrad[plans.dgrad] + node.wgrad.get((plans.wgrad, own), math.inf)


def _best(node: Times, own: bool, raw: bool) -> tuple[float, Plans]:
    """Of all plans that read their input so."""
    dgrad = min(node.dgrad, key=lambda plan: node.dgrad[plan])
    forwards = dict.fromkeys(plan for plan, _, _ in node.forward)
    wgrads = dict.fromkeys(plan for plan, _ in node.wgrad)
    every = [Plans(f, dgrad, w) for f, w in product(forwards, wgrads)]
    fitting = [(_ms(node, plans, own, raw), plans) for plans in every if plans.reads_sources == own]
    return min(fitting, key=lambda found: found[0], default=(math.inf, Plans()))


class Term(NamedTuple):
    """A function of some bits."""

    scope: tuple[Key, ...]
    table: dict[tuple[bool, ...], float]


def least(keys: Sequence[Key], terms: Sequence[Term]) -> dict[Key, bool]:
    """The bits for which the sum of the terms is least.

    Each bit in turn, that with the fewest neighbours first, is replaced by its best value as a function of them.
    """
    left, order = list(terms), []
    remaining = list(keys)
    while remaining:
        key = min(remaining, key=lambda k: len({bit for term in left if k in term.scope for bit in term.scope}))
        remaining.remove(key)
        touching = [term for term in left if key in term.scope]
        left = [term for term in left if key not in term.scope]
        scope = tuple(dict.fromkeys(bit for term in touching for bit in term.scope if bit != key))
        table, best = {}, {}
        for bits in product((False, True), repeat=len(scope)):
            given = dict(zip(scope, bits, strict=True))
            costs = [
                sum(term.table[tuple({**given, key: bit}[k] for k in term.scope)] for term in touching)
                for bit in (False, True)
            ]
            best[bits] = costs[1] < costs[0]
            table[bits] = min(costs)
        left.append(Term(scope, table))
        order.append((key, scope, best))
    found: dict[Key, bool] = {}
    for key, scope, best in reversed(order):
        found[key] = best[tuple(found[k] for k in scope)]
    return found

"""The project's own convolutions at every node of a training step: numbers first, then times beside the library's.

Each candidate plan is compared with plain torch where it stands, with the inputs and what is fused around it as a real
pass has them (fastpix2pix/training/trials.py). Only what was right is timed. The other half type is checked at the end,
where there is time for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby

import torch

from fastpix2pix.config import Train
from fastpix2pix.kernels.dispatch import environment_reasons
from fastpix2pix.training.layers import discriminator_layers, generator_layers
from fastpix2pix.training.plan_sites import sites_of
from fastpix2pix.training.trial_processes import process_count, verdicts
from fastpix2pix.training.trials import Trial, product_name, trials_of

from .comparison import release
from .devices import Setting
from .report import LONGEST, Mismatch, Report, Skipped, Values
from .roofline import Cost, layer_costs, named_device

PART = "convolutions"
PRECISIONS = ("bf16", "fp16")  # the first is timed
Verdicts = dict[str, str]  # by Trial.name: "" where the numbers are right


def run(report: Report, at: Setting) -> None:
    """Batch by batch: all candidates, then the times of those that passed; then the candidates in the other type."""
    if reasons := environment_reasons(at.device.type):
        report.add(PART, "all", "skipped", "; ".join(reasons))
        return
    first, *others = _precisions(at)
    for batch in at.batches:
        config, wrong = at.config(batch, step="explicit", precision=first), Verdicts()
        _check(report, at, config, 0.6 * report.left(PART), wrong)
        _time(report, at, config, wrong)
    for precision in others:
        for batch in at.batches:
            _check(report, at, at.config(batch, step="explicit", precision=precision), report.left(PART), Verdicts())


def _precisions(at: Setting) -> tuple[str, ...]:
    """The interpreter cuts bf16 off where hardware rounds: there only the other type is right."""
    return PRECISIONS if at.device.type == "cuda" else ("fp16",)


def _trials(at: Setting, config: Train) -> dict[str, Trial]:
    """By name; for the interpreter, which takes seconds for each, some products and one plan each."""
    found = trials_of(sites_of(config, at.device, config.precision, "triton"))
    if at.device.type == "cuda":
        return found
    some = [names for _, names in _products(found)][::4]
    return {name: found[name] for names in some for name in names[:2]}


def _check(report: Report, at: Setting, config: Train, seconds: float, wrong: Verdicts) -> None:
    """A row per product. Adds to `wrong` whatever may not be timed."""
    row = f"{config.precision} batch {config.batch}"
    trials: dict[str, Trial] = {}
    judged: Verdicts = {}

    def judge() -> Values:
        trials.update(_trials(at, config))
        judged.update(_judge(at, config, trials, seconds))
        return {"candidates": len(trials), "reached": len(judged)}

    if not report.run(PART, f"{row}: candidates tried", judge, longest=seconds + LONGEST):
        return
    for product, names in _products(trials):
        wrong |= {name: judged.get(name, "not reached in time") for name in names if judged.get(name) != ""}
        report.run(PART, f"{row} {product}: check", partial(_row, names, judged))


def _judge(at: Setting, config: Train, trials: Mapping[str, Trial], seconds: float) -> Verdicts:
    """In processes of their own on a GPU: several compile at once, and a kernel may bring its process down."""
    if at.device.type != "cuda":
        return {name: trial.verdict() for name, trial in trials.items()}
    release(at)
    return verdicts(config, at.device, "triton", list(trials), process_count(at.device), seconds)


def _row(names: list[str], judged: Verdicts) -> Values:
    reached = {name: judged[name] for name in names if name in judged}
    if failed := {name: verdict for name, verdict in reached.items() if verdict}:
        raise Mismatch("; ".join(f"{_way(name)}: {verdict}" for name, verdict in failed.items()), dict(failed))
    if len(reached) < len(names):
        raise Skipped(f"budget: {len(names) - len(reached)} of {len(names)} candidates were not reached")
    return {"right": len(reached)}


def _time(report: Report, at: Setting, config: Train, wrong: Verdicts) -> None:
    """A row per product: the library with what follows it, each right candidate likewise, and the product's floor."""
    trials: dict[str, Trial] = {}
    row = f"{config.precision} batch {config.batch}"

    def build() -> Values:
        trials.update(_trials(at, config))
        return {"of": len(trials), "not timed": len(wrong)}

    if report.run(PART, f"{row}: to be timed", build):
        floors = _floors(at, config)
        for product, names in _products(trials):
            report.run(PART, f"{row} {product}", partial(_times, at, trials, names, wrong, floors.get(product)))


def _times(at: Setting, trials: Mapping[str, Trial], names: list[str], wrong: Verdicts, floor: float | None) -> Values:
    found = {_way(name): trials[name].ms(at.device) for name in names if name not in wrong}
    us = {way: round(1e3 * ms, 3) for way, ms in found.items() if isinstance(ms, float)}
    own = {way: t for way, t in us.items() if way != "library"}
    values: Values = {"us": us, "not timed": {_way(name): wrong[name] for name in names if name in wrong}}
    values["not timed"] |= {way: ms for way, ms in found.items() if isinstance(ms, str)}
    if own and "library" in us:
        best = min(own, key=lambda way: own[way])
        values |= {"best": best, "times_library": float(f"{us['library'] / max(own[best], 1e-3):.3g}")}
    return values if floor is None else values | {"floor_us": round(floor, 3)}


def _floors(at: Setting, config: Train) -> dict[str, float]:
    """Microseconds by product; nothing where the device's peaks are not known."""
    device = named_device(torch.cuda.get_device_name(at.device)) if at.device.type == "cuda" else None
    if device is None:
        return {}
    networks = [generator_layers(config, config.batch)]
    networks += [discriminator_layers(config, groups * config.batch) for groups in (1, 2)]
    found: dict[str, float] = {}
    for layers in networks:
        for number, layer in enumerate(layers):
            costs: dict[str, Cost] = layer_costs(layer, first=number == 0)
            for product, cost in costs.items():
                found[product_name((layer.node.weight, layer.x[0]), product).strip()] = cost.floor_us(device)
    return found


def _products(trials: Mapping[str, Trial]) -> Iterator[tuple[str, list[str]]]:
    """(node and product, names of its trials), in the order of the trials."""
    for product, names in groupby(trials, key=lambda name: product_name(trials[name].site.key, trials[name].product)):
        yield product.strip(), list(names)


def _way(name: str) -> str:
    """What follows the product in a trial's name: the plan, and the form of its input and output."""
    return name.split(" ", 3)[3]

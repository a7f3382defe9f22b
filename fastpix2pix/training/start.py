"""Weights to start from other than random ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..config import Data, Discriminator, Generator, Train, train_config
from ..model.load import load_discriminator, load_generator
from ..model.weights import load_state
from .state import State


def defaults_of_models(init: str | None, init_discriminator: str | None) -> Train:
    """The options of a run that starts from models, where no others are given: their architecture and direction.

    The crop is as always, or the smallest that the generator takes. InputError: no such model.
    """
    options: dict[str, Any] = {}
    if init_discriminator:
        critic, _ = load_discriminator(init_discriminator)
        options |= {name: getattr(critic.config, name) for name in ("ndf", "n_layers", "norm")}
    if init:
        net, record = load_generator(init)
        options |= asdict(net.config) | {"crop_size": max(Data.crop_size, net.config.multiple)}
        options |= {name: record[name] for name in ("direction",) if name in record}
    return train_config(**options)


def start_from_models(state: State, config: Train) -> list[str]:
    """Give a new run the weights of the models that `init` and `init_discriminator` name; returns what to say of it.

    Optimisers, schedule and counters begin anew. InputError: no such model, or one of another architecture.
    """
    said = []
    if path := config.init:
        net, record = load_generator(path)
        for own in filter(None, (state.generator, state.average)):
            load_state(own, net.state_dict(), path)
        trained, now = record.get("direction"), config.data.direction
        taken = [f"direction {trained}"] if trained == now else []
        said.append(_said("generator", path, record, [*taken, *_unusual(net.config, config.generator)]))
        if trained not in (None, now):
            said.append(f"warning: direction = {now}, but {path} was trained {trained}")
    if path := config.init_discriminator:
        critic, record = load_discriminator(path)
        if state.discriminator is not None:
            load_state(state.discriminator, critic.state_dict(), path)
        said.append(_said("discriminator", path, record, _unusual(critic.config, config.discriminator())))
    if said:
        state.weights_replaced()
    return said


def _said(kind: str, path: str, record: dict[str, Any], taken: list[str]) -> str:
    step = f" (step {record['step']})" if "step" in record else ""
    return f"{kind}: starts from {path}{step}" + (f"; taken over: {', '.join(taken)}" if taken else "")


def _unusual(model: Generator | Discriminator, run: Generator | Discriminator) -> list[str]:
    """What of an architecture the run shares with the model, and would not have by itself."""
    usual = asdict(type(model)())
    return [f"{name} {value}" for name, value in asdict(model).items() if value == getattr(run, name) != usual[name]]

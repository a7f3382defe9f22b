"""Weights to start from other than random ones."""

from __future__ import annotations

from typing import Any

from ..config import Train
from ..model import PatchGAN, Unet
from ..model.load import load_discriminator, load_generator
from ..model.weights import load_state
from .state import State


def start_from_models(state: State, config: Train) -> list[str]:
    """Give a new run the weights of the models that `init` and `init_discriminator` name; returns what to say of it.

    Optimisers, schedule and counters begin anew. InputError: no such model, or one of another architecture.
    """
    said = []
    if path := config.init:
        net, record = load_generator(path)
        said.append(f"generator: {_take(net, record, path, state.generator, state.average)}")
    if path := config.init_discriminator:
        critic, record = load_discriminator(path)
        said.append(f"discriminator: {_take(critic, record, path, state.discriminator)}")
    if said:
        state.weights_replaced()
    return said


def _take(given: Unet | PatchGAN, record: dict[str, Any], path: str, *networks: Unet | PatchGAN | None) -> str:
    for net in networks:
        if net is not None:
            load_state(net, given.state_dict(), path)
    known = [f"{name} {record[name]}" for name in ("step", "direction") if name in record]
    return f"starts from {path}" + (f" ({', '.join(known)})" if known else "")

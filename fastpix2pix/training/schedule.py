"""The learning rate over the epochs, and where in the data a step stands. Pure functions."""

from __future__ import annotations

from math import ceil

from ..config import Train


def rate(config: Train, epochs_done: int) -> float:
    """The learning rate of the epoch that follows `epochs_done` finished ones.

    Linear: factor(e) = 1 - max(0, e + 1 - constant) / (decay + 1), pytorch-CycleGAN-and-pix2pix's formula, advanced at
    the end of each epoch, as there until July 2020: with 100 + 100 epochs, epochs 1-100 run at lr, epoch 101 at 100/101
    lr, epoch 200 at 1/101 lr. Since then its train.py advances it at the beginning of each epoch: everything comes one
    epoch earlier there, and the last epoch trains at rate 0.
    """
    beyond = max(0, epochs_done + 1 - (config.epochs - config.decay))
    return config.lr * (1 - min(beyond, config.decay) / (config.decay + 1))


def total_steps(config: Train, pairs: int, processes: int = 1) -> int:
    """Steps of the whole run: the sampler wraps, so the last batch may reach into one more epoch."""
    steps = ceil(config.epochs * pairs / (config.batch * processes))
    return min(steps, config.max_steps) if config.max_steps else steps


def epochs_done(step: int, batch: int, pairs: int) -> int:
    """Whole passes over the data after `step` steps of `batch` pairs, of all processes together."""
    return step * batch // pairs


def warnings(config: Train, pairs: int, processes: int = 1) -> list[str]:
    """What about this schedule the user probably did not mean."""
    end = epochs_done(total_steps(config, pairs, processes), config.batch * processes, pairs)
    if config.decay and end < config.epochs:
        start = config.epochs - config.decay
        what = "before its decay begins" if end <= start else "inside its decay"
        return [
            f"max_steps = {config.max_steps} ends the run after {end} epochs, {what} (epochs {start + 1} to "
            f"{config.epochs}); set epochs = {max(end, 1)} for the full schedule or schedule = constant"
        ]
    return []

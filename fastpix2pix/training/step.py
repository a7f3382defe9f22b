"""Which step runs, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from ..config import Train
from ..console import Progress
from ..errors import EnvironmentFailed
from ..kernels.dispatch import NotSupported, choose, environment_reasons, processors
from ..tuning.measure import usable
from .convolution import Plans
from .graph import eager_reasons, use_graph
from .processes import ALONE, Group
from .state import State

Step = Literal["modules", "explicit"]


def build_state(
    config: Train,
    device: torch.device,
    plans: Mapping[tuple[str, int], Plans] | None = None,
    group: Group = ALONE,
) -> State:
    """The state of a new run with the step that `config` asks for: "modules" or "explicit".

    plans: of the explicit step's convolutions, as choose_convolutions finds them; default: the library's, or the
    static plans where convolutions = own.
    """
    use_graph(config, device)  # refuses what cannot be done before anything is built
    if resolve_step(config) == "explicit":
        try:
            choose("step = explicit", config.impl, torch.empty(0, device=device), [])  # likewise
        except NotSupported as error:
            raise EnvironmentFailed(str(error)) from None
        from .explicit_step import ExplicitStep
        from .plans import static_plans
        from .stages import How

        if plans is None:
            plans = static_plans(config, processors(device)) if config.convolutions == "own" else {}
        return ExplicitStep(config, device, How(plans, config.impl), group)
    from .module_step import ModuleStep

    return ModuleStep(config, device, group)


def choose_step(
    config: Train,
    device: torch.device,
    processes: int = 1,
    *,
    resume: bool = False,
    afresh: bool = False,  # what was measured earlier does not count
    quiet: bool = False,
) -> tuple[Step, list[str]]:
    """("modules" or "explicit", what to say of it). step = auto on a GPU: as measured there, now or earlier.

    A run that is resumed keeps its step; where its record says auto, that was the modules.
    """
    plain = device.type != "cuda" or processes > 1 or config.deterministic or resume
    if config.step != "auto" or plain or environment_reasons(device.type):
        return resolve_step(config), []
    from . import race

    try:
        found = None if afresh else race.kept(config, device)
        if found is None and config.tune_minutes:
            with Progress("step", quiet=quiet) as progress:
                progress.say(
                    "step = auto: the explicit step is checked and timed beside the modules, once on this GPU "
                    "(tune_minutes = 0 leaves it out)"
                )
                found = race.held(config, device, config.tune_minutes)
    except EnvironmentFailed as error:  # training can do without
        return "modules", [f"step = auto: modules; measuring failed ({error})"]
    if found is None:
        return "modules", ["step = auto: modules; nothing was measured (raise tune_minutes)"]
    return "explicit" if race.explicit_wins(found) else "modules", [race.in_words(found)]


def choose_convolutions(
    config: Train, device: torch.device, *, quiet: bool = False
) -> tuple[Mapping[tuple[str, int], Plans] | None, list[str]]:
    """(plans for build_state, what to say of them). convolutions = auto on a GPU: as measured there, now or earlier."""
    if resolve_step(config) != "explicit":
        return None, []
    if config.convolutions != "auto":
        return None, [f"convolutions: {config.convolutions}, as asked for"]
    if device.type != "cuda" or config.impl == "reference":
        return None, ["convolutions: the library's"]
    from .tune import cached, tune

    found = cached(config, device)
    if (found is None or not found.complete) and config.tune_minutes:
        with Progress("tune", quiet=quiet) as progress:
            try:
                found = tune(config, device, config.tune_minutes, count=progress.count, say=progress.say)
            except (EnvironmentFailed, torch.OutOfMemoryError) as error:  # training can do without
                if not usable(device):  # not in this process
                    raise
                reason = " ".join(str(error).split())[:200]
                return None, [f"convolutions: the library's; measuring failed ({reason})"]
    if found is None:
        return None, ["convolutions: the library's; nothing was measured (fastpix2pix tune, or raise tune_minutes)"]
    return found.plans, [found.summary()]


def describe_step(config: Train, device: torch.device, processes: int = 1) -> str:
    """Which step runs and, where an explicit one is not a CUDA graph, why not."""
    step = resolve_step(config)
    if step == "modules":
        return "step: modules"
    if use_graph(config, device):
        several = "CUDA graphs, between which the processes average gradients"
        return f"step: explicit, as {'one CUDA graph' if processes == 1 else several}"
    return f"step: explicit, eagerly ({'; '.join(eager_reasons(config, device)) or 'graph = off'})"


def resolve_step(config: Train) -> Step:
    """ "auto" is the modules where choose_step does not measure: on a CPU they are faster."""
    return "modules" if config.step == "auto" else config.step

"""Which step runs, and why."""

from __future__ import annotations

import torch

from ..config import Train
from .graph import use_graph
from .state import State


def build_state(config: Train, device: torch.device) -> State:
    """The state of a new run with the step that `config` asks for: "modules" or "explicit"."""
    use_graph(config, device)  # refuses what cannot be done before anything is built
    if resolve_step(config) == "explicit":
        from .explicit_step import ExplicitStep
        from .stages import How

        return ExplicitStep(config, device, How(impl=config.impl))
    from .module_step import ModuleStep

    return ModuleStep(config, device)


def resolve_step(config: Train) -> str:
    """ "auto" is the modules: the explicit step has not been measured on a GPU yet, and on a CPU it is slower."""
    return "modules" if config.step == "auto" else config.step

"""Which step runs, and why."""

from __future__ import annotations

import torch

from ..config import Train
from .graph import eager_reasons, use_graph
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


def describe_step(config: Train, device: torch.device) -> str:
    """Which step runs and, where an explicit one is not a CUDA graph, why not."""
    step = resolve_step(config)
    if step == "modules":
        return "step: modules"
    if use_graph(config, device):
        return "step: explicit, as one CUDA graph"
    return f"step: explicit, eagerly ({'; '.join(eager_reasons(config, device)) or 'graph = off'})"


def resolve_step(config: Train) -> str:
    """ "auto" is the modules: the explicit step has not been measured on a GPU yet, and on a CPU it is slower."""
    return "modules" if config.step == "auto" else config.step

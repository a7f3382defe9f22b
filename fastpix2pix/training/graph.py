"""The explicit step as one CUDA graph: captured once, then one launch per step.

Inputs are copied into static tensors; the rate, Adam's step number and the dropout counters are device tensors that the
captured step reads and advances, so a replay does what an eager step would.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from ..capture import capturing
from ..config import Train
from ..console import say
from ..errors import EnvironmentFailed, InputError

WARM_UP = 3  # real steps run eagerly first: libraries choose their algorithms, kernels are compiled

Body = Callable[[Tensor, Tensor, int], Tensor]  # (x, y, number) -> losses, as ExplicitStep.body


def eager_reasons(config: Train, device: torch.device, processes: int = 1) -> list[str]:
    """Why the step cannot be a CUDA graph; empty where it can."""
    reasons = []
    if config.step != "explicit":
        reasons.append(f"step = {config.step}: only the explicit step is captured")
    if device.type != "cuda":
        reasons.append(f"the device is {device}")
    if config.pool:
        reasons.append(f"pool = {config.pool}: the image pool decides on the host")
    if processes > 1:
        reasons.append(f"{processes} processes: a reduction that hangs inside a graph is never noticed")
    return reasons


def use_graph(config: Train, device: torch.device, processes: int = 1) -> bool:
    """Whether to capture. graph = on raises EnvironmentFailed with the reasons where it cannot be done."""
    reasons = eager_reasons(config, device, processes)
    if config.graph == "on" and reasons:
        raise EnvironmentFailed(f"graph = on cannot be done: {'; '.join(reasons)}; use graph = auto or off")
    return config.graph != "off" and not reasons


class GraphedBody:
    """Calls `body` eagerly for the first steps, captures it, and replays it from then on.

    All calls have inputs of one shape (the sampler wraps, so there are no partial batches) and type; another raises
    InputError. The losses returned are overwritten by the next call. A capture that breaks off raises EnvironmentFailed
    where a graph is required; else it is said, and all calls are eager.
    """

    def __init__(self, body: Body, required: bool = False) -> None:
        self.body, self.required = body, required
        self.broken = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = 0
        self.stream = torch.cuda.Stream()

    def __call__(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        if self.graph is None and not self.broken:
            if self.eager < WARM_UP:
                self.eager += 1
                return self._on_side_stream(x, y, number)
            self._try_capture(x, y)
        if self.graph is None:
            return self.body(x, y, number)
        for static, given in ((self.x, x), (self.y, y)):
            if (static.shape, static.dtype) != (given.shape, given.dtype):
                found, known = (f"{t.dtype} {list(t.shape)}" for t in (given, static))
                raise InputError(f"a batch of {found}: this step was captured with {known}; use graph = off")
            static.copy_(given)
        self.graph.replay()
        return self.losses

    def forget(self) -> None:
        """Warm up and capture anew: what the step launches may have changed."""
        self.graph, self.eager = None, 0

    def _on_side_stream(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        """As capture will run it; memory given back there is the capture's to use."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            losses = self.body(x, y, number)
        torch.cuda.current_stream().wait_stream(self.stream)
        losses.record_stream(torch.cuda.current_stream())
        return losses

    def _try_capture(self, x: Tensor, y: Tensor) -> None:
        try:
            self._capture(x, y)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            if self.required:
                raise EnvironmentFailed(f"graph = on: the capture broke off ({reason}); use graph = off") from error
            self.broken = True
            say(f"step: explicit, eagerly from here on (the capture as a CUDA graph broke off: {reason})")

    def _capture(self, x: Tensor, y: Tensor) -> None:
        """Record the step without running it."""
        self.x, self.y = x.clone(), y.clone()
        gc.collect()  # graphs that are no longer used are not to be destroyed meanwhile
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self.stream):
            self.losses = self.body(self.x, self.y, 0)
        self.graph = graph  # a capture that broke off leaves none

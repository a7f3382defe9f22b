"""The explicit step as one CUDA graph: captured once, then one launch per step.

Inputs are copied into static tensors; the rate, Adam's step number and the dropout counters are device tensors that the
captured step reads and advances, so a replay does what an eager step would. Of several processes the gradients are
averaged between two graphs: a message that hangs inside one would never be noticed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..capture import capturing
from ..config import Train
from ..console import say
from ..errors import EnvironmentFailed, InputError

WARM_UP = 3  # real steps run eagerly first: libraries choose their algorithms, kernels are compiled

Body = Callable[[Tensor, Tensor, int], Tensor]  # (x, y, number) -> losses, as ExplicitStep.body
Work = Callable[[], object]


def eager_reasons(config: Train, device: torch.device) -> list[str]:
    """Why the step cannot be a CUDA graph; empty where it can."""
    reasons = []
    if config.step != "explicit":
        reasons.append(f"step = {config.step}: only the explicit step is captured")
    if device.type != "cuda":
        reasons.append(f"the device is {device}")
    if config.pool:
        reasons.append(f"pool = {config.pool}: the image pool decides on the host")
    return reasons


def use_graph(config: Train, device: torch.device) -> bool:
    """Whether to capture. graph = on raises EnvironmentFailed with the reasons where it cannot be done."""
    reasons = eager_reasons(config, device)
    if config.graph == "on" and reasons:
        raise EnvironmentFailed(f"graph = on cannot be done: {'; '.join(reasons)}; use graph = auto or off")
    return config.graph != "off" and not reasons


class GraphedBody:
    """Calls `body` eagerly for the first steps, captures it, and replays it from then on.

    What `body` does by `between` is in no graph: there one ends and the next begins.

    All calls have inputs of one shape (the sampler wraps, so there are no partial batches) and type; another raises
    InputError. The losses returned are overwritten by the next call. A capture that breaks off raises EnvironmentFailed
    where a graph is required; else it is said, and all calls are eager.
    """

    def __init__(self, body: Body, required: bool = False) -> None:
        self.body, self.required = body, required
        self.broken = False
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.works: list[Work] = []  # one less: between two graphs
        self.recorder: _Recorder | None = None  # during a capture
        self.eager = 0
        self.stream = torch.cuda.Stream()

    def __call__(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        if not self.graphs and not self.broken:
            if self.eager < WARM_UP:
                self.eager += 1
                return self._on_side_stream(x, y, number)
            self._try_capture(x, y)
        if not self.graphs:
            return self.body(x, y, number)
        for static, given in ((self.x, x), (self.y, y)):
            if (static.shape, static.dtype) != (given.shape, given.dtype):
                found, known = (f"{t.dtype} {list(t.shape)}" for t in (given, static))
                raise InputError(f"a batch of {found}: this step was captured with {known}; use graph = off")
            static.copy_(given)
        self.graphs[0].replay()
        for work, graph in zip(self.works, self.graphs[1:], strict=True):
            work()
            graph.replay()
        return self.losses

    def between(self, work: Work) -> None:
        """Do some work of every step; the tensors it changes stay where they are. For `body` to call."""
        if self.recorder is None:
            work()
        else:
            self.works.append(work)
            self.recorder.next()

    def forget(self) -> None:
        """Warm up and capture anew: what the step launches may have changed."""
        self.graphs, self.works, self.eager = [], [], 0

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
        self.works = []
        try:
            with _Recorder(self.stream) as self.recorder:
                self.losses = self.body(self.x, self.y, 0)
                graphs = self.recorder.graphs
        finally:
            self.recorder = None
        self.graphs = graphs  # a capture that broke off leaves none


class _Recorder:
    """Graphs recorded one after the other, which share their memory."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self._stream, self._pool, self._recording = stream, torch.cuda.graph_pool_handle(), ExitStack()

    def __enter__(self) -> _Recorder:
        self.next()
        return self

    def __exit__(self, *error: Any) -> None:
        self._recording.__exit__(*error)

    def next(self) -> None:
        """End the graph that is recorded, and begin another."""
        self._recording.close()
        self.graphs.append(torch.cuda.CUDAGraph())
        self._recording.enter_context(capturing(self.graphs[-1], self._stream, self._pool))

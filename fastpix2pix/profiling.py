"""--profile: a trace of a few steps, the kernels that took longest, and what one step launches and moves.

Reading a trace: chrome://tracing or ui.perfetto.dev. Ranges of the same names are NVTX ranges for Nsight Systems.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .files import make_folder, write_text
from .kernels.dispatch import recorded

SKIPPED, TRACED = 6, 5  # steps: more than a CUDA graph's warm-up and capture, then those in the trace
TOP = 25  # rows of the table
_NO_WORK = {  # allocations and questions
    *("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "device", "promote_types"),
    *("_record_function_enter_new", "_record_function_exit"),
}
# the first that an operation's or kernel's name contains
_KINDS = {
    "optimiser": ("adam", "Optimizer"),
    "wgrad and dgrad": ("convolution_backward", "conv_backward", "wgrad", "dgrad", "bwd_filter", "bwd_data"),
    "convolution": ("convolution", "conv", "gemm", "cutlass", "xmma", "implicit", "addmm", "mm"),
    "normalisation": ("norm", "var_mean", "rsqrt"),
    "activation, dropout": ("relu", "tanh", "sigmoid", "dropout", "bernoulli", "_act_", "threshold"),
    "loss": ("loss", "binary_cross_entropy", "log_sigmoid", "l1"),
    "copies": ("copy", "cat", "Memcpy", "memset", "contiguous", "clone", "_to_copy", "units", "side_by_side"),
}


class Counter(TorchDispatchMode):
    """Counts the ATen calls that compute, and the bytes of their distinct tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_WORK:
            made = () if name.endswith("_") else result  # in place, the result is an argument
            tensors = {id(t): t for t in tree_leaves((args, kwargs, made)) if isinstance(t, Tensor)}
            self.calls += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        return result


@contextmanager
def named(name: str) -> Iterator[None]:
    """A range of that name in a trace, and in NVTX where there is a GPU."""
    with ExitStack() as opened:
        opened.enter_context(torch.profiler.record_function(name))
        if torch.cuda.is_available():
            opened.enter_context(torch.cuda.nvtx.range(name))
        yield


@contextmanager
def named_blocks(**nets: nn.Module | None) -> Iterator[None]:
    """Ranges around the forward pass of every block of the networks, called through their modules."""
    opened: list[Any] = []

    def enter(name: str) -> Callable:
        def hook(*_: object) -> None:
            opened.append(named(name))
            opened[-1].__enter__()

        return hook

    def leave(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    handles = []
    for prefix, net in nets.items():
        for name, module in net.named_modules() if net is not None else ():
            if name.count(".") <= 1 and not isinstance(module, nn.ModuleList):  # the network, and its blocks
                handles.append(module.register_forward_pre_hook(enter(f"{prefix}.{name}".rstrip("."))))
                handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Profile:
    """Profiles a loop: `with Profile(folder) as p: ... with p.range("load"): ...; p.run("step", f); p.advance()`.

    Of the first step it counts what is launched and moved (an eager step: a CUDA graph's are not seen again); it leaves
    `skipped` steps out and traces TRACED. Left in `folder` at the end of those, or of the loop: trace.json, kernels.txt
    and summary.json. Without a folder it does nothing.
    """

    def __init__(self, folder: Path | None, skipped: int = SKIPPED) -> None:
        self.folder, self.skipped = folder, skipped
        self.step = 0
        self.summary: dict[str, Any] = {}
        self._trace: torch.profiler.profile | None = None
        self._began = 0.0

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._trace is not None:
            self._finish()

    def range(self, name: str) -> Any:
        """A named range of the trace."""
        return named(name) if self.folder else nullcontext()

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        """`function()` in a range; the first call's launches are counted."""
        if self.folder is None:
            return function()
        with named(name):
            if "aten_calls" in self.summary:
                return function()
            with recorded() as tape, Counter() as counted:
                result = function()
        self.summary |= {
            "aten_calls": counted.calls,
            "aten_mb": counted.bytes / 1e6,
            "triton_launches": len(tape),
            "triton_mb": sum(launch.read + launch.written for launch in tape) / 1e6,
        }
        return result

    def advance(self) -> None:
        """The end of a step."""
        if self.folder is None:
            return
        self.step += 1
        if self.step == self.skipped:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.start()
            self._began = time.perf_counter()
        elif self._trace is not None and self.step == self.skipped + TRACED:
            self._finish()

    def _finish(self) -> None:
        assert self._trace is not None and self.folder is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        steps, seconds = self.step - self.skipped, time.perf_counter() - self._began
        trace, self._trace = self._trace, None
        trace.stop()
        if not steps:
            return
        make_folder(self.folder)
        trace.export_chrome_trace(str(self.folder / "trace.json"))
        averages = trace.key_averages()
        on_gpu = any(event.self_device_time_total for event in averages)
        launched = [event for event in averages if _on_device(event)]
        by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        write_text(self.folder / "kernels.txt", averages.table(sort_by=by, row_limit=TOP, max_name_column_width=60))
        self.summary |= {
            "steps": steps,
            "ms_per_step": 1e3 * seconds / steps,
            "device_kernels_per_step": sum(event.count for event in launched) / steps if on_gpu else None,
            "breakdown_ms": breakdown(trace, steps),
        }
        write_text(self.folder / "summary.json", json.dumps(self.summary, indent=1) + "\n")

    def lines(self) -> list[str]:
        """The figures for a person; what to do where nothing was traced."""
        if self.folder is None:
            return []
        s = self.summary
        if "steps" not in s:
            return [f"profile: the loop ended before step {self.skipped + 1}; nothing was traced, let it run longer"]
        parts = ", ".join(f"{name} {ms:.1f}" for name, ms in s["breakdown_ms"].items())
        return [
            f"profile: {s['ms_per_step']:.2f} ms per step of {s['steps']}; ms by kind: {parts}",
            f"profile: a step is {s['aten_calls']} ATen calls ({s['aten_mb']:,.0f} MB) and {s['triton_launches']} "
            f"Triton launches ({s['triton_mb']:,.0f} MB)",
            f"profile: {self.folder}/trace.json (ui.perfetto.dev), kernels.txt, summary.json",
        ]


class ProfiledEngine:
    """An engine whose `translate` is a step of a profile; all else is the engine's own."""

    def __init__(self, engine: Any, profile: Profile) -> None:
        self._engine, self._profile = engine, profile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def translate(self, batch: Tensor, first: int = 0) -> Tensor:
        """[N, C, H, W] as the engine's."""
        result = self._profile.run("translate", lambda: self._engine.translate(batch, first))
        self._profile.advance()
        return result


def breakdown(trace: torch.profiler.profile, steps: int) -> dict[str, float]:
    """Milliseconds per step by kind of work, longest first: on the device where there is one, else on the CPU."""
    averages = trace.key_averages()
    on_gpu = any(event.self_device_time_total for event in averages)
    found: dict[str, float] = {}
    for event in averages:
        on_cpu = event.device_type == torch.autograd.DeviceType.CPU and not event.key.startswith("ProfilerStep")
        if not (_on_device(event) if on_gpu else on_cpu):
            continue
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = next((k for k, words in _KINDS.items() if any(word in event.key for word in words)), "other")
        found[kind] = found.get(kind, 0.0) + us / 1e3 / steps
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _on_device(event: Any) -> bool:
    """Whether it is work of the device: not a range named in Python, which there spans the kernels that it started."""
    return event.device_type != torch.autograd.DeviceType.CPU and not event.is_user_annotation

"""Who runs an op, and one door for every kernel launch.

`choose` picks an implementation; `launch` is the only way a Triton kernel is started, so that launches and bytes can be
counted and the sequence of launches (the tape) can be compared between steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import interpreted, triton

IMPLEMENTATIONS = ("auto", "reference", "triton")
OPS = ("norm_act", "bias_act", "adam", "losses", "levels", "conv")  # what FASTPIX2PIX_IMPL may name


class NotSupported(RuntimeError):
    """An implementation asked for by name cannot run; the message holds every reason."""


def choose(op: str, impl: str, x: Tensor, reasons: list[str]) -> str:
    """ "reference" or "triton" for an op on tensors like x; `reasons` is why its Triton kernels cannot take them.

    "auto" is Triton on a GPU where it can run, else the reference. A name asked for explicitly raises NotSupported with
    every reason; on a CPU, "triton" is Triton's interpreter. FASTPIX2PIX_IMPL replaces "auto" for bisecting:
    "reference", or "norm_act=reference,adam=triton".
    """
    if impl not in IMPLEMENTATIONS:
        raise NotSupported(f"impl = {impl!r}: allowed are {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        impl = _from_environment(op, os.environ.get("FASTPIX2PIX_IMPL", ""))
    if impl == "reference" or (impl == "auto" and x.device.type != "cuda"):
        return "reference"
    reasons = [*environment_reasons(x.device.type), *reasons]
    if not reasons:
        return "triton"
    if impl == "triton":
        raise NotSupported(f"{op}: impl = triton cannot run: {'; '.join(reasons)}; use impl = auto or reference")
    return "reference"


def environment_reasons(device: str) -> list[str]:
    """Why no Triton kernel can run in this process on tensors of a device type."""
    if triton is None:
        return ["triton is not installed"]
    if not _starts():
        return []
    if device != "cuda" and not interpreted:
        return [f"own kernels need a CUDA GPU; the device is {device} (TRITON_INTERPRET=1 runs them there, for tests)"]
    if device == "cuda" and interpreted:
        return ["TRITON_INTERPRET=1 is for tensors on a CPU"]
    return []


@lru_cache
def _from_environment(op: str, text: str) -> str:
    chosen = "auto"
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, impl = part.rpartition("=")
        if impl not in IMPLEMENTATIONS or (equals and name not in OPS):
            raise NotSupported(
                f"FASTPIX2PIX_IMPL = {text!r}: {part!r} is neither IMPL nor OP=IMPL, with IMPL one of "
                f"{', '.join(IMPLEMENTATIONS)} and OP one of {', '.join(OPS)}"
            )
        if name in ("", op):
            chosen = impl
    return chosen


PROCESSORS = 132  # multiprocessors of an H100 or H200: what launches are cut up for where no GPU is known


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of none, and while no kernel starts, PROCESSORS."""
    if device.type != "cuda" or not _starts():
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class Launch(NamedTuple):
    """One entry of the tape."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors as (data_ptr or 0, shape, strides, dtype), the rest as it is
    options: tuple[tuple[str, Any], ...]  # constexprs and launch options by name
    read: int  # bytes, by the kernel's own formula
    written: int
    function: Any  # the kernel itself


_tapes: list[tuple[list[Launch], bool]] = []  # and whether it lets kernels start


@contextmanager
def recorded(*, run: bool = True) -> Iterator[list[Launch]]:
    """Collects every launch made inside the block; run=False starts none and asks no address: fake tensors will do."""
    tape: list[Launch] = []
    _tapes.append((tape, run))
    try:
        yield tape
    finally:
        _tapes[:] = [entry for entry in _tapes if entry[0] is not tape]  # by identity: two tapes may be equal


OVERLAP = 90  # the compute capability from which kernels can
_overlapping: ContextVar[bool] = ContextVar("overlapping", default=False)


@contextmanager
def overlapping(on: bool = True) -> Iterator[None]:
    """Kernels that can (overlap.py) begin while those before them end; only where `overlap_reasons` has none."""
    token = _overlapping.set(on)
    try:
        yield
    finally:
        _overlapping.reset(token)


def overlap_reasons(device: torch.device) -> list[str]:
    """Why kernels cannot overlap on a device."""
    if not _starts():
        return []
    if device.type != "cuda" or interpreted:
        return ["kernels overlap on a GPU only"]
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    return [] if capability >= OVERLAP else [f"kernels overlap from sm_{OVERLAP} on; this is sm_{capability}"]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, read: int, written: int, **options: Any) -> None:
    """Start `kernel[grid](*arguments, **options)`; `read` and `written` are bytes by the kernel's own formula."""
    if _overlapping.get() and "OVERLAP" in kernel.arg_names:
        options |= {"OVERLAP": True, "launch_pdl": True}
    run = _starts()
    if _tapes:
        entries = tuple(_entry(argument, run) for argument in arguments)
        entry = Launch(kernel.fn.__name__, grid, entries, tuple(sorted(options.items())), read, written, kernel)
        for tape, _ in _tapes:
            tape.append(entry)
    if not run:
        return
    with current(next(a.device for a in arguments if isinstance(a, Tensor))):  # Triton launches on the current GPU
        kernel[grid](*arguments, **options)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes it the current one, where it is a GPU: streams and graphs are made there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _starts() -> bool:
    """Whether kernels start: no tape says otherwise."""
    return all(run for _, run in _tapes)


def _entry(argument: Any, run: bool) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr() if run else 0, tuple(argument.shape), argument.stride(), argument.dtype
    return argument


class CompileCase(NamedTuple):
    """One specialisation of a kernel that every supported GPU must be able to compile.

    An op lists its own in `compile_cases() -> list[CompileCase]` in its file; bench/compile_table.py compiles them.
    """

    kernel: Any
    signature: dict[str, str]  # Triton types: "*bf16", "fp32", "i32"; "i32:16" is a multiple of 16; pointers always are
    constexprs: dict[str, Any]  # the other arguments, None for an absent tensor
    num_warps: int = 4
    num_stages: int = 3

"""Several processes that train as one: torchrun starts them, each has a device, a batch and the same weights.

Tensors travel through NCCL between GPUs and gloo between CPUs; what the hosts tell each other goes through gloo, so
that telling waits for no device. Every method of a group is called by all processes, in the same order.
"""

from __future__ import annotations

import atexit
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..device import resolve_device
from ..errors import EnvironmentFailed, InputError

T = TypeVar("T")

PATIENCE = timedelta(hours=1)  # for a process that is alive and silent: validation, tuning and checks take minutes
ASKED_EVERY = 0.5  # seconds between two agreements, about; torchrun waits 30 s after a signal before it kills
_groups = itertools.count()  # joined so far: each has keys of its own in the store, which outlives it


@dataclass(frozen=True)
class Group:
    """One process alone: there is nobody to tell, and nothing to do."""

    rank: int = 0
    size: int = 1
    here: int = 1  # of the processes, those on this machine

    def reduce(self, flat: Tensor) -> None:
        """The mean over all processes, in place. A sum that overflows stays infinite, and is so for all of them."""

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Process 0's contents for all, in place."""

    def first(self, function: Callable[[], T]) -> T:
        """What `function` gives in process 0, which alone runs it; the others wait."""
        return function()

    def from_others(self, function: Callable[[], T]) -> list[T]:
        """In process 0, what `function` gives in processes 1, 2, ...; elsewhere nothing."""
        return []

    def highest(self, *numbers: float) -> tuple[float, ...]:
        """Of each number the highest that any process gave."""
        return numbers


ALONE = Group()


class _Joined(Group):
    """Over torch.distributed's default group."""

    def reduce(self, flat: Tensor) -> None:
        with _peers():
            dist.all_reduce(flat)
        flat.div_(self.size)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            flat = tensor.reshape(-1)
            with _peers():
                dist.broadcast(flat, 0)
            tensor.copy_(flat.view_as(tensor))

    def first(self, function: Callable[[], T]) -> T:
        box: list[Any] = [function() if self.rank == 0 else None]
        with _peers():
            dist.broadcast_object_list(box, 0)
        return box[0]

    def from_others(self, function: Callable[[], T]) -> list[T]:
        mine = function() if self.rank else None
        box: list[Any] | None = None if self.rank else [None] * self.size
        with _peers():
            dist.gather_object(mine, box, 0)
        return box[1:] if box else []

    def highest(self, *numbers: float) -> tuple[float, ...]:
        found = torch.tensor(numbers, dtype=torch.float64)
        with _peers():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return tuple(found.tolist())


class Agreement:
    """`agreed = agree(wish)` after every step: what all do next is the highest wish of any, the same step for all.

    Several processes ask each other twice a second and not in every step; in between they agree on `otherwise`. The
    time between two questions at most doubles: after a pause a GPU takes many steps from the host before one of them
    has taken its time.
    """

    def __init__(self, group: Group, otherwise: int) -> None:
        self.group, self.otherwise = group, otherwise
        self.asked, self.steps, self.every = time.monotonic(), 0, 1

    def __call__(self, wish: int) -> int:
        if self.group.size == 1:
            return wish
        self.steps += 1
        if self.steps < self.every:
            return self.otherwise
        now = time.monotonic()
        agreed, pace = self.group.highest(wish, (now - self.asked) / self.steps)
        self.every = max(1, min(2 * self.every, int(ASKED_EVERY / max(pace, 1e-3))))
        self.asked, self.steps = time.monotonic(), 0
        return int(agreed)


def through_one(tensors: Sequence[Tensor], function: Callable[[Tensor], None]) -> None:
    """`function`, which changes a tensor in place, on all of them as one flat tensor: one message instead of many."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    function(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


@contextmanager
def joined(device: str) -> Iterator[tuple[Group, torch.device]]:
    """(the group of processes that torchrun started this one in, this one's device); alone, ALONE and any device.

    Of an error that ends the run only the process that has it first tells; the others end silently, by SystemExit. They
    notice at their next message to it, or by torchrun's signal.
    """
    size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if size == 1:
        yield ALONE, resolve_device(device)
        return
    # later, as torch.optim imports it, its default arguments would keep the group and its connections open
    import torch.distributed.nn.functional  # noqa: F401

    store, rank, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store, and what was told in it, outlives one
    store = dist.PrefixStore(f"fastpix2pix-{attempt}-{next(_groups)}", store)
    own = None
    try:
        own = own_device(device, size, int(os.environ.get("LOCAL_RANK", rank)))
        backend = "gloo" if own.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        group = _Joined(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        yield group, own
        group.highest(0)  # torchrun ends the others when one ends with an exit code: leave together
    except BaseException as error:
        told = 0
        with suppress(RuntimeError):  # the store went with the process that had it
            told = store.add("told", 1) - 1
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        if own is not None and dist.is_initialized():
            if own.type == "cpu":
                dist.destroy_process_group()
            else:  # which NCCL does too, when the interpreter ends, and there it might wait for the dead
                atexit.register(_leave, code)
        if told:
            raise SystemExit(code) from None
        raise
    dist.destroy_process_group()


def own_device(device: str, size: int, local_rank: int) -> torch.device:
    """cpu, or the GPU with this process's number on its machine. One GPU for all by name is refused."""
    if re.fullmatch(r"cuda:\d+", device):
        raise InputError(
            f"device = {device}: {size} processes need a GPU each; use device = cuda (CUDA_VISIBLE_DEVICES chooses)"
        )
    own = resolve_device(device)
    if own.type == "cpu":
        return own
    if local_rank >= torch.cuda.device_count():
        raise EnvironmentFailed(
            f"process {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}, and every "
            "process takes one; lower --nproc-per-node"
        )
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    return own


def _leave(code: int) -> None:
    """End this process without its destructors."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except torch.AcceleratorError:  # CUDA's own
        raise
    except dist.DistBackendError as error:  # whose text ends with the cause
        reason = " ".join(str(error).split())[-300:]
        raise EnvironmentFailed(f"NCCL failed ({reason}); NCCL_DEBUG=INFO says more") from error
    except RuntimeError as error:
        reason = str(error)[:120]
        raise EnvironmentFailed(f"another process of this run has ended, or is out of reach ({reason} ...)") from error

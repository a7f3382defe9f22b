"""Pictures of several streams in one batch."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

Translate = Callable[[Tensor], Tensor]  # [N, C, H, W] float32 in [-1, 1] -> the same of the output
Before = Callable[[], Tensor]  # gives the input [1, C, H, W]
After = Callable[[Tensor, Tensor], None]  # takes (input, output)

_WAIT = 0.05  # seconds that a picture waits for those of other streams, at most


def _always() -> bool:
    return True


class _Waiting:
    def __init__(self, size: tuple[int, ...], before: Before, after: After, wait: float) -> None:
        self.size, self.before, self.after = size, before, after
        self.due = time.monotonic() + min(_WAIT, wait)
        self.done = threading.Event()
        self.error: BaseException | None = None


class Together:
    """One engine for several streams, each of which calls from a thread of its own. To be closed.

    Pictures of one size that wait at the same time, `most` at once, become one batch: when every stream that brings any
    has one waiting, when there are enough, or when the oldest has waited long enough. All that computes is done in one
    thread: of OpenMP's teams, one for every thread that computes, several would be in each other's way (openmp.py).
    """

    def __init__(self, translate: Translate, most: int) -> None:
        self._translate, self._most = translate, most
        self._streams: list[Callable[[], bool]] = []  # whether each brings pictures
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._closed = False
        self.batches: dict[int, int] = {}  # size of a batch: how often
        self._thread: threading.Thread | None = None  # begins with the first picture

    def join(self, brings: Callable[[], bool] = _always) -> None:
        """One stream more that will call; the others do not wait for it while it brings no pictures."""
        with self._changed:
            self._streams.append(brings)

    def leave(self, brings: Callable[[], bool] = _always) -> None:
        """One stream less, as it joined."""
        with self._changed:
            self._streams.remove(brings)
            self._changed.notify()

    def close(self) -> None:
        """No more pictures, once those at work are through; who still waits for one has an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()  # a thread that computes when Python ends takes the process with it

    def __call__(
        self,
        size: tuple[int, ...],  # of the picture; pictures of equal size may become one batch
        before: Before,
        after: After,
        wait: float = math.inf,  # seconds for those of other streams, where that is less than usual
    ) -> None:
        """One picture, until `after` is through with its output. Raises what computing raised."""
        mine = _Waiting(size, before, after, wait)
        with self._changed:
            if self._closed:
                raise RuntimeError("closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True)
                self._thread.start()
            self._waiting.append(mine)
            self._changed.notify()
        mine.done.wait()
        if mine.error is not None:
            raise mine.error

    def _serve(self) -> None:
        while group := self._next():
            self._run(group)

    def _next(self) -> list[_Waiting]:
        """Waits for what is to be run now; nothing once it is closed."""
        with self._changed:
            while not self._closed:
                if group := self._group():
                    return group
                self._changed.wait(max(0.001, self._waiting[0].due - time.monotonic()) if self._waiting else None)
            for one in self._waiting:
                one.error = RuntimeError("closed")
                one.done.set()
        return []

    def _group(self) -> list[_Waiting]:
        """Nothing where others are still to come."""
        if not self._waiting:
            return []
        oldest = self._waiting[0]
        same = [one for one in self._waiting if one.size == oldest.size][: self._most]
        complete = len(same) >= self._most or len(self._waiting) >= sum(brings() for brings in self._streams)
        if not complete and time.monotonic() < oldest.due:
            return []
        self._waiting = [one for one in self._waiting if one not in same]
        return same

    @torch.no_grad()
    def _run(self, group: list[_Waiting]) -> None:
        try:
            inputs = [one.before() for one in group]
            outputs = self._translate(inputs[0] if len(group) == 1 else torch.cat(inputs))
            for i, one in enumerate(group):
                one.after(inputs[i], outputs[i : i + 1])
        except BaseException as error:
            for one in group:
                one.error = error
        self.batches[len(group)] = self.batches.get(len(group), 0) + 1
        for one in group:
            one.done.set()

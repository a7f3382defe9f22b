"""Pictures of several streams in one batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

Translate = Callable[[Tensor], Tensor]  # [N, C, H, W] float32 in [-1, 1] -> the same of the output

_WAIT = 0.05  # seconds that a picture waits for those of other streams


class _Waiting:
    def __init__(self, picture: Tensor) -> None:
        self.picture, self.due = picture, time.monotonic() + _WAIT
        self.output: Tensor | None = None
        self.error: BaseException | None = None


class Together:
    """One engine for several streams, each of which calls from a thread of its own.

    Pictures of one size that wait at the same time, `most` at once, become one batch: the oldest runs it when every
    stream has one waiting, when there are enough, or when it has waited long enough. One batch runs at a time.
    """

    def __init__(self, translate: Translate, most: int) -> None:
        self._translate, self._most = translate, most
        self._streams = 0
        self._waiting: list[_Waiting] = []
        self._running = False
        self._changed = threading.Condition()
        self.batches: dict[int, int] = {}  # size of a batch: how often

    def join(self) -> None:
        """One stream more that will call."""
        with self._changed:
            self._streams += 1

    def leave(self) -> None:
        """One stream less."""
        with self._changed:
            self._streams -= 1
            self._changed.notify_all()

    def __call__(
        self,
        picture: Tensor,  # [1, C, H, W] float32 in [-1, 1]
    ) -> Tensor:
        mine = _Waiting(picture)
        with self._changed:
            self._waiting.append(mine)
            self._changed.notify_all()
            while mine.output is None and mine.error is None:
                if group := self._group(mine):
                    self._running = True
                    break
                self._changed.wait(max(0.001, mine.due - time.monotonic()) if not self._running else None)
        if mine.output is None and mine.error is None:
            self._run(group)
        if mine.error is not None:
            raise mine.error
        assert mine.output is not None
        return mine.output

    def _group(self, mine: _Waiting) -> list[_Waiting]:
        """What the caller is to run now; nothing where it is not its turn, or others are still to come."""
        if self._running or self._waiting[0] is not mine:
            return []
        same = [one for one in self._waiting if one.picture.shape == mine.picture.shape][: self._most]
        complete = len(same) >= self._most or len(self._waiting) >= self._streams
        if not complete and time.monotonic() < mine.due:
            return []
        self._waiting = [one for one in self._waiting if one not in same]
        return same

    def _run(self, group: list[_Waiting]) -> None:
        try:
            pictures = [one.picture for one in group]
            output = self._translate(pictures[0] if len(group) == 1 else torch.cat(pictures))
            for i, one in enumerate(group):
                one.output = output[i : i + 1]
        except BaseException as error:
            for one in group:
                one.error = error
        finally:
            with self._changed:
                self._running = False
                self.batches[len(group)] = self.batches.get(len(group), 0) + 1
                self._changed.notify_all()

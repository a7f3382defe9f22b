"""A source over a network: read in a thread of its own, opened again when it is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

_BEAT = 0.2  # seconds between two looks at whether to stop
_SETTLED = 5.0  # seconds of pictures after which an outage is over
_SHORTEST, _LONGEST = 0.5, 2.0  # seconds between two attempts to open a source


class Aside:
    """A thread that reads for another one, which can stop waiting: FFmpeg may wait for a network as long as --timeout.

    After a read that was given up only `close` is allowed.
    """

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._found: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def each(self, items: Iterator[Any], stop: Callable[[], bool]) -> Iterator[Any]:
        """The items, none of which is None, as far as they come before it is asked to stop."""
        while (item := self._wait(partial(next, items, None), stop)) is not None:
            yield item

    def close(self, last: Callable[[], Any]) -> None:
        """Have `last` done after all that was asked, and end. Waits for nothing."""
        self._asked.put(last)
        self._asked.put(None)

    def _wait(self, work: Callable[[], Any], stop: Callable[[], bool]) -> Any:
        self._asked.put(work)
        while True:
            try:
                found, error = self._found.get(timeout=_BEAT)
            except Empty:
                if stop():
                    return None
                continue
            if error is not None:
                raise error
            return found

    def _serve(self) -> None:
        while (work := self._asked.get()) is not None:
            try:
                self._found.put((work(), None))
            except BaseException as error:
                self._found.put((None, error))


class Attempts:
    """How often a source is opened again in one outage, which is over when pictures came for some seconds."""

    def __init__(self, most: int) -> None:
        self._most, self.made = most, 0
        self._begin: float | None = None  # when the first picture of this connection came

    def picture(self, now: float) -> None:
        """One came, at a time in seconds."""
        if self._begin is None:
            self._begin = now
        elif now - self._begin >= _SETTLED:
            self.made = 0

    def another(self) -> bool:
        """Whether there is one more."""
        if self.made >= self._most:
            return False
        self.made, self._begin = self.made + 1, None
        return True

    def pause(self) -> float:
        """Seconds to wait where the last one failed."""
        return min(_LONGEST, _SHORTEST * self.made)

"""What a command says: text, tables and progress on stderr, JSON where it was asked for."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from .files import write_text

_LINE_EVERY = 15.0  # seconds between two plain lines


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def show_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Figures in columns, on stderr."""
    width = max(len(title), *map(len, rows))
    say("  ".join([title.ljust(width), *(f"{name:>8}" for name in next(iter(rows.values())))]))
    for label, row in rows.items():
        cells = (f"{v:8d}" if isinstance(v, int) else f"{v:8.4f}" for v in row.values())
        say("  ".join([label.ljust(width), *cells]))


def write_json(target: str | None, content: dict[str, Any]) -> None:
    """To a file, to stdout for "-", nowhere for None. A reader that closed the pipe ends it quietly."""
    text = json.dumps(content, indent=1)
    if target == "-":
        try:
            print(text, flush=True)
        except BrokenPipeError:
            leave_stdout()
    elif target is not None:
        write_text(Path(target), text + "\n")


def leave_stdout() -> None:
    """After a BrokenPipeError: what is still to be written, at exit too, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """A bar on a terminal, a plain line now and then otherwise.

    `with Progress("train", total) as p: p.update(done, "12 img/s")`; a total of 0 is not known yet.
    """

    def __init__(self, title: str, total: int = 0, *, quiet: bool = False) -> None:
        self.title, self.total, self.quiet = title, total, quiet
        self._shown = time.monotonic()
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total or None, note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are finished."""
        if self._bar:
            self._bar.update(self._task, completed=done)
            if note:
                self._bar.update(self._task, note=note)
        elif not self.quiet and (time.monotonic() - self._shown > _LINE_EVERY or (done == self.total and self.total)):
            self._shown = time.monotonic()
            self.say(f"{self.title}: {done}" + (f"/{self.total}" if self.total else "") + (f"  {note}" if note else ""))

    def count(self, done: int, total: int) -> None:
        """`update` for callbacks that know the total."""
        self.total = total
        if self._bar:
            self._bar.update(self._task, total=total)
        self.update(done)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self.quiet:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            say(text)

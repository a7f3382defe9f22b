"""The record of a check: one row after the other, on disk as soon as it is known, within a time budget."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpix2pix.errors import CheckFailed
from fastpix2pix.files import write_text

Values = dict[str, Any]
LONGEST = 180.0  # seconds for a row, beside twice what it is known to need, or since a kernel was compiled in it


class Skipped(Exception):
    """A row that cannot be had here; the message is the reason."""


class Mismatch(CheckFailed):
    """Numbers that are wrong, with what was measured."""

    def __init__(self, message: str, values: Values | None = None) -> None:
        super().__init__(message)
        self.values = values or {}


class Running(NamedTuple):
    """The row that is being worked on."""

    part: str
    row: str
    end: float  # by when it has to be through, as time.monotonic() has it


class Row(dict[str, Any]):
    """A row, which does not change any more."""

    @cached_property
    def text(self) -> str:
        """As the file has it; kept, for an encoder that indents is slow and the file is written after every row."""
        return f"\n{json.dumps(self, indent=1)}".replace("\n", "\n  ")


class Report:
    """Rows {part, row, status: ok | failed | skipped, reason, seconds, values}, rewritten to `path` after each.

    A row starts only while its part has time; a part may use up the shares of the parts before it. Rows of other parts
    that `path` already holds, from the same device, versions and clean commit, are kept; where a process `goes_on` with
    the record of another, all are.
    """

    def __init__(
        self, path: Path, facts: Values, budget: float, shares: dict[str, float], goes_on: bool = False
    ) -> None:
        self.path, self.facts, self.budget, self.shares, self.goes_on = path, facts, budget, shares, goes_on
        self.start = time.monotonic()
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if goes_on else self._kept(set(shares))
        self.rows = [Row(row) for row in rows]
        self.lost = ""  # the row after which this process can do nothing more with the GPU
        self.running: Running | None = None
        self.compiled = -math.inf  # when this process last compiled a kernel, as time.monotonic() has it
        self.share_out()
        self.save()

    def _kept(self, parts: set[str]) -> list[Values]:
        if not self.path.exists() or self.facts["commit"].endswith("dirty"):
            return []
        old = json.loads(self.path.read_text(encoding="utf-8"))
        same = {k: v for k, v in old["facts"].items() if k != "date"} == {
            k: v for k, v in self.facts.items() if k != "date"
        }
        return [row for row in old["rows"] if row["part"] not in parts] if same else []

    def save(self) -> None:
        """Write the file aside and rename it."""
        rows = ",".join(row.text for row in self.rows)
        head = json.dumps({"facts": self.facts, "budget_s": self.budget, "rows": []}, indent=1).removesuffix("]\n}")
        write_text(self.path, head + (rows and f"{rows}\n ") + "]\n}\n")

    def share_out(self) -> None:
        """Divide what is left of the budget among the parts by their shares."""
        spent, total = time.monotonic() - self.start, sum(self.shares.values())
        ends = accumulate(self.shares.values())
        left = self.budget - spent
        self.deadlines = {part: spent + left * end / total for part, end in zip(self.shares, ends, strict=True)}

    def left(self, part: str) -> float:
        """Seconds that `part` still has."""
        return self.deadlines[part] - (time.monotonic() - self.start)

    def of(self, part: str, start: str = "") -> list[Values]:
        """The rows of a part whose names begin so."""
        return [row for row in self.rows if row["part"] == part and row["row"].startswith(start)]

    def add(self, part: str, row: str, status: str, reason: str = "", seconds: float = 0.0, **values: Any) -> None:
        """Append a row and save."""
        found = {"part": part, "row": row, "status": status, "reason": reason, "seconds": round(seconds, 3)}
        self.rows.append(Row(found, values=values))
        self.save()

    def run(
        self,
        part: str,
        row: str,
        function: Callable[[], Values],
        *,
        needs: float = 0.0,
        leaving: float = 0.0,
        longest: float = LONGEST,
        required: bool = True,
    ) -> bool:
        """Add the row of what `function` returns; True where that is "ok".

        `needs`: seconds it is known to take; `leaving`: that have to be left then, for what would be worth nothing
        without it or is wanted more. Beyond `longest` it hangs. Wrong numbers and, where `required`, any error are
        "failed"; an error of a row that is not required (a competitor's) is "skipped" with its text.
        """
        if self.lost:
            self.add(part, row, "skipped", f"the CUDA context was lost in {self.lost}")
            return False
        if (left := self.left(part)) <= needs + leaving:
            what = f"budget: {max(left, 0):.0f} s left for {part} of a budget of {self.budget:g} s"
            what += f"; this needs about {needs:.0f} s" if needs else ""
            what += f"; {leaving:.0f} s are for what comes after it" if leaving else ""
            self.add(part, row, "skipped", what)
            return False
        start = time.monotonic()
        self.running = Running(part, row, start + longest + 2 * needs)
        status, reason, values = "ok", "", {}
        try:
            values = function()
            _synchronise()
        except Skipped as error:
            status, reason = "skipped", str(error)
        except Mismatch as error:
            status, reason, values = "failed", str(error), error.values
        except Exception as error:  # whatever a kernel, a compiler or a driver raises is a result here
            status, reason = "failed" if required else "skipped", f"{type(error).__name__}: {_line(error)}"
            if isinstance(error, torch.OutOfMemoryError):
                status, reason = "skipped", f"out of memory: {_line(error)}"
            try:
                _use_all()
            except Exception as fatal:
                status, reason, self.lost = "failed", f"{reason}; then {_line(fatal)}", f"{part}: {row}"
        self.running = None
        self.add(part, row, status, reason, time.monotonic() - start, **values)
        return status == "ok"

    def failures(self) -> list[Values]:
        """The rows that failed."""
        return [row for row in self.rows if row["status"] == "failed"]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _use_all() -> None:
    """Raises where torch can no longer use the GPU."""
    _synchronise()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.rand((), device="cuda")
        _synchronise()


def _line(error: Exception) -> str:
    """The message, shortened: enough to know the error by."""
    return " ".join(str(error).split())[:600]

"""The regression gate: run the suites, hold every ratio against its limit and against the saved one.

python -m bench.gate save                            measure, and keep the ratios of this machine and device
python -m bench.gate compare                         measure again; exit code 4 where something became slower
python -m bench.gate compare --only 'kernels/*' --plant 'kernels/l1_tanh_loss *=2'    a slow-down that must be found

Limits and their reasons are in bench/thresholds.toml. Exit codes: 0, 4 where a ratio is over its limit or a comparison
computes something else or fails, 2 for a bad option, 3 for a device that is not there.
`make` turns any of them into its own 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from fastpix2pix.device import resolve_device
from fastpix2pix.errors import Fastpix2pixError, InputError

from .devices import ROOT

THRESHOLDS = Path(__file__).with_name("thresholds.toml")
STORAGE = ROOT / ".benchmarks"
# glibc then keeps what is freed: else a large temporary is mapped anew or not, and the same work takes once or twice as
# long from process to process
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
Rows = dict[str, dict[str, Any]]  # what -> extra_info of the suite


class Limits(NamedTuple):
    """thresholds.toml"""

    against_saved: float
    retries: int
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path = THRESHOLDS) -> Limits:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(content["against_saved"], content["retries"], content["limit"])

    def of(self, what: str, device: str) -> float | None:
        """The limit of a comparison on "cpu" or "cuda"."""
        row = next((row for row in self.rows if fnmatch(what, row["what"])), {})
        return row.get(device)


class Verdict(NamedTuple):
    """Of one comparison."""

    what: str
    ratio: float
    low: float  # of its interval
    limit: float | None  # thresholds.toml
    saved: float | None  # upper end of the saved ratio's interval
    allowed: float | None  # the lower of the limit and what the saved ratio allows

    @property
    def over(self) -> bool:
        return self.allowed is not None and self.low > self.allowed


def judge(rows: Rows, saved: Rows, limits: Limits, device: str) -> list[Verdict]:
    """Every row against its limit and the saved ratio."""
    found = []
    for what, row in rows.items():
        limit, before = limits.of(what, device), saved.get(what)
        ratio = row["ratio"]
        earlier = before["ratio"]["high"] if before else None
        bounds = [b for b in (limit, earlier and earlier * limits.against_saved) if b is not None]
        allowed = min(bounds, default=None)
        found.append(Verdict(what, ratio["median"], ratio["low"], limit, earlier, allowed))
    return found


def table(rows: Rows, verdicts: Sequence[Verdict]) -> str:
    """One line per comparison."""
    width = max((len(verdict.what) for verdict in verdicts), default=4)
    head = f"{'what':{width}} {'ours ms':>10} {'baseline ms':>12} {'ratio':>6} {'interval':>14} {'allowed':>8}"
    lines = [f"{head} {'floor':>6}"]
    for v in verdicts:
        row = rows[v.what]
        interval = f"{v.low:.2f} - {row['ratio']['high']:.2f}"
        allowed = "-" if v.allowed is None else f"{v.allowed:.2f}"
        share = "-" if not row["floor_ms"] else f"{100 * row['floor_ms'] / row['ours_ms']:.0f} %"
        lines.append(
            f"{v.what:{width}} {row['ours_ms']:10.3f} {row['baseline_ms']:12.3f} {v.ratio:6.2f} {interval:>14} "
            f"{allowed:>8} {share:>6}{'  OVER' if v.over else ''}"
        )
    return "\n".join(lines)


class Failed(Exception):
    """The suites did not pass: the message is theirs."""


def run_suites(only: Sequence[str], plant: str, device: str, extra: Sequence[str] = ()) -> dict[str, Any]:
    """pytest-benchmark's record. Failed where a comparison computes something else or cannot run."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-enable", "-rN"]
        command += ["--benchmark-quiet", "--tb=short", f"--benchmark-json={record}", *extra, "bench/suites"]
        chosen = {"ONLY": "\n".join(only), "DEVICE": device, "PLANT": plant}
        environment = os.environ | _MEMORY | {f"FASTPIX2PIX_BENCH_{name}": value for name, value in chosen.items()}
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        if done.returncode:
            raise Failed(f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}")
        if not record.is_file():
            raise InputError(f"--only {' '.join(only)}: matches no comparison; 'kernels/*' and '*/batch 1*' do")
        return json.loads(record.read_text(encoding="utf-8"))


def rows_of(record: dict[str, Any]) -> Rows:
    """The comparisons of a record of pytest-benchmark."""
    return {b["extra_info"]["what"]: b["extra_info"] for b in record["benchmarks"] if "what" in b["extra_info"]}


def storage(device: str) -> Path:
    """Where the records of this machine and device are."""
    import torch

    from .devices import facts, machine

    names = [machine(), *([facts(torch.device(device))["device"]] if device.startswith("cuda") else [])]
    return STORAGE / "-".join(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in names)


def newest(folder: Path) -> Rows:
    """The ratios saved last; none where nothing was saved."""
    files = sorted(folder.glob("*/[0-9]*.json"), key=lambda path: path.stat().st_mtime)
    return rows_of(json.loads(files[-1].read_text(encoding="utf-8"))) if files else {}


def save(only: Sequence[str], device: str) -> int:
    """Measure and keep, in pytest-benchmark's storage."""
    folder = storage(device)
    record = run_suites(only, "", device, [f"--benchmark-storage=file://{folder}", "--benchmark-save=saved"])
    rows = rows_of(record)
    print(table(rows, judge(rows, {}, Limits.read(), _type(device))))
    print(f"{len(rows)} ratios -> {folder}")
    return 0


def compare(only: Sequence[str], device: str, plant: str, retries: int | None) -> int:
    """Measure, judge, measure those that are over again; 4 where some stay over."""
    limits, saved = Limits.read(), newest(storage(device))
    if not saved:
        print(f"nothing saved in {storage(device)} (python -m bench.gate save): thresholds.toml alone decides")
    rows = rows_of(run_suites(only, plant, device))
    verdicts = judge(rows, saved, limits, _type(device))
    print(table(rows, verdicts))
    over = [v.what for v in verdicts if v.over]
    for attempt in range(limits.retries if retries is None else retries):
        if not over:
            break
        print(f"over the limit, measured again ({attempt + 1}): {', '.join(over)}")
        again = rows_of(run_suites([_literal(what) for what in over], plant, device))
        verdicts = judge(again, saved, limits, _type(device))
        print(table(again, verdicts))
        over = [v.what for v in verdicts if v.over]
    print(f"SLOWER: {', '.join(over)}" if over else f"{len(rows)} comparisons, none slower than allowed")
    return 4 if over else 0


def _type(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device.partition(":")[0]


def _literal(what: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", what)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("action", choices=("save", "compare"))
    parser.add_argument("--only", action="append", help="pattern of the comparisons, 'kernels/*'; may be repeated")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--plant", default="", help="'PATTERN=TIMES': make ours so many times as slow")
    parser.add_argument("--retries", type=int, help="instead of those in thresholds.toml")
    options = parser.parse_args(arguments)
    if options.plant and not re.fullmatch(r".+=[1-9]\d*", options.plant):
        parser.error(f"--plant {options.plant}: give PATTERN=TIMES, 'kernels/l1_tanh_loss *=2'")
    only = options.only or ["*"]
    try:
        device = str(resolve_device(options.device))
        if options.action == "save":
            return save(only, device)
        return compare(only, device, options.plant, options.retries)
    except Fastpix2pixError as error:
        print(f"bench.gate: {error}", file=sys.stderr)
        return error.exit_code
    except Failed as error:
        print(f"bench.gate: the suites did not pass:\n{error}", file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(main())

"""`fastpix2pix bench`: measure every comparison, print one table, write the record and a page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastpix2pix import __version__
from fastpix2pix.config import Bench
from fastpix2pix.device import resolve_device
from fastpix2pix.errors import CheckFailed
from fastpix2pix.files import write_text

from .breakdown import step_breakdown
from .comparison import all_comparisons, measure
from .devices import bench_setting, facts, prepare
from .page import page
from .peaks import peaks_of

Record = dict[str, Any]  # {facts, options, peaks, comparisons: rows of `measure`, breakdown, seconds}


def run(options: Bench, out: Path, say: Callable[[str], None], progress: Callable[[int, int], None]) -> Record:
    """Measure and leave out/result.json and out/index.html; the record. The table goes to `say`.

    The files are written after every row. Raises CheckFailed where something computed something else, or broke.
    """
    device, began = resolve_device(options.device), time.monotonic()
    threads = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    prepare(device)
    at = bench_setting(device, options.scale)
    peaks = peaks_of(device, at.sides)
    where = facts(device) | {"threads": torch.get_num_threads(), "fastpix2pix": __version__}
    record: Record = {"facts": where, "options": vars(options), "peaks": peaks._asdict(), "comparisons": []}
    slow = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
    try:
        wanted = list(all_comparisons(at, options.chosen))
        for number, comparison in enumerate(wanted):
            record["comparisons"].append(measure(comparison, at, peaks, slow=slow))
            _write(record, out, began)
            progress(number + 1, len(wanted))
        if "steps" in options.chosen:
            record["breakdown"] = step_breakdown(at)
    finally:
        torch.set_num_threads(threads)
    _write(record, out, began)
    for line in table(record):
        say(line)
    if failed := [row for row in record["comparisons"] if row["status"] == "failed"]:
        raise CheckFailed("; ".join(f"{row['part']}/{row['name']}: {row['reason']}" for row in failed))
    return record


def _write(record: Record, out: Path, began: float) -> None:
    record["seconds"] = round(time.monotonic() - began, 1)
    write_text(out / "result.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "index.html", page(record))


def table(record: Record) -> list[str]:
    """What, ours, baseline, ratio, floor."""
    rows = record["comparisons"]
    width = max([4, *(len(f"{row['part']}/{row['name']}") for row in rows)])
    lines = [
        f"{'what':{width}}  {'ours ms':>10}  {'baseline ms':>11}  {'ratio':>5}  {'(99 % sure)':>13}  {'floor ms':>9}  "
        f"of floor"
    ]
    for row in rows:
        what = f"{row['part']}/{row['name']}"
        if row["status"] != "ok":
            lines.append(f"{what:{width}}  {row['status']}: {row['reason']}")
            continue
        ours, base, ratio = row["ways"][row["ours"]], row["ways"][row["baseline"]], row["ways"][row["ours"]]["ratio"]
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        floor, share = floor_columns(row)
        lines.append(
            f"{what:{width}}  {ours['ms']:10.3f}  {base['ms']:11.3f}  {ratio['median']:5.2f}  {interval:>13}  "
            f"{floor:>9}  {share:>8}"
        )
    return lines


def floor_columns(row: Record) -> Sequence[str]:
    """(least time in ms, share of it in ours), or dashes."""
    floor = row["floor_ms"]
    if floor is None or row["status"] != "ok":
        return "-", "-"
    return f"{floor:.4g}", f"{100 * floor / row['ways'][row['ours']]['ms']:.0f} %"

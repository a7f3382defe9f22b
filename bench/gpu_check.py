"""Everything that only a GPU can tell, in one run: is it right there, and how fast is it.

python -m bench.gpu_check                                   all parts, at most 8 minutes
python -m bench.gpu_check --parts kernels,steps --budget 300
python -m bench.gpu_check --parts convolutions --budget 1800    every candidate of every layer: compiling takes most
python -m bench.gpu_check --device cpu --small              the harness itself, without a GPU (TRITON_INTERPRET=1)

Results go into bench/results/<gpu>-<commit>.json as they come. After a row that hangs, or after which the GPU can no
longer be used, another process goes on. Compiling takes minutes, and can be done before, on any machine: precompile.py;
else the first 100 seconds at most are for it.
Exit code: 0, 4 where something is wrong, 2 for a bad option, 3 where there is no such device.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .devices import Setting
    from .report import Report

# In the order they run, what matters most first; shares of the budget. A part may use what the ones before it left.
# The steps' figures are wanted most: at 8 minutes theirs is what batch 1 and the largest take, torch.compile included.
PARTS = {
    **{"kernels": 0.09, "gradients": 0.05, "steps": 0.68, "engines": 0.07, "frames": 0.04},
    **{"layers": 0.01, "curves": 0.02, "convolutions": 0.02, "tests": 0.02},
}
SHOWN = 4  # rows of a part that the summary names for not being ok


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    from fastpix2pix.device import resolve_device
    from fastpix2pix.errors import Fastpix2pixError

    from . import (
        convolutions,
        engines,
        frame_rates,
        gpu_tests,
        kernel_cases,
        layers,
        precompile,
        step_times,
        training_checks,
    )
    from .comparison import release
    from .devices import facts, prepare, result_path, setting
    from .report import Report

    try:
        device = resolve_device(options.device)
    except Fastpix2pixError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return error.exit_code
    prepare(device)
    at, found = setting(device, options.small), facts(device)
    path = options.out or result_path(found)
    shares = {part: PARTS[part] for part in PARTS if part in options.parts}
    report = Report(path, found, options.budget, shares, options.goes_on)
    go_on = partial(_go_on, report, options)
    _notice_compiling(report)
    threading.Thread(target=_watch, args=(report, go_on), daemon=True).start()
    runners: dict[str, Callable[[Report, Setting], None]] = {
        "kernels": kernel_cases.run,
        "gradients": training_checks.run_gradients,
        "steps": step_times.run,
        "engines": engines.run,
        "frames": frame_rates.run,
        "layers": layers.run,
        "curves": training_checks.run_curves,
        "convolutions": convolutions.run,
        "tests": gpu_tests.run,
    }
    precompile.run(report, at)
    for part in shares:
        began = time.monotonic()
        runners[part](report, at)
        if report.lost:
            go_on(part)
        print(f"{part}: {_counts(report, part)}; {time.monotonic() - began:.0f} s", flush=True)
        release(at)
    print(f"\n{_summary(report)}\n{path}")
    return 4 if report.failures() else 0


def _watch(report: Report, go_on: Callable[[str], None]) -> None:
    """Leave a row that hangs behind, with its process. One in which kernels are still being compiled does not hang."""
    from .report import LONGEST

    while True:
        time.sleep(1)
        running = report.running
        if running is not None and time.monotonic() > max(running.end, report.compiled + LONGEST):
            report.add(running.part, running.row, "failed", "hangs, or takes far longer than it should")
            go_on(running.part)


def _notice_compiling(report: Report) -> None:
    """Let the report know of every kernel that Triton compiles here: with an empty cache a row may compile dozens."""
    from fastpix2pix.kernels._triton import triton

    def compiled(**_: Any) -> None:
        report.compiled = time.monotonic()

    if triton is not None:
        triton.knobs.compilation.listener = compiled


def _go_on(report: Report, options: argparse.Namespace, part: str) -> None:
    """Replace this process, which can do nothing more with the GPU, by one for the parts that are left; of the steps,
    for the batch sizes that are not through too."""
    order = [name for name in PARTS if name in options.parts]
    rest = order[order.index(part) + (part != "steps") :]
    print(f"{part}: {_counts(report, part)}; a new process goes on with {', '.join(rest) or 'nothing'}", flush=True)
    budget = max(1.0, report.budget - (time.monotonic() - report.start))
    given = ["--parts", ",".join(rest) or "none", "--budget", f"{budget:.0f}", "--out", str(report.path), "--goes-on"]
    given += ["--device", options.device, *(["--small"] if options.small else [])]
    os.execv(sys.executable, [sys.executable, "-m", "bench.gpu_check", *given])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", type=_parts, default=tuple(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/<gpu>-<commit>.json")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="tiny networks, to test the harness")
    parser.add_argument("--goes-on", action="store_true", help="add to the rows that the result file has")
    return parser.parse_args(arguments)


def _parts(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    parts = tuple(filter(None, (part.strip() for part in text.split(",")))) or tuple(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: allowed are {', '.join(PARTS)}")
    return parts


def _counts(report: Report, part: str) -> str:
    rows = report.of(part)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "skipped")}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def _summary(report: Report) -> str:
    """Some of what is not ok, then times: short enough for the end of a log."""
    wrong: dict[tuple[str, str], list[str]] = {}
    times, ratios = [], []
    for row in report.rows:
        values = row["values"]
        if row["status"] != "ok":
            text = f"{row['status']:<8}{row['part']}: {row['row']}: {row['reason'][:160]}"
            wrong.setdefault((row["status"], row["part"]), []).append(text)
        elif "ms" in values:
            ratio = f"{values['times_eager_fp32']:6.2f} x eager fp32" if "times_eager_fp32" in values else ""
            times.append(f"{row['row']:<58}{values['ms']:9.3f} ms{values['images_per_s']:10.1f} img/s  {ratio}")
        elif "frames_per_s" in values:
            times.append(f"{row['row']:<58}{values['p99_ms']:9.3f} ms{values['frames_per_s']:10.1f} frames/s, p99")
        elif "times_library" in values:
            ratios.append(values["times_library"])
    lines = []
    for (status, part), texts in sorted(wrong.items(), reverse=True):
        more = len(texts) - SHOWN
        lines += texts[:SHOWN] + ([f"{status:<8}{part}: {more} more"] if more > 0 else [])
    if ratios:
        faster = sum(ratio > 1 for ratio in ratios)
        times.append(f"own convolutions faster than the library in {faster} of {len(ratios)} products")
    return "\n".join(lines + times)


if __name__ == "__main__":
    sys.exit(main())

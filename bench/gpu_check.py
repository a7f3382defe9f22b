"""Everything that only a GPU can tell, in one run: is it right there, and how fast is it.

python -m bench.gpu_check                                   all parts, at most 8 minutes
python -m bench.gpu_check --parts kernels,steps --budget 300
python -m bench.gpu_check --parts convolutions --budget 1800    every candidate of every layer: compiling takes most
python -m bench.gpu_check --device cpu --small              the harness itself, without a GPU (TRITON_INTERPRET=1)

Results go into bench/results/<gpu>-<commit>.json as they come. Exit code: 0, 4 where something is wrong, 2 for a bad
option, 3 where there is no such device.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# shares of the budget
PARTS = {
    **{"kernels": 0.22, "gradients": 0.06, "curves": 0.09, "layers": 0.06, "convolutions": 0.2},
    **{"steps": 0.28, "engines": 0.09, "frames": 0.08, "tests": 0.12},
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    import torch

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
    from .devices import Setting, facts, result_path, setting
    from .report import Report

    try:
        device = resolve_device(options.device)
    except Fastpix2pixError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return error.exit_code
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # shapes do not change; the same for every competitor
    torch.backends.cudnn.allow_tf32 = True  # of fp32 convolutions, as by default
    at, found = setting(device, options.small), facts(device)
    path = options.out or result_path(found)
    report = Report(path, found, options.budget, {part: PARTS[part] for part in PARTS if part in options.parts})
    runners: dict[str, Callable[[Report, Setting], None]] = {
        "kernels": kernel_cases.run,
        "gradients": training_checks.run_gradients,
        "curves": training_checks.run_curves,
        "layers": layers.run,
        "convolutions": convolutions.run,
        "steps": step_times.run,
        "engines": engines.run,
        "frames": frame_rates.run,
        "tests": gpu_tests.run,
    }
    for part, run in runners.items():
        if part in options.parts:
            if part == "kernels":
                precompile.run(report, at)
            run(report, at)
            print(f"{part}: {_counts(report, part)}", flush=True)
    print(f"\n{_summary(report)}\n{path}")
    return 4 if report.failures() else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", type=_parts, default=tuple(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/<gpu>-<commit>.json")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="tiny networks, to test the harness")
    return parser.parse_args(arguments)


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(filter(None, (part.strip() for part in text.split(",")))) or tuple(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: allowed are {', '.join(PARTS)}")
    return parts


def _counts(report: object, part: str) -> str:
    rows = [row for row in report.rows if row["part"] == part]  # type: ignore[attr-defined]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "skipped")}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def _summary(report: object) -> str:
    """Step times, then whatever is not ok."""
    lines = []
    for row in report.rows:  # type: ignore[attr-defined]
        if "ms" in row["values"]:
            values = row["values"]
            times = f"{values['times_eager_fp32']:6.2f} x eager fp32" if "times_eager_fp32" in values else ""
            lines.append(f"{row['row']:<58}{values['ms']:9.3f} ms{values['images_per_s']:10.1f} img/s  {times}")
        elif row["status"] != "ok":
            lines.append(f"{row['status']:<8}{row['part']}: {row['row']}: {row['reason'][:160]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""From a checkpoint to a verified engine: export, build, compare, and only then put the files in place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Build, Precision, build_config
from ..errors import CheckFailed, EnvironmentFailed, InputError
from ..files import check_writable, written_aside
from ..runtime.plan import SUFFIXES, write_plan
from .candidate import Built, make
from .job import Count, Job, Say, prepare
from .tensorrt import not_supported_reasons

__all__ = ["Built", "build"]


def build(
    model: str | Path,  # run folder, .safetensors or junyanz .pth
    out: str | Path,  # file to make: .onnx, or .engine or .plan with its sidecar FILE.json
    *,
    progress: Count | None = None,  # called with (steps done, steps in all) of the engine's builder
    stop: Callable[[], bool] | None = None,  # asked at every step of it and between all; True: KeyboardInterrupt
    say: Say = lambda line: None,  # takes the lines of the report
    **options: Any,  # the fields of config.Build
) -> Built:
    """Export a generator, build an engine from it, and compare that with the fp32 generator on images.

    The file appears only when the comparison passed (building/gate.py). It runs what was built, where that runs here,
    and otherwise the nearest thing that does: `parity.ran` names it. precision = "auto" takes the fastest that passes;
    where nothing can be timed, the first that passes of fp16, bf16 and fp32.

    Raises InputError for a bad model or option and for what the target cannot honour, EnvironmentFailed for a missing
    library or a build that fails, CheckFailed where the comparison says no.
    """
    chosen, out = build_config(**options), Path(out)
    _check_out(out, chosen)
    job = prepare(model, chosen, progress, stop, say)
    with tempfile.TemporaryDirectory(prefix="fastpix2pix-") as scratch:
        best = _best(job, Path(scratch))
        _put(job, best, out)
    return replace(best, path=out)


def _check_out(out: Path, options: Build) -> None:
    allowed = (".onnx",) if options.target == "onnx" else SUFFIXES
    if out.suffix not in allowed:
        others = "tensorrt or tensorrt-rtx" if options.target == "onnx" else "onnx"
        raise InputError(
            f"{out}: what target = {options.target} makes ends in {' or '.join(allowed)}; rename it, or give "
            f"target = {others}"
        )
    if out.is_dir():
        raise InputError(f"{out} is a folder: give a file")
    if out.exists() and not options.overwrite:
        raise InputError(f"{out} exists: choose another name, or overwrite = True")
    check_writable(out.parent)


def _best(job: Job, scratch: Path) -> Built:
    """What was made of the precision asked for; of auto, the fastest that passes."""
    o = job.options
    if o.precision != "auto":
        return make(job, o.precision, scratch, timed=job.device is not None)
    passed: dict[str, Built] = {}
    tried: dict[str, str] = {}
    timed = job.device is not None or o.target == "onnx"
    for precision in _auto(job):
        try:
            found = make(job, precision, scratch, timed)
        except (CheckFailed, EnvironmentFailed) as error:
            tried[precision] = str(error)
            job.say(f"{precision}: {error}")
            continue
        passed[precision] = found
        tried[precision] = "passes, " + (f"{found.latency['ms']:.2f} ms" if found.latency else "not timed")
        if not timed:
            break
    if not passed:
        raise CheckFailed("no precision passes:\n" + "\n".join(f"  {name} {text}" for name, text in tried.items()))
    best = min(passed, key=lambda name: passed[name].milliseconds)
    how = "the fastest that passes" if timed else "passes; nothing was timed, because it does not run here"
    job.say(f"precision: {best} ({how})")
    return replace(passed[best], tried=tried)


def _auto(job: Job) -> list[Precision]:
    """Precisions to try: the likely fastest first. Quantised ones only with images to calibrate on."""
    order: list[Precision] = ["fp16", "bf16", "fp32"]
    if job.options.calibration is not None and (job.device is not None or job.options.target == "onnx"):
        order = ["fp8", "int8", *order]
    if job.options.target == "onnx":
        order = [p for p in order if p not in ("bf16", "fp8")]  # ONNX Runtime runs neither
    known = job.library.capabilities if job.library else ()
    here = job.capabilities[0] if job.capabilities else None
    return [p for p in order if not not_supported_reasons(job.options, p, known, here)]


def _put(job: Job, best: Built, out: Path) -> None:
    """The file, and the sidecar of an engine, under their names."""
    if job.library is None:
        with written_aside(out) as aside:
            shutil.copyfile(best.path, aside)
        return
    values = job.plan(best.form, best.parity.as_dict())
    write_plan(out, best.path.read_bytes(), **values, stripped=job.options.strip, latency=best.latency)

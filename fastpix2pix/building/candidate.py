"""One precision of a build: exported, built, and compared with the generator."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..config import Form, Modes, Precision
from ..runtime.engine import latency
from ..runtime.onnx_engine import OnnxEngine
from ..runtime.onnx_engine import not_supported_reasons as onnx_reasons
from ..runtime.plan import SUFFIX, write_plan
from ..runtime.tensorrt_engine import TensorRTEngine
from .gate import Parity, Run, compare, tolerance
from .job import Job
from .onnx_graph import export_onnx
from .stand_in import stand_in
from .tensorrt import Engine, Layer, build_engine, shapes


@dataclass(frozen=True)
class Built:
    """What `build` made."""

    path: Path  # of the ONNX file or the engine
    target: str
    form: Form
    modes: Modes
    parity: Parity
    bytes: int  # of the file
    seconds: dict[str, float]  # export, build, gate
    opset: int  # of the ONNX file
    layers: tuple[Layer, ...]  # of the network an engine was built from; none for onnx
    latency: dict[str, Any] | None  # of one call; None where nothing could be timed
    tried: dict[str, str] = field(default_factory=dict)  # precision = auto: what became of each

    @property
    def milliseconds(self) -> float:
        """Of one call; infinite where it was not timed."""
        return float(self.latency["ms"]) if self.latency else math.inf

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "path": str(self.path), "parity": self.parity.as_dict()}


def make(job: Job, precision: Precision, scratch: Path, timed: bool) -> Built:
    """Export, build and compare one precision, with its files in `scratch`. CheckFailed where it does not pass."""
    o, form = job.options, job.form(precision)
    seconds: dict[str, float] = {}
    with _phase(job, seconds, "export"):
        onnx = scratch / f"{precision}.onnx"
        calibration = job.samples.calibration if precision in ("int8", "fp8") else ()
        exported = export_onnx(job.net, job.modes, onnx, form, record=job.record, calibration=calibration)
    engine: Engine | None = None
    if job.library is not None:
        with _phase(job, seconds, "build"):
            engine = _engine(job, onnx, form)
    file = onnx
    if engine is not None:
        file = scratch / f"{precision}{SUFFIX}"
        file.write_bytes(engine.data)
    with _phase(job, seconds, "gate"):
        run, ran, itself = _runner(job, form, onnx, file)
        allowed = tolerance(precision, o.max_difference, o.mean_difference)
        parity = compare(job.net, job.modes, run, ran, job.samples.gate, allowed, o.batches[len(o.batches) // 2])
    parity.check()
    call = _latency(job, itself) if timed and itself is not None else None
    size, layers = file.stat().st_size, engine.layers if engine else ()
    took = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    job.say(f"{precision}: {size / 2**20:.1f} MiB; {took}")
    job.say(f"compared {len(parity.images)} images ({job.samples.source}): {ran}")
    return Built(file, o.target, form, job.modes, parity, size, seconds, exported.opset, layers, call)


def _engine(job: Job, onnx: Path, form: Form, **changes: Any) -> Engine:
    assert job.library is not None
    options = replace(job.options, **changes)
    capabilities = job.capabilities if options.target == "tensorrt-rtx" else ()
    profile = shapes(job.net.config, job.modes, form, job.sizes, options.batches)
    with torch.cuda.device(job.device) if job.device else nullcontext():
        return build_engine(job.library, onnx, options, profile, capabilities, job.progress, job.stop)


def _runner(job: Job, form: Form, onnx: Path, file: Path) -> tuple[Run, str, TensorRTEngine | OnnxEngine | None]:
    """(what the gate runs, what that is, the thing itself where it runs here)."""
    engine: TensorRTEngine | OnnxEngine
    if job.library is None and form.precision not in ("bf16", "fp8"):
        engine = OnnxEngine(onnx, device=None if onnx_reasons(job.device or "cpu") else job.device)
        return _moving(engine), f"ONNX Runtime on {engine.device}", engine
    if job.device is not None and job.library is not None:
        path, how = file, ""
        if job.options.strip:
            path, how = file.with_name(f"whole{SUFFIX}"), ", the same network with its weights"
            path.write_bytes(_engine(job, onnx, form, strip=False).data)
        write_plan(path, path.read_bytes(), **job.plan(form, {}), stripped=False)
        engine = TensorRTEngine(path, job.device)
        return _moving(engine), f"{job.library.name} on {torch.cuda.get_device_name(job.device)}{how}", engine
    run, name = stand_in(onnx)
    what = f"the {job.library.name} engine" if job.library else "the ONNX file"
    return run, f"{name} in place of {what}, which does not run here", None


def _moving(engine: TensorRTEngine | OnnxEngine) -> Run:
    """An engine's translate for batches that lie anywhere."""
    return lambda batch, first: engine.translate(batch.to(engine.device), first)


def _latency(job: Job, engine: TensorRTEngine | OnnxEngine) -> dict[str, Any]:
    """Of a call at the usual size."""
    if isinstance(engine, TensorRTEngine):
        return engine.warm_up()
    return latency(engine, job.options.batches[len(job.options.batches) // 2], *job.sizes[len(job.sizes) // 2])


@contextmanager
def _phase(job: Job, seconds: dict[str, float], name: str) -> Iterator[None]:
    """Times the block; stops before it where that was asked for."""
    if job.stop and job.stop():
        raise KeyboardInterrupt
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start

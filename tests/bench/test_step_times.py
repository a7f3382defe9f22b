"""Which step times a budget buys, told by a simulated clock: no GPU, and nothing is built.

And the weights that a step starts from.
"""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

from bench import report as record
from bench import step_times
from bench.devices import setting
from bench.gpu_check import PARTS
from bench.report import Report, Skipped
from bench.timing import Timing
from fastpix2pix.config import train_config
from fastpix2pix.model import PatchGAN, Unet
from fastpix2pix.model.layers import init_weights
from fastpix2pix.training.module_step import ModuleStep

FACTS = {"device": "cpu", "commit": "0123456789", "date": "today"}
CPU = torch.device("cpu")
# Seconds. A build is a network's, torch's own initial weights included; a search is cuDNN's, for a type and format.
BUILD, SEARCH, COMPILE, CACHED = 1.2, 5.0, 75.0, 40.0
SAMPLES = {1: 2.0, 16: 2.0, 64: 4.0}  # of one competitor's samples in all rounds
OURS, OWN = "explicit bf16 triton graph", "explicit bf16 own convolutions graph"
EAGER, AUTOCAST = "eager fp32 nchw", "eager bf16 autocast nhwc"
COMPILED, WHOLE = "torch.compile bf16 nhwc", "torch.compile bf16 nhwc, whole-step graph"
QUICK = [OURS, OWN, EAGER, AUTOCAST]


class Clock:
    """Stands for the module `time`; counts seconds of a machine that has nothing compiled."""

    def __init__(self) -> None:
        self.now = 0.0
        self.found: set = set()  # what cuDNN and torch.compile know

    def monotonic(self) -> float:
        return self.now

    def once(self, what: tuple, seconds: float, again: float = 0.0) -> None:
        self.now += again if what in self.found else seconds
        self.found.add(what)


class Step:
    """Stands for a state."""

    def step(self, x, y, number, lr):
        return torch.zeros(4)


def simulated(monkeypatch, path: Path, budget: float, start: float, compile_fails: bool = False) -> tuple[Report, dict]:
    """(record, names timed by batch size) of the steps, begun after `start` seconds of checks of single kernels."""
    clock = Clock()

    def find(truth):
        clock.now += 2 * BUILD
        for name in ("fp32 nhwc", "bf16 nhwc"):
            clock.once((truth.batch, name), SEARCH)
        return {}

    def check(truth, entry):
        clock.now += BUILD * (1 + entry.twin)
        if entry.nchw:
            clock.once((truth.batch, "fp32 nchw"), SEARCH)
        if entry.name.startswith("torch.compile"):
            if compile_fails and entry.name == COMPILED:
                raise Skipped("does not compile")
            clock.once((truth.batch, "compiled"), COMPILE, CACHED)
        entry.state = Step()
        return {}

    def interleaved(runs, *_):
        for row, run in runs.items():
            run()
            clock.now += SAMPLES[int(row.split()[1])]
        return {row: Timing.of([1.0, 2.0], 1) for row in runs}

    monkeypatch.setattr(record, "time", clock)
    monkeypatch.setattr(step_times.Truth, "__init__", lambda truth, at, batch: vars(truth).update(batch=batch))
    monkeypatch.setattr(step_times.Truth, "find", find)
    monkeypatch.setattr(step_times.Truth, "check", check)
    monkeypatch.setattr(step_times, "interleaved", interleaved)
    monkeypatch.setattr(step_times, "release", lambda at: None)
    monkeypatch.setattr(step_times, "synthetic_levels", lambda *_, **__: [(torch.zeros(1, 3, 2, 2).byte(),) * 2])
    kept = Report(path, FACTS, budget, PARTS)
    clock.now = start
    step_times.run(kept, setting(CPU, small=False))
    rows = json.loads(path.read_text())["rows"]
    timed = {
        batch: [row["row"].removeprefix(f"batch {batch} ") for row in rows if "ms" in row["values"]]
        for batch in (1, 64, 16)
    }
    return kept, {b: [name for name in names if not name.startswith("batch")] for b, names in timed.items()}


@pytest.mark.parametrize(
    ("budget", "start", "reason"),
    [
        (480, 62, "the default of make gpu-check"),
        (540, 62, "what docs/benchmarking.md says"),
        (540, 155, "a hundred seconds of compiling ahead"),
    ],
)
def test_figures_wanted_most_are_timed_first(monkeypatch, tmp_path, budget, start, reason):
    kept, timed = simulated(monkeypatch, tmp_path / "r.json", budget, start)
    for batch in (1, 64):
        assert {*QUICK, COMPILED} <= set(timed[batch]), timed
    assert kept.left("steps") > -step_times.TIMING
    if start == 62:
        assert WHOLE in timed[1]


@pytest.mark.parametrize("budget", [0, 60, 90, 120, 200, 300, 400, 480, 540, 900])
@pytest.mark.parametrize("start", [0, 62, 150])
def test_every_competitor_has_a_time_or_a_reason(monkeypatch, tmp_path, budget, start):
    kept, timed = simulated(monkeypatch, tmp_path / "r.json", budget, start)
    for batch in (1, 64, 16):
        for entry in chain(*step_times.entries(setting(CPU, small=False), batch)):
            rows = kept.of("steps", f"batch {batch} {entry.name}")
            mine = [row for row in rows if row["row"].removesuffix(": check") == f"batch {batch} {entry.name}"]
            reasons = [row["reason"] for row in mine if row["status"] != "ok"]
            assert (entry.name in timed[batch]) != any("budget: " in reason for reason in reasons), mine
    names = [row["row"] for row in kept.rows if "ms" in row["values"]]
    assert len(names) == len(set(names))  # a time beside torch.compile replaces the one before it


def test_all_is_timed_where_there_is_time(monkeypatch, tmp_path):
    kept, timed = simulated(monkeypatch, tmp_path / "r.json", 1500, 62)
    assert all(len(names) == 9 for names in timed.values()) and all(row["status"] == "ok" for row in kept.rows)


def test_caches_that_were_not_filled_are_not_counted_on(monkeypatch, tmp_path):
    kept, timed = simulated(monkeypatch, tmp_path / "r.json", 345, 62, compile_fails=True)
    (row,) = kept.of("steps", f"batch 1 {WHOLE}: check")
    assert "this needs about 75 s" in row["reason"] and WHOLE not in timed[1]


def test_what_fails_beside_torch_compile_keeps_its_time(monkeypatch, tmp_path):
    kept = Report(tmp_path / "r.json", FACTS, 100.0, PARTS)
    results = [{OURS: Timing.of([1.0, 2.0], 1)}, {OURS: RuntimeError("launch failed")}]

    def interleaved(runs, *_):
        for run in runs.values():
            run()
        return results.pop(0)

    monkeypatch.setattr(step_times, "interleaved", interleaved)
    at, entry = setting(CPU, small=True), step_times.Entry(OURS, lambda: None, required=True, state=Step())
    ready = {OURS: entry}
    step_times._time(kept, at, 2, ready)
    assert ready
    step_times._time(kept, at, 2, ready)
    assert not ready and [row["status"] for row in kept.rows] == ["ok", "failed"]


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "instance", "up": "resize"}, {"n_layers": 0, "dropout": "junyanz"}, {"ema": 0.5}],
)
def test_a_step_starts_from_the_weights_that_its_seed_has_always_given(options):
    """Built without memory first; before, torch's own initial values were drawn and overwritten."""
    small = {"depth": 5, "ngf": 4, "ndf": 4, "n_layers": 1, "crop_size": 64}
    config = train_config(device="cpu", step="modules", precision="fp32", seed=3, **small | options)
    state, draws = ModuleStep(config, CPU), torch.Generator().manual_seed(3)
    for net, plain in (
        (state.generator, init_weights(Unet(config.generator), draws)),
        (state.discriminator, init_weights(PatchGAN(config.discriminator()), draws)),
    ):
        assert net.training and all(parameter.requires_grad for parameter in net.parameters())
        for (name, found), (same, wanted) in zip(net.state_dict().items(), plain.state_dict().items(), strict=True):
            assert name == same and found.stride() == wanted.stride() and found.dtype == wanted.dtype
            assert torch.equal(found, wanted), name

"""Milliseconds per training step: the explicit step and its competitors, in turns in one process.

The figures wanted most come first: the ends of the batch sizes; at each what is built in seconds, which is timed before
torch.compile is begun, and again beside it; then, where that leaves the next batch size its time, the rest. Whatever is
not timed says why in a row of its name.

Nothing is timed before a twin without dropout has agreed with the plain fp32 step: losses of the first step, the
weights' change in it, and the losses after a few steps, when a CUDA graph is being replayed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.training.graph import WARM_UP
from fastpix2pix.training.state import State
from fastpix2pix.tuning.numerics import exact_fp32

from .baselines import CompiledGraphStep, CompiledStep, StandardStep
from .comparison import release
from .devices import Pair, Setting, of_units, synthetic_levels
from .report import Mismatch, Report, Skipped, Values
from .timing import Run, Timing, interleaved
from .training_checks import explicit, modules, relative

PART = "steps"
COMPARED = "fp32 and autocast to compare with"
# Seconds, on the slowest machine seen:
A_BATCH = 45.0  # of a batch size: to find what is right, to check and time what is built in seconds
TIMING = 20.0  # to time all of a batch size
COMPILING, AGAIN = 75.0, 40.0  # a step under torch.compile; where another at that batch size has filled the caches
CHECKED = WARM_UP + 2  # steps: the last two of a graphed one are replays
FACTOR = 3.0  # relative errors allowed, in errors of autocast, beside these:
FLOORS = {"first": 0.01, "update": 0.05, "later": 0.05}
UPDATE_FACTOR = 1.5  # Adam's first step is nearly a sign, so autocast's error is large: 0.5 at batch 1
WITH_DROPOUT = 0.25  # relative: masks differ between implementations


@dataclass
class Entry:
    """One competitor at one batch size."""

    name: str
    build: Callable[..., State]  # (**options of train_config)
    twin: bool = True  # whether a twin without dropout is built for the check; compiling twice takes minutes
    needs: float = 0.0  # seconds to build and check
    again: float = 0.0  # the same where another that takes long was built before it
    required: bool = False  # ours: an error is a failure
    nchw: bool = False
    levels: bool = False  # takes batches as loaders give them: uint8
    triton: bool = False
    own: bool = False  # with own convolutions
    state: State | None = None

    def given(self, levels: list[Pair]) -> list[Pair]:
        """Batches of levels as it takes them."""
        if self.levels:
            return levels
        pairs = [of_units(pair) for pair in levels]
        return [(x.contiguous(), y.contiguous()) for x, y in pairs] if self.nchw else pairs


def entries(at: Setting, batch: int) -> list[list[Entry]]:
    """All competitors in the order they are wanted; each list is timed together with those before it."""
    fp32, bf16 = {"precision": "fp32", "step": "modules"}, {"precision": "bf16", "step": "modules"}
    device, backend = at.device, at.compile_backend

    def standard(read: bool, **options: object) -> State:
        return StandardStep(at.config(batch, **fp32, **options), device, read=read)

    def compiled(kind: type[CompiledStep], **options: object) -> State:
        if kind is CompiledGraphStep and device.type != "cuda":
            raise Skipped("a CUDA graph needs a CUDA device")
        return kind(at.config(batch, **bf16, **options), device, backend)

    def ours(impl: str, graph: str, own: bool = False, **options: object) -> State:
        try:
            return explicit(at, batch, impl, graph, own, **options)
        except EnvironmentFailed as error:
            raise Skipped(str(error)) from None

    our = partial(Entry, required=True, levels=True)
    first, again = (COMPILING, AGAIN) if backend == "inductor" else (0.0, 0.0)
    under_compile = partial(Entry, twin=False, needs=first, again=again)
    return [
        [
            our("explicit bf16 triton graph", partial(ours, "triton", "on"), triton=True),
            our("explicit bf16 own convolutions graph", partial(ours, "triton", "on", True), triton=True, own=True),
            Entry("eager fp32 nchw", partial(standard, False), nchw=True),
            Entry("eager bf16 autocast nhwc", partial(modules, at, batch, "bf16")),
        ],
        [under_compile("torch.compile bf16 nhwc", partial(compiled, CompiledStep))],
        [
            under_compile("torch.compile bf16 nhwc, whole-step graph", partial(compiled, CompiledGraphStep)),
            our("explicit bf16 triton", partial(ours, "triton", "off"), triton=True),
            our("explicit bf16 reference", partial(ours, "reference", "off")),
            Entry("eager fp32 nchw, losses read", partial(standard, True), nchw=True),
        ],
    ]


def run(report: Report, at: Setting) -> None:
    """Check and time, batch size by batch size."""
    wrong = [(row["row"], _of_own_convolutions(row)) for row in report.failures() if _concerns_timing(row)]
    first, *others = at.batches
    order = (first, *reversed(others))  # the ends first: they have targets
    for number, batch in enumerate(order):
        if report.lost:
            return
        if _to_do(report, batch):
            # the last list of a batch size leaves the next one time for its first two
            compiling = COMPILING if at.compile_backend == "inductor" else 0.0
            reserve = A_BATCH + compiling + TIMING if number + 1 < len(order) else 0.0
            _run_batch(report, at, batch, wrong, reserve)
            torch._dynamo.reset()
            release(at)
    if not report.lost:
        for batch in order:
            _name_untimed(report, at, batch)


def _to_do(report: Report, batch: int) -> bool:
    """Whether a batch size is yet to be timed. Of one that a process could not finish, competitors that failed stay on
    record."""
    rows = report.of(PART, f"batch {batch} ")
    failed = [row["row"] for row in rows if row["status"] == "failed"]
    if f"batch {batch} {COMPARED}" in failed or _timed(report, batch):
        return False
    report.rows = [row for row in report.rows if row not in rows or row["row"] in failed]
    return True


def _concerns_timing(row: Values) -> bool:
    """Whether a failed row makes the explicit step in bf16 doubtful."""
    where = {"kernels": "bfloat16", "gradients": "triton", "curves": "triton", "convolutions": "bf16"}
    return where.get(row["part"], "\n") in row["row"]


def _of_own_convolutions(row: Values) -> bool:
    """Whether it says nothing about the step with the library's."""
    return row["part"] == "convolutions" or "own convolutions" in row["row"]


def _run_batch(report: Report, at: Setting, batch: int, wrong: list[tuple[str, bool]], reserve: float) -> None:
    """reserve: seconds that the batch size to come needs; the last list of competitors leaves them."""
    truth = Truth(at, batch)
    if not report.run(PART, f"batch {batch} {COMPARED}", truth.find, leaving=A_BATCH):
        return
    ready: dict[str, Entry] = {}
    *wanted, rest = entries(at, batch)
    for group, left_over in [*((group, 0.0) for group in wanted), (rest, reserve)]:
        before = len(ready)
        for entry in group:
            row = f"batch {batch} {entry.name}"
            if any(old["row"] == f"{row}: check" for old in report.failures()):  # in the process before this one
                continue
            concerned = [text for text, own in wrong if entry.own or not own] if entry.triton else []
            if concerned:
                report.add(PART, row, "skipped", f"not timed: {len(concerned)} checks failed, the first {concerned[0]}")
                continue
            needs = entry.again if any(other.needs for other in ready.values()) else entry.needs
            check, leaving = partial(truth.check, entry), TIMING + left_over
            if report.run(PART, f"{row}: check", check, needs=needs, leaving=leaving, required=entry.required):
                ready[row] = entry
            if report.lost and not _timed(report, batch):  # all of it is done again
                return
        if len(ready) > before:
            report.run(PART, _timing(batch), lambda: _time(report, at, batch, ready))


def _timing(batch: int) -> str:
    return f"batch {batch} timing"


def _timed(report: Report, batch: int) -> bool:
    """Whether timing was tried. Then a process that goes on for one that lost the GPU does not begin it again."""
    return any(row["row"] == _timing(batch) for row in report.of(PART))


def _name_untimed(report: Report, at: Setting, batch: int) -> None:
    """A row for each competitor that has neither a time nor a reason."""
    rows = {row["row"]: row for row in report.of(PART, f"batch {batch} ")}
    stopped = [row for row in rows.values() if row["status"] != "ok"]
    for entry in itertools.chain(*entries(at, batch)):
        row = f"batch {batch} {entry.name}"
        check = rows.get(f"{row}: check")
        if row not in rows and (check is None or check["status"] == "ok"):
            what = "not reached" if check is None else "checked, not timed"
            why = f"; {stopped[-1]['row']}: {stopped[-1]['reason']}" if stopped else ""
            report.add(PART, row, "skipped", what + why)


class Truth:
    """What the plain step in fp32 does from the common weights, and how far autocast is off."""

    def __init__(self, at: Setting, batch: int) -> None:
        self.at, self.batch = at, batch
        self.levels = synthetic_levels(at.config(batch), CHECKED, at.device, seed=5)

    def find(self) -> Values:
        """Run both."""
        pairs = [of_units(pair) for pair in self.levels]
        with exact_fp32():
            exact = modules(self.at, self.batch, "fp32", dropout="none")
            self.losses, self.update = self._trained(exact, pairs)
        losses, update = self._trained(modules(self.at, self.batch, "bf16", dropout="none"), pairs)
        self.plain = self._errors(losses, update)
        return {"losses": [row.tolist() for row in self.losses.cpu()], "errors of autocast": self.plain}

    def check(self, entry: Entry) -> Values:
        """Mismatch where a twin of the entry, or the entry itself, does something else. Leaves `entry.state`."""
        pairs = entry.given(self.levels)
        values: Values = {}
        if entry.twin:
            values = self._compare(*self._trained(entry.build(dropout="none"), pairs))
            release(self.at)
        state = entry.build()
        first = state.step(*pairs[0], 0, state.config.lr).to(self.losses.device)
        off = float(((first - self.losses[0]).abs() / self.losses[0].abs().clamp(min=0.1)).max())
        values["first losses with dropout"] = off
        if not off <= WITH_DROPOUT:
            raise Mismatch(f"losses of the first step: {first.tolist()}, expected {self.losses[0].tolist()}", values)
        entry.state = state
        return values

    def _trained(self, state: State, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """(losses [CHECKED, 4], the weights' change in the first step [n])."""
        before = _weights(state)
        kept = []
        for number, (x, y) in enumerate(pairs):
            kept.append(state.step(x, y, number, state.config.lr).clone())
            if number == 0:
                update = _weights(state).sub_(before)
        return torch.stack(kept).to(self.at.device), update

    def _errors(self, losses: Tensor, update: Tensor) -> Values:
        off = (losses - self.losses).abs() / self.losses.abs().clamp(min=0.1)
        later = [float(error) for error in off[WARM_UP:].max(0).values]
        return {"first": float(off[0].max()), "update": relative(update, self.update), "later": max(later)}

    def _compare(self, losses: Tensor, update: Tensor) -> Values:
        errors = self._errors(losses, update)
        wrong = []
        for key, floor in FLOORS.items():
            allowed = (UPDATE_FACTOR if key == "update" else FACTOR) * self.plain[key] + floor
            if not errors[key] <= allowed:
                wrong.append(f"{key}: relative error {errors[key]:.3g}, allowed {allowed:.3g}")
        if wrong:
            raise Mismatch("; ".join(wrong), errors)
        return errors


def _weights(state: State) -> Tensor:
    """[n] all parameters of both networks in one order, whatever their memory format."""
    nets = [net for net in (state.generator, state.discriminator) if net is not None]
    return torch.cat([p.detach().contiguous().view(-1) for net in nets for p in net.parameters()])


def _time(report: Report, at: Setting, batch: int, ready: dict[str, Entry]) -> Values:
    """Interleaved rounds over all that are ready; a row each, a time in place of an older one. What could not be timed
    is ready no more."""
    config = at.config(batch)
    levels = synthetic_levels(config, 8 if batch < 64 else 3, at.device, seed=7)  # never one cached input
    last: dict[str, Tensor] = {}

    def stepper(row: str, entry: Entry) -> Run:
        numbers, state = itertools.count(1), entry.state
        given = entry.given(levels)
        assert state is not None

        def step() -> None:
            number = next(numbers)
            last[row] = state.step(*given[number % len(given)], number, config.lr)

        return step

    runs: dict[str, Run] = {row: stepper(row, entry) for row, entry in ready.items()}
    times = interleaved(runs, at.device, at.rounds, at.sample_s)
    best = [t.median for row, t in times.items() if isinstance(t, Timing) and ready[row].name == "eager fp32 nchw"]
    right = {row for row, timing in times.items() if isinstance(timing, Timing) and last[row].isfinite().all()}
    report.rows = [row for row in report.rows if row["part"] != PART or row["row"] not in {*right, _timing(batch)}]
    for row, timing in times.items():
        entry = ready[row]
        if not isinstance(timing, Timing):
            del ready[row]
            text = f"{type(timing).__name__}: {' '.join(str(timing).split())[:600]}"
            report.add(PART, row, "failed" if entry.required else "skipped", text)
        elif row not in right:
            del ready[row]
            report.add(PART, row, "failed", f"not timed: the losses after it are {last[row].tolist()}")
        else:
            values: Values = {
                "ms": round(timing.median, 4),
                "quartiles_ms": [round(q, 4) for q in timing.quartiles],
                "images_per_s": float(f"{batch * 1e3 / timing.median:.4g}"),
                "samples": timing.samples,
                "calls": timing.calls,
                "losses_after": [round(value, 4) for value in last[row].tolist()],
            }
            values |= {"times_eager_fp32": round(best[0] / timing.median, 2)} if best else {}
            report.add(PART, row, "ok", **values)
    tf32 = torch.backends.cudnn.allow_tf32
    return {"rounds": at.rounds, "tf32_convolutions": tf32, "cudnn_benchmark": torch.backends.cudnn.benchmark}

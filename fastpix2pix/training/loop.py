"""The training run: batches in, steps, metrics, validation, checkpoints; exact resume."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..config import Modes, Train
from ..console import Progress
from ..data.batches import Batch, Feed
from ..data.check import check_files, default_threads, refuse
from ..data.loader import choose_loader, training_batches
from ..data.pairs import Pair, find_pairs, hold_out, splits
from ..errors import EnvironmentFailed, InputError
from ..files import make_folder
from ..interrupt import Interrupt
from ..kernels.dispatch import current
from ..model.weights import save_network
from ..profiling import Profile, named_blocks
from . import checkpoint, record, report, schedule
from .clock import Clock
from .processes import PATIENCE, Agreement, Group, joined
from .record import Resume
from .start import defaults_of_models, start_from_models
from .state import LOSSES, State
from .step import build_state, choose_convolutions, choose_step, describe_step
from .validation import GivenUp, Validation, best_modes, better

_MANY = 5000  # pairs that take a while to decode
_GO_ON, _SAVE, _TIME_IS_UP = -2, -1, 0  # what processes agree on; above them the numbers of signals


@dataclass(frozen=True)
class Result:
    """How a training run ended."""

    run: Path
    step: int
    epochs: int  # whole passes over the data
    stopped: str  # "done", "time" or the signal's name
    rank: int  # of this process; 0 has the tables below and left the folder
    validation: dict[str, dict[str, float]] | None  # last table by modes
    best: dict[str, Any] | None  # {"metric", "value", "modes", "step"}
    seconds: float


def train(data: str | Path, out: str | Path, *, resume: Resume = False, quiet: bool = False, **options: Any) -> Result:
    """Train on the pairs in `data` and leave a run folder `out`.

    `options` are those of `fastpix2pix train` by name: the fields of Train, Generator and Data (fastpix2pix.config).
    With `resume`, continues the run in `out` with its recorded options, from the beginning where it has no checkpoint
    yet; "auto" does so where `out` holds a run, and else begins one, so that the same call can be made again and again.
    With `init`, starts from a model, with its architecture and direction. Options given replace these.
    Raises InputError for bad data or options, EnvironmentFailed for device and disk.
    """
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    if record.resumes(Path(out), resume):
        base = record.recorded_config(Path(out))
    else:
        base = defaults_of_models(options.get("init"), options.get("init_discriminator"))
    return run(record.replace_options(base, options), data, out, resume=resume, quiet=quiet)


def run(config: Train, data: str | Path, out: str | Path, *, resume: Resume = False, quiet: bool = False) -> Result:
    """`train` with a finished Train. Under torchrun, every process calls this, and process 0 leaves the run folder."""
    torch.use_deterministic_algorithms(config.deterministic)  # before NCCL is there, which then keeps to an order
    torch.backends.cudnn.benchmark = not config.deterministic
    with joined(config.device) as (group, device), current(device):
        return _Run(config, Path(data), Path(out), resume, quiet, group, device).go()


class _Run:
    def __init__(
        self, config: Train, data: Path, out: Path, resume: Resume, quiet: bool, group: Group, device: torch.device
    ) -> None:
        resumed = record.resumes(out, resume)
        self.config, self.out, self.group, self.device = config, out, group, device
        self.leads = group.rank == 0  # writes, says and validates
        self.quiet = quiet or not self.leads
        self.pairs, held_out = training_pairs(config, data)
        self.record = record.make_record(config, data, self.pairs, group.size)
        if group.first(lambda: self.record["names"]) != self.record["names"]:
            raise InputError(
                f"{data}: process {group.rank} finds other pairs there than process 0; give all the same data"
            )
        if group.first(lambda: resumed) != resumed:
            raise InputError(f"{out}: not all processes find a run there; resume needs the run folder on all machines")
        if group.size > 1 and 60 * config.tune_minutes >= PATIENCE.total_seconds():
            raise InputError(
                f"tune_minutes = {config.tune_minutes:g}: one process measures, and the others wait an hour at most; "
                "give less than 60"
            )
        self.notes = group.first(partial(self._same_run, resumed))
        if resume == "auto":
            self.notes.append(f"auto-resume: {'goes on with the run' if resumed else 'no run yet'} in {out}")
        if config.check_data:
            self._check_files([*self.pairs, *held_out])
        channels = config.generator.in_channels, config.generator.out_channels
        self.loader, reason = group.first(lambda: choose_loader(config.data, self.pairs, self.device, *channels))
        self.notes.append(f"loader: {self.loader} ({reason})")
        step, lines = choose_step(config, device, group.size, resume=resumed, quiet=self.quiet)
        self.notes += lines
        self.config = config = replace(config, step=step)
        self.record["train"]["step"] = step  # which its checkpoints are of
        plans, lines = group.first(lambda: choose_convolutions(config, self.device, quiet=self.quiet))
        self.notes += lines
        self.state: State = build_state(config, self.device, plans, group)
        self.validation = Validation(held_out, config.data, self.state.model, self.device) if held_out else None
        self.images = config.batch * group.size  # of a step, over all processes
        self.step = 0
        self.validated = 0  # the step of the last validation
        self.table: dict[str, dict[str, float]] | None = None  # last validation, by modes
        self.best: dict[str, Any] | None = None
        self.sums = torch.zeros(len(LOSSES), device=self.device)  # of the losses since the last line of metrics
        self.summed = 0  # steps in them
        if not (resumed and self._restored()):
            self.notes += start_from_models(self.state, config)
        self.total = schedule.total_steps(config, len(self.pairs), group.size)

    def _same_run(self, resumed: bool) -> list[str]:
        """What there is to say of the run folder, after it was found usable."""
        if resumed:
            return record.check_same_run(self.out, self.record)
        record.check_new(self.out)
        return []

    def _check_files(self, pairs: Sequence[Pair]) -> None:
        """Each process decodes its share, and process 0 says what is wrong."""
        share = pairs[self.group.rank :: self.group.size]
        with Progress("check", quiet=self.quiet) as progress:
            if len(share) > _MANY:
                progress.say(f"every file of {len(pairs)} pairs is decoded once (check_data = False leaves it out)")
            found = check_files(share, threads=default_threads(self.group.here), progress=progress.count)
        found += chain.from_iterable(self.group.from_others(lambda: found))
        if self.leads:
            refuse(found)

    def go(self) -> Result:
        began = time.monotonic()
        self.metrics: report.Metrics | None = None
        if self.leads:
            make_folder(self.out)
            record.write_record(self.out, self.record)
            self.metrics = report.Metrics(self.out, self.step, self.config.tensorboard)
        try:
            with Interrupt() as stop, Progress("train", self.total, quiet=self.quiet) as self.progress:
                for line in self._opening():
                    self.progress.say(line)
                stopped = self._loop(stop, began)
        finally:
            if self.metrics is not None:
                self.metrics.close()
        seconds = time.monotonic() - began
        return Result(self.out, self.step, self.epochs, stopped, self.group.rank, self.table, self.best, seconds)

    @property
    def epochs(self) -> int:
        """Whole passes over the data so far."""
        return schedule.epochs_done(self.step, self.images, len(self.pairs))

    def _loop(self, stop: Interrupt, began: float) -> str:
        config, clock, first = self.config, Clock(), self.step
        saved = self.step  # the step at which the state was last written
        last_save = began
        stopped = "done"
        agree = Agreement(self.group, _GO_ON)
        with closing(self._batches()) as batches, self._profiled() as profile:
            while self.step < self.total:
                with clock.loading(), profile.range("load"):
                    batch = next(batches)
                before = self.epochs
                profile.run("step", partial(self._train, batch, before))
                profile.advance()
                if self.step % config.log_steps == 0:
                    self._log(clock)
                with clock.away():
                    every = config.validate_epochs
                    if every and self.epochs // every > before // every:
                        self._validate(stop)
                agreed = agree(self._wish(stop, began, last_save))
                due = config.checkpoint_steps and self.step % config.checkpoint_steps == 0
                if due or agreed == _SAVE:
                    with clock.away():
                        self._save()
                    saved, last_save = self.step, time.monotonic()
                if agreed >= _TIME_IS_UP:
                    stopped = "time" if agreed == _TIME_IS_UP else signal.Signals(agreed).name
                    break
        if self.summed and self.step > first:
            self._log(clock)
        if self.validated != self.step and stopped in ("done", "time"):
            stopped = self._validate(stop) or stopped
            if self.validated == self.step:
                saved = -1  # the record of the modes belongs into the checkpoint
        if saved != self.step:
            self._save()
        self._pages()
        return stopped

    def _wish(self, stop: Interrupt, began: float, last_save: float) -> int:
        """What this process would do after a step."""
        if stop.signal is not None:
            return stop.signal
        now = time.monotonic()
        if self.config.max_minutes and now - began > 60 * self.config.max_minutes:
            return _TIME_IS_UP
        return _SAVE if now - last_save > 60 * self.config.checkpoint_minutes else _GO_ON

    def _batches(self) -> Generator[Batch, None, None]:
        config = self.config
        feed = Feed(
            pairs=self.pairs,
            data=config.data,
            in_channels=config.generator.in_channels,
            out_channels=config.generator.out_channels,
            batch=config.batch,
            seed=config.seed,
            start=self.step,
            stop=self.total,
            device=self.device,
            rank=self.group.rank,
            processes=self.group.size,
            here=self.group.here,
        )
        return training_batches(feed, self.loader)

    @contextmanager
    def _profiled(self) -> Iterator[Profile]:
        """A profile of the first steps where the run asks for one; it says what it found."""
        if not self.config.profile or not self.leads:
            yield Profile(None)
            return
        nets = {"generator": self.state.generator, "discriminator": self.state.discriminator}
        with named_blocks(**nets), Profile(self.out / "profile") as profile:
            yield profile
        for line in profile.lines():
            self.progress.say(line)

    def _train(self, batch: Batch, epochs: int) -> None:
        lr = schedule.rate(self.config, epochs)
        self.sums += self.state.step(batch.input, batch.target, self.step, lr)
        self.summed += 1
        self.step += 1

    def _log(self, clock: Clock) -> None:
        """One read of the losses' sums: validating and saving apart, the loop waits for the device nowhere else."""
        values = dict(zip(LOSSES, self._finite(self.sums / self.summed), strict=True))
        if not self.config.adversarial:
            values = {"g_l1": values["g_l1"]}
        lap = clock.lap()
        speed = {
            "img_per_s": lap.steps * self.images / lap.seconds,
            "load_ms": 1e3 * lap.loading / lap.steps,
            "step_ms": 1e3 * (lap.seconds - lap.loading) / lap.steps,
        }
        before = schedule.epochs_done(self.step - 1, self.images, len(self.pairs))
        lr = schedule.rate(self.config, before)
        if self.metrics is not None:
            self.metrics.write(self.step, {"epoch": self.epochs, "lr": lr, "loss": values, "speed": speed})
        losses = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        timing = "{img_per_s:.1f} img/s (load {load_ms:.1f} ms, step {step_ms:.1f} ms)".format(**speed)
        self.progress.update(self.step, f"epoch {before + 1}  {losses}  {timing}")
        self.sums.zero_()
        self.summed = 0

    def _validate(self, stop: Interrupt) -> str | None:
        """In process 0; the others wait. The name of the signal where it was given up for one."""
        given_up = self.group.first(partial(self._measure, stop))
        if given_up is None:
            self.validated = self.step
        return given_up

    def _measure(self, stop: Interrupt) -> str | None:
        if self.validation is None or self.metrics is None:
            return None
        net, metric = self.state.model, self.config.best_by
        try:
            self.table = self.validation.table(net, stop)
        except GivenUp:
            assert stop.signal is not None
            return stop.signal.name
        chosen, value = best_modes(self.table, metric)
        net.modes = chosen
        if better(value, self.best["value"] if self.best else None, metric):
            self.best = {"metric": metric, "value": value, "modes": str(chosen), "step": self.step}
            save_network(self.out / "best.safetensors", net, **self._model_record())
        self.metrics.write(self.step, {"epoch": self.epochs, "validation": self.table, "best": self.best})
        sheet = self.validation.samples(net, chosen)
        report.save_samples(self.out, self.step, sheet)
        self.metrics.picture(self.step, sheet)
        self._pages()
        row = "  ".join(f"{name} {number:.4f}" for name, number in self.table[str(chosen)].items())
        self.progress.say(f"validation after epoch {self.epochs}, {chosen}: {row}")
        return None

    def _save(self) -> None:
        self._finite(self.sums.clone())
        sums = {"sums": self.sums}
        others = self.group.from_others(lambda: checkpoint.own_tensors(self.state, sums))
        if not self.leads:
            return
        counters = {
            "step": self.step,
            "best": self.best,
            "table": self.table,
            "validated": self.validated,
            "summed": self.summed,
            "precision": self.state.precision,
        }
        folder = self.out / "checkpoints" / f"{self.step:08d}"
        checkpoint.save(folder, self.state, counters, sums, self._model_record(), others)
        checkpoint.prune(self.out, self.config.keep_checkpoints)

    def _restored(self) -> bool:
        """Takes over the newest checkpoint; False where there is none yet."""
        if self.leads:
            checkpoint.tidy(self.out)
        start = self.group.first(lambda: checkpoint.newest(self.out))
        if start is None:
            self.notes.append("no checkpoint yet: from the beginning")
            return False
        counters, tensors = checkpoint.restore(start, self.state)
        self.step, self.best, self.table = counters["step"], counters["best"], counters["table"]
        self.summed = counters["summed"]
        self.sums.copy_(tensors["sums"])
        self.validated = counters.get("validated", self.step)  # older checkpoints have neither this nor precision
        now = self.state.precision
        was = counters.get("precision", now)
        if was != now:
            anew = "; the loss scale begins anew" if now == "fp16" else ""
            self.notes.append(f"changed on resume: precision {was} -> {now}{anew}")
        return True

    def _model_record(self) -> dict[str, Any]:
        data = self.config.data
        found: dict[str, Any] = {"direction": data.direction, "size": data.crop_size, "step": self.step}
        if data.holdout:
            found["holdout"] = {"count": data.holdout, "seed": self.config.seed}
        if self.table is not None:
            modes: Modes = self.state.model.modes
            found["modes"] = {"norm_stats": modes.norm_stats, "noise": modes.noise}
        return found

    def _finite(self, losses: torch.Tensor) -> list[float]:
        """The mean of these over all processes; EnvironmentFailed, in all of them, where one is not finite."""
        self.group.reduce(losses)
        values: list[float] = losses.tolist()
        if not all(map(math.isfinite, values)):
            raise EnvironmentFailed(
                f"the losses are not finite at step {self.step}; resume from the last checkpoint in {self.out} with a "
                "lower lr, or start again with precision bf16 or fp32"
            )
        return values

    def _pages(self) -> None:
        if not self.leads:
            return
        records = report.read_metrics(self.out / "metrics.jsonl")
        report.save_curves(self.out, records)
        report.save_page(self.out, self.record["train"] | {"data": self.record["data"]}, records)

    def _opening(self) -> list[str]:
        held_out = len(self.validation.pairs) if self.validation else 0
        lines = [
            f"{len(self.pairs)} training and {held_out} validation pairs",
            f"steps {self.step} to {self.total} on {self.device} in {self.state.precision}",
            describe_step(self.config, self.device, self.group.size),
            *self.notes,
            *(f"warning: {w}" for w in schedule.warnings(self.config, len(self.pairs), self.group.size)),
        ]
        if self.group.size > 1:
            lines.append(
                f"{self.group.size} processes: a step takes {self.config.batch} images of each, {self.images} in all"
            )
        if self.step >= self.total:
            lines.append("nothing is left to do: --epochs or --max-steps is reached")
        if self.validation is None:
            lines.append("no val folder and holdout = 0: no validation, so no best.safetensors and no recorded modes")
        return lines


def training_pairs(config: Train, data: Path) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """(training pairs, validation pairs) of a data folder; without a val folder, `holdout` pairs are set aside."""
    pairs, count = find_pairs(data, "train"), config.data.holdout
    if "val" in splits(data):
        if count:
            raise InputError(f"holdout = {count}: {data} has validation pairs of its own; leave out one of the two")
        return pairs, find_pairs(data, "val")
    return hold_out(pairs, count, config.seed) if count else (pairs, [])

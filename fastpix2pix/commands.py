"""The commands: each fills a config and calls one function. Imports what it runs only when it runs."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from . import config
from .config import Bench, Build, Direction, Fitted, Infer, Noise, NormStats, Stream, Train
from .console import say, show_table, write_json
from .errors import InputError

if TYPE_CHECKING:
    from .interrupt import Interrupt
    from .runtime.translator import Translator

_Model = Annotated[Positional[Path], arg(metavar="MODEL", help="run folder, .safetensors file or junyanz .pth")]
_AnyModel = Annotated[Positional[Path], arg(metavar="MODEL", help="run folder, .safetensors, .pth, .onnx or an engine")]
_PAIRS = "folder of A|B files, with A/ and B/, or of tar shards; train/ and val/ below or above them"
_Pairs = Annotated[Positional[Path], arg(metavar="DATA", help=_PAIRS)]
_JsonFile = Annotated[str | None, arg(metavar="FILE")]


@dataclass(frozen=True)
class TrainCommand:
    """Train a generator on pairs; leaves a run folder with checkpoints, metrics, samples and index.html."""

    data: _Pairs
    out: Path  # run folder; must not exist yet, or be empty, unless --resume or --auto-resume
    training: OmitArgPrefixes[Train] = field(default_factory=Train)  # of the run
    resume: bool = False  # continue the run in --out; options given replace the recorded ones
    auto_resume: bool = False  # the same where --out holds a run, else begin: one command line for every (re)start

    def __call__(self) -> int:
        from .training.loop import run

        if self.resume and self.auto_resume:
            raise InputError("resume = True and auto_resume = True: give one; with the second, a run may also begin")
        result = run(self.training, self.data, self.out, resume="auto" if self.auto_resume else self.resume)
        code = {"SIGINT": 130, "SIGTERM": 143}.get(result.stopped, 0)
        if result.rank:
            return code
        if result.validation:
            show_table("modes", result.validation)
        if result.best:
            say(f"best: {self.out / 'best.safetensors'} (step {result.best['step']}, modes {result.best['modes']})")
        how = {"done": "finished", "time": "stopped by --max-minutes"}.get(result.stopped, result.stopped)
        say(f"{how} at step {result.step} after {result.seconds:.0f} s; look at {self.out / 'index.html'}")
        return code


@dataclass(frozen=True)
class EvalCommand:
    """Measure a model on pairs: L1, PSNR, SSIM and match@1; with --video on a video: flicker."""

    model: _AnyModel
    data: Annotated[Positional[Path], arg(metavar="DATA", help=f"{_PAIRS}; with --video a video or folder of frames")]
    video: bool = False  # DATA is a video: change of the output beyond the input's where that stands still, of 255
    steady: float = 0.0  # with --video: smoothing, as of infer
    # which of them; val is test where there is no val, holdout what `train --holdout` set aside
    split: Literal["train", "val", "test", "holdout"] = "val"
    direction: Direction | None = None  # which half is the input; default: the model's record, else AtoB
    norm_stats: NormStats | None = None  # image or running statistics; default: the model's record, else image
    noise: Noise | None = None  # dropout off, fixed or random; default: the model's record, else off
    seed: int = 0  # of the noise
    size: int | None = None  # pixels a side the images are resized to; default: the model's record, else 256
    batch: int = 1  # images at a time
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    out: Path | None = None  # folder for input, output and target of every pair, and a page of them, worst first
    overwrite: bool = False  # replace that folder
    json: _JsonFile = None  # file for the figures with one row per image; - is stdout

    def __call__(self) -> int:
        from .console import Progress
        from .evaluation import evaluate
        from .streaming.address import VIDEO_SUFFIXES

        if self.data.suffix.lower() in VIDEO_SUFFIXES and not self.video:
            raise InputError(f"{self.data}: a video has no pairs; with --video its flicker is measured")
        of_others = ("split", "direction", "batch", "out", "overwrite") if self.video else ("steady",)
        for name in of_others:
            if (value := getattr(self, name)) != getattr(EvalCommand, name):
                raise InputError(f"{name} = {value}: is for {'pairs' if self.video else 'a video, with --video'}")
        if self.video:
            return self._flicker()
        with Progress("eval") as progress:
            found = evaluate(
                self.model,
                self.data,
                split=self.split,
                direction=self.direction,
                norm_stats=self.norm_stats,
                noise=self.noise,
                seed=self.seed,
                device=self.device,
                batch=self.batch,
                size=self.size,
                out=self.out,
                overwrite=self.overwrite,
                progress=progress.count,
            )
        row = {"images": found.images, "l1": found.l1, "psnr": found.psnr, "ssim": found.ssim, "match": found.match}
        show_table("modes", {str(found.modes): row})
        if self.out:
            say(f"pictures, worst first: {self.out / 'index.html'}")
        write_json(self.json, found.as_dict())
        return 0

    def _flicker(self) -> int:
        from .console import Progress
        from .interrupt import Interrupt
        from .runtime.load import load
        from .streaming.stream import flicker

        fit = {"fit": "resize", "size": str(self.size)} if self.size else {}
        with Interrupt() as stop, Progress("eval") as progress:
            g = load(self.model, norm_stats=self.norm_stats, noise=self.noise, seed=self.seed, device=self.device)
            found = flicker(g, self.data, stop, progress.count, steady=self.steady, **fit)
        show_table("of 255", {self.data.name: asdict(found)})
        write_json(self.json, found.as_dict())
        return 0 if stop.signal is None else 128 + stop.signal


@dataclass(frozen=True)
class InferCommand:
    """Translate images and videos: fastpix2pix infer MODEL SOURCE... SINK

    Sources: image, video, folder of images, quoted glob, /dev/video0, rtsp:// http:// udp:// ..., - (stdin). Sinks:
    image, video, folder, rtmp:// rtsp:// udp:// ..., - (raw frames on stdout), null: (for measuring). The result has
    the source's size, whatever it is, unless --fit says otherwise. Ctrl-C leaves a file that plays.
    """

    model: _AnyModel
    paths: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="SOURCE... SINK",
            help="images, videos, cameras, URLs, -; last, where the result goes",
            help_behavior_hint="(required)",
        ),
    ]
    translation: OmitArgPrefixes[Infer] = field(default_factory=Infer)  # of images and videos
    streaming: OmitArgPrefixes[Stream] = field(default_factory=Stream)  # of videos; fit, size and tile of images too

    def __call__(self) -> int:
        from .streaming.address import is_video

        if len(self.paths) < 2:
            raise InputError("infer takes MODEL SOURCE... SINK: at least one source and, last, a file or folder")
        sources, sink = list(self.paths[:-1]), self.paths[-1]
        return self._videos(sources, sink) if is_video(sources, sink) else self._images(sources, sink)

    def _images(self, sources: list[str], sink: str) -> int:
        from .console import Progress
        from .interrupt import Interrupt
        from .profiling import Profile, ProfiledEngine
        from .runtime.translate import translate_files

        self._refuse_options_of_videos()
        with ExitStack() as opened:
            stop = opened.enter_context(Interrupt())
            g, progress = self._load(opened, stop), opened.enter_context(Progress("infer"))
            folder = self.translation.profile
            profile = opened.enter_context(Profile(Path(folder) if folder else None, skipped=2))
            g.engine = ProfiledEngine(g.engine, profile) if folder else g.engine
            summary = translate_files(g, sources, sink, self.translation, progress.count, stop, self.streaming)
        for line in profile.lines():
            say(line)
        for problem in summary.broken:
            say(f"left out: {problem}")
        if summary.pairs:
            say(as_typed(summary.pairs))
        left_out = f"; {len(summary.broken)} could not be read" if summary.broken else ""
        cut = "interrupted after " if stop.signal is not None else ""
        say(f"{cut}{summary.count} images in {summary.seconds:.1f} s -> {sink}{left_out}")
        if stop.signal is not None:
            return 128 + stop.signal
        return 4 if summary.broken else 0

    def _refuse_options_of_videos(self) -> None:
        of_both = {one.name for one in fields(Fitted)}
        for one in fields(Stream):
            if one.name not in of_both and getattr(self.streaming, one.name) != one.default:
                raise InputError(
                    f"{one.name} = {getattr(self.streaming, one.name)}: is for videos; the sources are images"
                )

    def _videos(self, sources: list[str], sink: str) -> int:
        from .console import Progress
        from .interrupt import Interrupt
        from .streaming.routes import routes
        from .streaming.stream import translate

        if self.translation.profile:
            raise InputError(
                f"profile = {self.translation.profile}: traces translations of images; of a video, stats = FILE has "
                "the time of every stage"
            )
        pairs = routes(sources, sink, self.translation, self.streaming)
        with ExitStack() as opened:
            stop = opened.enter_context(Interrupt())
            g, progress = self._load(opened, stop), opened.enter_context(Progress("infer"))
            done = translate(
                g, pairs, self.streaming, self.translation.batch, stop=stop, progress=progress.count,
                say=lambda line: progress.say(as_typed(line)),
            )  # fmt: skip
        for report in done.streams:
            say(as_typed(report.line()))
        if stop.signal is not None:
            return 128 + stop.signal
        return 4 if any(report.error for report in done.streams) else 0

    def _load(self, opened: ExitStack, stop: Interrupt) -> Translator:
        """The model in its modes, which are said."""
        from .runtime.load import load

        o = self.translation
        modes = {name: getattr(o, name) for name in ("norm_stats", "noise", "seed", "device", "precision")}
        g = load(self._model(opened, stop), o.backend, **modes)
        say(f"modes: {', '.join(f'{name} {getattr(g.modes, name)} ({why})' for name, why in g.modes_source.items())}")
        return g

    def _model(self, opened: ExitStack, stop: Interrupt) -> Path:
        """MODEL, or the engine built from it where the backend runs engines."""
        from .runtime.load import BUILT
        from .runtime.tensorrt_library import TARGETS

        o = self.translation
        if o.backend not in TARGETS or self.model.suffix in BUILT:
            return self.model
        from .building.on_demand import engine_for
        from .runtime.engine_cache import EngineCache

        cache = EngineCache(limit=int(o.cache_gib * 2**30)) if o.cache else None
        options = {name: getattr(o, name) for name in ("precision", "norm_stats", "noise", "seed", "device")}
        made = engine_for(self.model, o.backend, cache=cache, batch=o.batch, say=say, stop=stop, **options)
        return opened.enter_context(made)


@dataclass(frozen=True)
class _BuildOptions(Build):
    """Build, with the one option whose name is a word of Python's own."""

    capabilities: Annotated[str | None, arg(name="for")] = None  # tensorrt-rtx: GPUs, as sm80,sm86; default: this one


@dataclass(frozen=True)
class BuildCommand:
    """Export a generator to ONNX, or build a TensorRT engine, and compare it with the model on images."""

    model: _Model
    out: Path  # file to make: .onnx, or .engine or .plan with a sidecar FILE.json
    building: OmitArgPrefixes[_BuildOptions] = field(default_factory=_BuildOptions)  # of the ONNX file or engine
    json: _JsonFile = None  # file for the report; - is stdout

    def __call__(self) -> int:
        from .building.build import build
        from .building.tensorrt import precisions
        from .console import Progress
        from .interrupt import Interrupt

        options = {f.name: getattr(self.building, f.name) for f in fields(Build)}
        with Interrupt() as stop, Progress("build") as progress:
            try:
                built = build(self.model, self.out, progress=progress.count, stop=stop, say=progress.say, **options)
            except KeyboardInterrupt:
                if stop.signal is None:
                    raise
                progress.say("interrupted: nothing was written")
                return 128 + stop.signal
        rows = {i.name: {"max": i.max, "mean": i.mean, "psnr": i.psnr, "ssim": i.ssim} for i in built.parity.images}
        show_table("of 255", rows)
        for kind, found in precisions(built.layers).items():
            say(f"{kind}: {', '.join(f'{count} {precision}' for precision, count in found.items())}")
        if built.latency:
            say(f"latency: {built.latency['ms']:.3f} ms for a batch of {built.latency['batch']}, median")
        say(f"{built.form.precision}, {built.bytes / 2**20:.1f} MiB -> {self.out}")
        write_json(self.json, built.as_dict())
        return 0


@dataclass(frozen=True)
class ConvertCommand:
    """Convert a model between junyanz .pth and .safetensors; the architecture is inferred."""

    source: Positional[Path]  # .pth or .safetensors
    target: Positional[Path]  # the other one
    overwrite: bool = False  # replace the target if it exists

    def __call__(self) -> int:
        from .model.junyanz import convert

        say(convert(self.source, self.target, overwrite=self.overwrite))
        return 0


@dataclass(frozen=True)
class DataCheckCommand:
    """Decode every image and name each unmatched, unreadable, odd-width, too small or too large one."""

    data: _Pairs
    min_size: int = 64  # shortest side of a half that is not too small, pixels

    def __call__(self) -> int:
        from .console import Progress
        from .data.check import check_pairs

        with Progress("check") as progress:
            report = check_pairs(self.data, min_size=self.min_size, progress=progress.count)
        for problem in report.problems:
            say(str(problem))
        say(report.summary())
        return 0 if report.ok else 4


@dataclass(frozen=True)
class DataCombineCommand:
    """Join a folder of A images and a folder of B images with matching names into A|B files."""

    a: Positional[Path]  # folder of A images (or of train/ and val/ folders of them)
    b: Positional[Path]  # folder of B images
    out: Path  # folder for the A|B files
    overwrite: bool = False  # replace the folder if it exists

    def __call__(self) -> int:
        from .console import Progress
        from .data.check import combine

        with Progress("combine") as progress:
            count = combine(self.a, self.b, self.out, overwrite=self.overwrite, progress=progress.count)
        say(f"{count} pairs -> {self.out}")
        return 0


@dataclass(frozen=True)
class DataShardCommand:
    """Write the pairs of a folder into tar archives, which `train` and `eval` read like the folder."""

    data: _Pairs
    out: Path  # folder for train-000000.tar, ...
    megabytes: int = 256  # size of an archive at which the next one is begun
    overwrite: bool = False  # replace the folder if it exists

    def __call__(self) -> int:
        from .console import Progress
        from .data.shards import write_shards

        with Progress("shard") as progress:
            count = write_shards(
                self.data, self.out, megabytes=self.megabytes, overwrite=self.overwrite, progress=progress.count
            )
        say(f"{count} archives -> {self.out}")
        return 0


@dataclass(frozen=True)
class DataDemoCommand:
    """Paint a set of facades: label maps (A, left) and pictures (B, right)."""

    out: Path  # folder for train/ and val/
    train: int = 400  # pairs to train on
    val: int = 50  # pairs to validate on
    size: int = 256  # side of one picture, pixels
    seed: int = 0  # of the facades
    overwrite: bool = False  # replace the folder if it exists

    def __call__(self) -> int:
        from .console import Progress
        from .data.synthetic import write_demo_set

        with Progress("paint") as progress:
            write_demo_set(
                self.out,
                train=self.train,
                val=self.val,
                size=self.size,
                seed=self.seed,
                overwrite=self.overwrite,
                progress=progress.count,
            )
        say(f"{self.train} + {self.val} pairs -> {self.out}")
        return 0


@dataclass(frozen=True)
class DemoCommand:
    """Paint data, train a few minutes, evaluate, translate; leaves pictures to look at."""

    out: Path = Path("demo")  # folder for all of it; must not exist yet, or be empty
    minutes: float = 3.0  # wall time of the training
    device: str = "auto"  # auto, cpu, cuda, cuda:1

    def __call__(self) -> int:
        from .demo import demo

        return demo(self.out, minutes=self.minutes, device=self.device)


@dataclass(frozen=True)
class TuneCommand:
    """Choose kernels for this GPU by measurement, of a training step or of a model's inference; later runs find it."""

    model: Path | None = None  # measure inference of this model; default: a step of training with the options below
    size: int | None = None  # with --model: pixels a side; default: the model's record, else 256
    minutes: float = 10.0  # wall time, about, of a model; of a step for its convolutions, and as much for the race
    afresh: bool = False  # measure a step again from the beginning; a model always is
    training: OmitArgPrefixes[Train] = field(default_factory=Train)  # batch, crop, networks, precision, device count
    json: _JsonFile = None  # file for everything that was measured; - is stdout

    def __call__(self) -> int:
        from .console import Progress
        from .device import resolve_device

        if self.model is None and self.size is not None:
            raise InputError(f"size = {self.size}: is for --model; a step of training is measured at crop_size")
        device = resolve_device(self.training.device)
        with Progress("tune") as progress:
            if self.model is None:
                from .training.tune import tune

                config = replace(self.training, step="explicit")
                found = tune(config, device, self.minutes, afresh=self.afresh, count=progress.count, say=progress.say)
                lines, content = [*found.table(), found.summary()], found.as_dict()
            else:
                from .runtime.triton_tuning import describe, tune_model

                content = tune_model(
                    self.model, device, self.training.precision, self.training.batch, self.size, self.minutes,
                    count=progress.count,
                )  # fmt: skip
                lines = describe(content)
        if self.model is None:
            from .training.step import choose_step

            _, race = choose_step(replace(self.training, tune_minutes=self.minutes), device, afresh=self.afresh)
            lines += race
        for line in lines:
            say(line)
        if not content["complete"]:
            todo = "call tune again to go on" if self.model is None else "give more --minutes"
            say(f"time was up before everything was measured: {todo}")
        write_json(self.json, content)
        return 0


@dataclass(frozen=True)
class BenchCommand:
    """Measure this machine: training, translation and all their parts beside plain baselines; one table, one page."""

    out: Path = Path("benchmark")  # folder for result.json and index.html; written over
    measurement: OmitArgPrefixes[Bench] = field(default_factory=Bench)  # what is measured, and how
    json: _JsonFile = None  # file for the record, as in result.json; - is stdout

    def __call__(self) -> int:
        from .bench.command import run
        from .console import Progress

        with Progress("bench") as progress:
            record = run(self.measurement, self.out, say, progress.count)
        say(f"{record['seconds']:.0f} s -> {self.out / 'index.html'}, {self.out / 'result.json'}")
        write_json(self.json, record)
        return 0


@dataclass(frozen=True)
class DoctorCommand:
    """Say what is installed, what is usable and what to do about the rest."""

    json: _JsonFile = None  # file for the findings; - is stdout

    def __call__(self) -> int:
        from .doctor import examine, lines

        found = examine()
        for line in lines(found):
            say(line)
        write_json(self.json, found)
        return 0


TYPED = {"capabilities": "for"}  # options whose names are words of Python's own

DataCommand = (
    Annotated[DataCheckCommand, subcommand("check")]
    | Annotated[DataCombineCommand, subcommand("combine")]
    | Annotated[DataShardCommand, subcommand("shard")]
    | Annotated[DataDemoCommand, subcommand("demo")]
)


@dataclass(frozen=True)
class DataCommands:
    """Check, combine, pack or make pairs."""

    command: OmitArgPrefixes[DataCommand]

    def __call__(self) -> int:
        return self.command()


Command = (
    Annotated[DemoCommand, subcommand("demo")]
    | Annotated[TrainCommand, subcommand("train")]
    | Annotated[EvalCommand, subcommand("eval")]
    | Annotated[InferCommand, subcommand("infer")]
    | Annotated[BuildCommand, subcommand("build")]
    | Annotated[ConvertCommand, subcommand("convert")]
    | Annotated[DataCommands, subcommand("data")]
    | Annotated[TuneCommand, subcommand("tune")]
    | Annotated[BenchCommand, subcommand("bench")]
    | Annotated[DoctorCommand, subcommand("doctor")]
)


def as_typed(text: str) -> str:
    """An error of the library with its options as they are typed here: `fit = tile` becomes `--fit tile`."""
    kinds = [kind for kind in [*vars(config).values(), *globals().values()] if is_dataclass(kind)]
    names = sorted({one.name for kind in kinds for one in fields(kind)}, key=len, reverse=True)

    def typed(found: re.Match[str]) -> str:
        option, switch = TYPED.get(found[1], found[1].replace("_", "-")), found[2]
        if switch:
            return f"--{option}" if switch == "True" else f"--no-{option}"
        return f"--{option} "

    return re.sub(rf"(?<![\w.-])({'|'.join(names)}) = (?:(True|False)\b)?", typed, text)

"""One source through the frame runtime into one sink: decoding, translating and encoding at the same time."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..config import Stream as Options
from ..console import say
from ..errors import EnvironmentFailed
from ..runtime.engine import Engine
from ..runtime.fitting import size_asked
from ..runtime.native import FrameRuntime
from .frame_runtime import Inside, frame_runtime
from .geometry import Geometry, check_fixed, fit_into
from .live import Clock
from .network import Network
from .opening import Stopped
from .picture import Media, Picture
from .preview import Pane
from .report import COUNTS, WORK, Report
from .sinks import Sink
from .sources import Sound, Source
from .timing import Timing

_LONG = 20.0  # seconds of work that are announced
_BEAT = 0.2  # seconds between two looks at whether to stop
_SHARE = 0.25  # of a picture's time, with --live, that it may wait for those of other streams
_GRACE = 5.0  # seconds that a network or pipe may take for one picture after Ctrl-C


class Pipeline:
    """One stream, in the thread that calls `run` and one of its own; others may look at the counts meanwhile."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        engine: Engine,
        network: Network,
        options: Options,
        trained: int = 256,  # side of the pictures the model was trained on
        pane: Pane | None = None,  # of the preview
    ) -> None:
        self.source, self.sink = source, sink
        self._engine, self._network, self._options, self._trained, self._pane = engine, network, options, trained, pane
        self.done = 0  # pictures written
        self.expected = 0  # pictures in all; 0 where unknown
        self.opened = False  # the source gave its first picture
        self.recent: deque[float] = deque(maxlen=32)  # when the last pictures were written, time.monotonic()
        self._decode, self._write, self._submit = Timing(), Timing(), Timing()
        self._whole = Timing()
        self._failure: BaseException | None = None
        self._closed_pipe = False
        self._writing: float | None = None  # since when the sink is at work, time.monotonic()
        self._stopped: float | None = None  # when it was seen that it is to stop, likewise
        self._sounds: deque[Any] = deque()
        self._inside = Inside()  # pts, duration, frame for the preview
        self._runtime: FrameRuntime | None = None  # while it runs: its memory is the next stream's then
        self._counted: Any = None  # its figures after that

    def run(self, stop: Callable[[], bool]) -> Report:
        """To the end of the source, or until stop. Raises what source, engine or sink raise."""
        try:
            with self._whole():
                self._run(stop)
        except Stopped:
            return self.nothing()
        finally:
            self.source.close()
        return self._report(stop())

    def brings(self) -> bool:
        """Whether pictures are to be expected now: not while the source is being opened."""
        return self.opened and not self.source.away

    def nothing(self) -> Report:
        """Of a stream that was stopped before its first picture."""
        stages = {name: Timing().as_dict() for name in ("decode", "engine", "encode", "total")}
        return Report(self.source.name, self.sink.name, dict.fromkeys(COUNTS, 0), stages, interrupted=True)

    def failed(self, error: Exception) -> Report:
        """Of a stream whose `run` raised."""
        report = self._report(False) if self.done else replace(self.nothing(), interrupted=False)
        return replace(report, error=str(error))

    def _run(self, stop: Callable[[], bool]) -> None:
        with self._decode():
            media = self.source.open(stop)
        self.opened = True
        self.expected = media.frames or 0
        if self._options.max_frames:
            self.expected = min(self.expected or self._options.max_frames, self._options.max_frames)
        geometry = self._geometry(media)
        out = self._media_out(media, geometry)
        self._media = out
        if self._options.live:
            self._network.wait = _SHARE / float(media.rate)
        runtime = self._runtime = self._make_runtime(media, geometry, out)
        writer = threading.Thread(target=self._write_out, args=(runtime,), daemon=True)
        try:
            self.sink.open(out)
            writer.start()
            self._guard(self._feed, runtime, media, stop)
            self._guard(self._await, runtime, writer, stop)
        finally:
            runtime.close()
            self._counted, self._runtime = runtime.stats(), None
        if self._failure is not None and not self._closed_pipe:
            raise self._failure

    def _guard(self, work: Callable[..., None], runtime: FrameRuntime, *rest: Any) -> None:
        """Run one side; where it fails, the first failure is kept and the other side ended."""
        try:
            work(runtime, *rest)
        except BaseException as error:
            if self._failure is None:
                self._failure, self._closed_pipe = error, isinstance(error, BrokenPipeError)
            runtime.close()

    # ---- sizes and formats

    def _geometry(self, media: Media) -> Geometry:
        o, size = self._options, (media.height, media.width)
        sides = size_asked(o, self._engine.describe())
        geometry = fit_into(size, o.fit, sides, self._trained, self._engine.multiple, self.sink.even)
        check_fixed(geometry, size, self._engine.describe())
        if geometry.output != geometry.place[2:]:
            whole = f"; --pixel-format {self.sink.whole} takes any" if self.sink.whole else ""
            say(f"{self.sink.name}: {geometry.output[1]}x{geometry.output[0]}, one more than the odd size: its pixel "
                f"format takes even ones{whole}")  # fmt: skip
        if media.turned:
            say(f"{self.source.name}: turned upright by {media.turned} degrees, as players show it")
        return geometry

    def _media_out(self, media: Media, geometry: Geometry) -> Media:
        height, width = geometry.output
        aspect = media.aspect if self._options.fit != "resize" else None
        return replace(media, height=height, width=width, pixels=self.sink.pixels, aspect=aspect)

    def _make_runtime(self, media: Media, geometry: Geometry, out: Media) -> FrameRuntime:
        runtime, why = frame_runtime(
            self._engine,
            self._network,
            (media.height, media.width),
            geometry,
            (media.pixels, out.pixels),
            (media.colour.matrix, media.colour.range),
            self._options,
        )
        if why:
            say(f"{self.source.name}: every frame is started anew, without a CUDA graph ({why})")
        return runtime

    # ---- the two sides

    def _await(self, runtime: FrameRuntime, writer: threading.Thread, stop: Callable[[], bool]) -> None:
        while writer.is_alive():
            writer.join(_BEAT)
            self._check_sink(time.monotonic(), stop())

    def _check_sink(self, now: float, stopped: bool) -> None:
        """Give up a writer that FFmpeg does not give back: whoever reads a network or pipe may stop reading."""
        if stopped and self._stopped is None:
            self._stopped = now
        begun = self._writing
        if begun is None or self.sink.kind not in ("url", "pipe"):
            return
        limit = self._options.timeout if self._options.live and self.sink.kind == "url" else math.inf
        what = f"cannot write {self.sink.name}: its reader took nothing for"
        if now - begun > limit:
            raise EnvironmentFailed(f"{what} {limit:g} s (timeout = {limit:g})")
        if self._stopped is not None and now - max(begun, self._stopped) > _GRACE:
            raise EnvironmentFailed(f"{what} {_GRACE:g} s after the stop; what was left is lost")

    def _feed(self, runtime: FrameRuntime, media: Media, stop: Callable[[], bool]) -> None:
        clock = Clock(media.time_base, media.rate, self.source.live) if self._options.live else None
        pictures = self._pictures()
        number = reconnects = 0
        while not stop():
            self._check_sink(time.monotonic(), False)
            with self._decode():
                picture = next(pictures, None)
            if picture is None:
                break
            deadline = None
            if clock:
                if self.source.reconnects != reconnects:
                    reconnects = self.source.reconnects
                    clock.begin_anew()
                clock.wait(picture.pts, stop)
                deadline = clock.deadline(picture.pts)
            watched = picture.frame if self._pane and self._pane.wanted() else None
            self._inside.put(number, (picture.pts, picture.duration, watched))
            with self._submit():
                while not runtime.submit(picture.planes, number, deadline=deadline, timeout=_BEAT):
                    if stop():
                        break
            number += 1
            if number == self._options.max_frames:
                break
        runtime.finish()

    def _pictures(self) -> Iterator[Picture]:
        """Of the source; its sound is put aside."""
        for item in self.source:
            if isinstance(item, Sound):
                self._sounds.append(item.packet)
            else:
                yield item

    def _write_out(self, runtime: FrameRuntime) -> None:
        self._guard(self._collect, runtime)
        with self._at_work():
            self._guard(lambda _: self.sink.close(), runtime)

    def _collect(self, runtime: FrameRuntime) -> None:
        while True:
            target = self.sink.target()
            while (number := runtime.collect(target, timeout=_BEAT)) is None and not runtime.drained:
                with self._at_work():
                    self._copy_sound()  # which goes on where the picture stands still
            if number is None:
                break
            pts, duration, watched = self._inside.take(number)
            with self._write(), self._at_work():
                self._copy_sound()
                self.sink.write(pts, duration)
            if watched is not None and self._pane:
                self._pane.show(watched, target, self._media)
            self.done += 1
            self.recent.append(time.monotonic())
        with self._at_work():
            self._copy_sound()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The sink is."""
        self._writing = time.monotonic()
        try:
            yield
        finally:
            self._writing = None

    def _copy_sound(self) -> None:
        while self._sounds:
            self.sink.sound(self._sounds.popleft())

    # ---- figures

    def _stats(self) -> Any:
        """The runtime's, of which others ask while it ends."""
        runtime = self._runtime
        return self._counted if runtime is None else runtime.stats()

    def expectation(self) -> str | None:
        """How long the whole will take, measured on the first pictures; None where it is short, live or not known."""
        seconds = (self.recent[-1] - self.recent[0]) / (len(self.recent) - 1)
        if self._options.live or seconds * self.expected < _LONG:
            return None
        minutes, left = divmod(round(seconds * self.expected), 60)
        long = f"{minutes} min {left:02} s" if minutes else f"{left} s"
        return (
            f"{self.source.name}: {self.expected} frames of {self._media.width}x{self._media.height} at "
            f"{seconds:.2f} s each (measured on the first {len(self.recent)}): about {long}"
        )

    def shown_figures(self) -> dict[str, str]:
        """For the preview."""
        if len(self.recent) < 2:
            return {"frames": str(self.done)}
        recent = list(self.recent)
        total = self._stats()
        lost = total["frames"]["dropped_oldest"] + total["frames"]["late"]
        return {
            "fps": f"{(len(recent) - 1) / max(1e-6, recent[-1] - recent[0]):.1f}",
            "latency": f"{total['latency']['total']['p50_ms']:.0f} ms",
            "p99": f"{total['latency']['total']['p99_ms']:.0f} ms",
            "frames": f"{self.done} of {self.expected}" if self.expected else str(self.done),
            **({"dropped": str(lost)} if lost else {}),
        }

    def figures(self) -> dict[str, dict[str, float]]:
        """Per stage so far. `total` is from submit to the finished picture; total_s of the runtime's is about."""
        measured: dict[str, Any] = dict(self._stats()["latency"])
        inside = {name: {**one, "total_s": one["count"] * one["p50_ms"] / 1e3} for name, one in measured.items()}
        engine = self._network.timing  # a runtime on CUDA times its own
        return {
            "decode": self._decode.as_dict(),
            "wait": self._submit.as_dict(),
            "queue": inside["queue"],
            "to_network": inside["upload"],
            "engine": engine.as_dict() if engine.count else inside["compute"],
            "from_network": inside["download"],
            "total": inside["total"],
            "encode": self._write.as_dict(),
        }

    def _report(self, stopped: bool) -> Report:
        counted, seconds = self._stats()["frames"], self._whole.total
        frames = {
            "in": counted["submitted"],
            "out": self.done,
            "dropped": counted["dropped_oldest"] + counted["dropped_newest"],
            "late": counted["late"],
            "failed": counted["failed"],
            "abandoned": counted["abandoned"] + counted["collected"] - self.done,  # inside where a reader went away
            "broken": self.source.broken,
        }
        stages = self.figures()
        engine = stages["engine"]["total_s"]
        waits = {"decode"} if self.source.live else set()  # a source that gives its pictures when they come
        busy = sum(stages[name]["total_s"] for name in WORK if name not in waits)
        return Report(
            self.source.name,
            self.sink.name,
            frames,
            stages,
            seconds,
            self.done / seconds,
            engine / seconds,
            busy / seconds,
            self.source.reconnects,
            self._options.live,
            stopped,
            _described(self._media),
        )


def _described(media: Media) -> dict[str, Any]:
    return {
        "width": media.width,
        "height": media.height,
        "rate": float(media.rate),
        "matrix": media.colour.matrix,
        "range": media.colour.range,
        "colour_guessed": media.colour.guessed,
    }

"""Videos translated: which source goes where, several at once, progress, Ctrl-C, and the figures at the end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import Infer, stream_config
from ..config import Stream as Options
from ..console import say, write_json
from ..errors import Fastpix2pixError, InputError
from ..interrupt import Interrupt
from ..openmp import release_team
from ..runtime.tiles import TiledEngine, check_tiles
from ..runtime.translator import Translator
from . import pyav  # noqa: F401
from .address import shown, source_kind
from .device import on_gpu
from .network import Batches, Network, Step, check_channels, for_video, steps_of
from .pipeline import Pipeline
from .preview import Pane, Preview
from .report import COUNTS, Report
from .routes import make_sink, routes
from .sources import source_of
from .steady import Flicker, FlickerFigures
from .together import Together

_GRACE = 5.0  # seconds that a source that is still being opened may take after Ctrl-C
_MEASURED = 4  # pictures after which the time of all can be told


@dataclass(frozen=True)
class Summary:
    """What became of all streams."""

    streams: tuple[Report, ...]
    seconds: float
    engine: dict[str, Any]  # of Translator.describe
    batches: dict[int, int]  # size of a batch: how often
    signal: int | None = None  # that ended it

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        frames = {name: sum(r.frames[name] for r in self.streams) for name in COUNTS}
        fps = frames["out"] / self.seconds if self.seconds else 0.0
        streams = [asdict(report) for report in self.streams]
        return {"frames": frames, "seconds": self.seconds, "fps": fps, "engine": self.engine,
                "batches": self.batches, "interrupted": self.signal is not None, "streams": streams}  # fmt: skip


class Stream:
    """`Stream(g, "in.mp4", "out.mp4", **options).run()`: one source through a loaded model into one sink.

    Options are the fields of config.Stream by name. Source and sink are as of `fastpix2pix infer`; a pattern that names
    several videos is refused.
    """

    def __init__(self, g: Translator, source: str | Path, sink: str | Path, *, overwrite: bool = False, **options: Any):
        self._options = stream_config(**options)
        self._pairs = routes([str(source)], str(sink), Infer(overwrite=overwrite), self._options)
        if len(self._pairs) > 1:
            raise InputError(
                f"{source}: {len(self._pairs)} videos; a Stream is of one: make one of each, or use fastpix2pix infer"
            )
        self._g = g

    def run(self, progress: Callable[[int, int], None] | None = None) -> Report:
        """To the end, or until Ctrl-C, which leaves what is done in order. Raises InputError, EnvironmentFailed."""
        with Interrupt() as stop:
            summary = translate(self._g, self._pairs, self._options, stop=stop, progress=progress)
        return summary.streams[0]


def translate(
    g: Translator,
    pairs: list[tuple[str, str]],  # source, sink
    options: Options,
    batch: int = 1,  # pictures of several streams translated together
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,  # called with (pictures written, in all or 0)
    say: Callable[[str], None] = say,
    steps: Sequence[Step] = (),  # that see every picture and its output, after smoothing; of one stream
) -> Summary:
    """Run all streams. One whose source or sink fails ends, with the error in its report; where all fail, it is raised.

    Errors that are nobody's fault are raised after all streams were brought to an end that can be played.
    """
    g = for_video(g, say)
    engine = g.engine
    check_channels(engine)
    check_tiles(engine, options)
    on_gpu(engine, options)
    tiled = TiledEngine(engine, options.tile) if options.fit == "tile" else engine
    together = Together(Batches(tiled), batch)
    panes, pipelines = [], []
    for source, sink in pairs:
        network = Network(together, engine, [*steps_of(options), *steps])
        pane = Pane(f"{shown(source)} → {shown(sink)}")
        given = source_of(source, options, str(engine.device))
        size = int(g.record.get("size") or 256)
        watched = pane if options.preview is not None else None
        pipelines.append(Pipeline(given, make_sink(sink, options), engine, network, options, size, watched))
        pane.figures = pipelines[-1].shown_figures
        panes.append(pane)
    preview = Preview(options.preview, panes) if options.preview is not None else None
    if preview:
        say(f"preview: {preview.url}")
    endless = options.live or any(source_kind(source) in ("camera", "url", "pipe") for source, _ in pairs)
    at_once = len(pairs) if endless else min(len(pairs), max(2, batch))
    release_team()  # this thread only waits from here on
    start = time.monotonic()
    try:
        reports, signal = _run_all(pipelines, together, at_once, stop or (lambda: False), progress, say)
    finally:
        together.close()
        if preview:
            preview.close()
    summary = Summary(tuple(reports), time.monotonic() - start, g.describe(), together.batches, signal)
    write_json(options.stats, summary.as_dict())
    return summary


def flicker(
    g: Translator,
    source: str | Path,  # video, or folder or pattern of frames
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,  # of config.Stream
) -> FlickerFigures:
    """How much the outputs flicker where the source stands still (steady.Flicker), in levels of 255."""
    meter, given = Flicker(), stream_config(audio="none", **options)
    pairs = routes([str(source)], "null:", Infer(), given)
    if len(pairs) > 1:
        raise InputError(f"{source}: {len(pairs)} videos; flicker is measured of one")
    translate(g, pairs, given, stop=stop, progress=progress, steps=[meter])
    return meter.figures()


def _run_all(
    pipelines: list[Pipeline],
    together: Together,
    at_once: int,
    asked: Callable[[], bool],
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None],
) -> tuple[list[Report], int | None]:
    waiting = deque(pipelines)
    reports: dict[Pipeline, Report] = {}
    failed: list[Fastpix2pixError] = []  # a stream each
    bugs: list[BaseException] = []

    def stop() -> bool:
        return asked() or bool(bugs)

    def work() -> None:
        while waiting and not stop():
            try:
                pipeline = waiting.popleft()
            except IndexError:
                return
            together.join(pipeline.brings)
            try:
                reports[pipeline] = pipeline.run(stop)
            except Fastpix2pixError as error:
                failed.append(error)
                reports[pipeline] = pipeline.failed(error)
                if len(reports) < len(pipelines):
                    say(f"{reports[pipeline].line()}; the others go on")
            except BaseException as error:
                bugs.append(error)
            finally:
                together.leave(pipeline.brings)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    announced: set[Pipeline] = set()
    stopped_at, shown = None, 0
    while any(thread.is_alive() for thread in threads):
        threads[0].join(0.05) if threads[0].is_alive() else time.sleep(0.05)
        if progress and (done := sum(p.done for p in pipelines)) != shown:
            shown, known = done, all(p.expected for p in pipelines)
            progress(done, sum(p.expected for p in pipelines) if known else 0)
        for pipeline in pipelines:
            if pipeline not in announced and pipeline.done >= _MEASURED:
                announced.add(pipeline)
                if line := pipeline.expectation():
                    say(line)
        if stop():
            stopped_at = stopped_at or time.monotonic()
            opening = all(not p.opened for p in pipelines if p not in reports)
            if opening and time.monotonic() - stopped_at > _GRACE:
                break
    if bugs:
        raise bugs[0]
    if len(failed) == len(pipelines):
        raise failed[0]
    signal = getattr(asked, "signal", None)
    return [reports.get(pipeline) or pipeline.nothing() for pipeline in pipelines], signal

"""Which source goes where; everything that can be refused before a model is loaded is refused here."""

from __future__ import annotations

from pathlib import Path

from ..config import Infer, Stream
from ..data.images import IMAGE_SUFFIXES
from ..errors import InputError
from ..runtime.sources import list_images
from . import pyav
from .address import VIDEO_SUFFIXES, Kind, expanded, is_url, shown, sink_kind, source_kind, stem
from .encoder import Encoder
from .sinks import FrameFolder, RawFrames, Sink, sink_of
from .sources import check_sources


def routes(sources: list[str], sink: str, infer: Infer, options: Stream) -> list[tuple[str, str]]:
    """(source, sink) of every stream. Raises InputError; makes nothing."""
    for name in ("side_by_side", "direction"):
        if value := getattr(infer, name):
            raise InputError(f"{name} = {value}: is for images; the sources are videos")
    sources = [one for source in sources for one in expanded(source)]
    check_sources(sources)
    if sources.count("-") > 1:
        raise InputError("stdin (-) is given more than once as a source")
    if sink_kind(sink) != "folder":
        if len(sources) > 1 and sink_kind(sink) != "null":
            raise InputError(f"{len(sources)} sources and one sink {shown(sink)}: several need a folder as sink")
        if infer.suffix:
            raise InputError(f"suffix = {infer.suffix}: is of the files in a folder; the sink is {shown(sink)}")
        pairs = [(source, sink) for source in sources]
    else:
        suffix = "." + (infer.suffix or "mp4").lower().removeprefix(".")
        if suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES - {".gif"}:
            raise InputError(
                f"suffix = {infer.suffix}: allowed are {', '.join(sorted(VIDEO_SUFFIXES))}, or an image's for frames"
            )
        ending = suffix if suffix in VIDEO_SUFFIXES else suffix + "/"
        pairs = [(source, str(Path(sink) / stem(source)) + ending) for source in sources]
    _check_outputs(pairs, infer.overwrite)
    _check_effect(options, {source_kind(one) for one in sources}, {type(make_sink(one, options)) for _, one in pairs})
    return pairs


def _check_effect(options: Stream, sources: set[Kind], sinks: set[type]) -> None:
    """Refuse options that would change nothing here. Limits may be given that do not apply."""
    encoded, videos = Encoder in sinks, sources != {"images"}
    effects = {
        "fps": ("images" in sources, "is the rate of images read as a video; a video keeps its own timestamps"),
        "raw": ("pipe" in sources, "describes frames on stdin; give - as a source"),
        "stream": (videos, "chooses one of a video's streams; the sources are images"),
        "codec": (encoded, "is of video that is encoded; this sink encodes none"),
        "quality": (encoded, "is of video that is encoded; this sink encodes none"),
        "pixel_format": (encoded or RawFrames in sinks, "is of video that is written; this sink writes none"),
    }
    for name, (has_one, what) in effects.items():
        if (value := getattr(options, name)) != getattr(Stream, name) and not has_one:
            raise InputError(f"{name} = {value}: {what}")
    if raw := options.raw_format:
        try:
            pyav.av.VideoFormat(raw.pixels, raw.width, raw.height)
        except ValueError:
            known = "rgb24, bgr24, rgba, yuv420p, nv12 and others"
            raise InputError(f"raw = {options.raw}: FFmpeg has no pixel format {raw.pixels}; it has {known}") from None


def make_sink(address: str, options: Stream) -> Sink:
    """The sink of a pair that `routes` gave."""
    folder = Path(address)
    if address.endswith("/") and folder.suffix in IMAGE_SUFFIXES:  # frames of one source
        return FrameFolder(folder.with_suffix(""), folder.suffix)
    return sink_of(address, options)


def _check_outputs(pairs: list[tuple[str, str]], overwrite: bool) -> None:
    sources = {place for source, _ in pairs for place in _places(source)}
    seen: dict[str, str] = {}
    for source, sink in pairs:
        if sink in ("-", "null:") or is_url(sink):
            continue
        path = Path(sink)
        folder = path.with_suffix("") if sink.endswith("/") else path
        if folder.resolve() in sources:
            raise InputError(f"{sink}: is a source itself; choose another sink")
        if sink in seen:
            raise InputError(f"{seen[sink]} and {shown(source)} would both become {sink}; translate them apart")
        seen[sink] = shown(source)
        if folder.exists() and (folder.is_file() or any(folder.iterdir())) and not overwrite:
            raise InputError(f"{folder} exists; use overwrite = True or another sink")
        there = next(p for p in folder.absolute().parents if p.exists())
        if not there.is_dir():
            raise InputError(f"sink {sink}: {there} is a file, not a folder")


def _places(source: str) -> set[Path]:
    """The file that a source is, or the folders of its images."""
    if is_url(source) or source == "-":
        return set()
    if source_kind(source) == "images":
        return {image.resolve().parent for image in list_images(source)}
    return {Path(source).resolve()}

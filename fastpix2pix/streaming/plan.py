"""Which source goes where; everything that can be refused before a model is loaded is refused here."""

from __future__ import annotations

from pathlib import Path

from ..config import Infer, Stream
from ..data.images import IMAGE_SUFFIXES
from ..errors import InputError
from . import pyav  # noqa: F401
from .address import VIDEO_SUFFIXES, expanded, is_url, shown, sink_kind, stem
from .sinks import FrameFolder, Sink, sink_of
from .sources import check_sources


def plan(sources: list[str], sink: str, infer: Infer, options: Stream) -> list[tuple[str, str]]:
    """(source, sink) of every stream. Raises InputError; makes nothing."""
    for name in ("side_by_side", "direction"):
        if getattr(infer, name):
            raise InputError(f"{name}: is for images; the sources are videos")
    sources = [one for source in sources for one in expanded(source)]
    check_sources(sources, sink)
    if sources.count("-") > 1:
        raise InputError("stdin (-) is given more than once as a source")
    if sink_kind(sink) != "folder":
        if len(sources) > 1 and sink_kind(sink) != "null":
            raise InputError(f"{len(sources)} sources and one sink {shown(sink)}: several need a folder as sink")
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
    for _, one in pairs:
        make_sink(one, options)
    if options.raw and "-" not in sources:
        raise InputError(f"raw = {options.raw}: describes frames on stdin; give - as a source")
    return pairs


def make_sink(address: str, options: Stream) -> Sink:
    """The sink of a pair that `plan` gave."""
    folder = Path(address)
    if address.endswith("/") and folder.suffix in IMAGE_SUFFIXES:  # frames of one source
        return FrameFolder(folder.with_suffix(""), folder.suffix)
    return sink_of(address, options)


def _check_outputs(pairs: list[tuple[str, str]], overwrite: bool) -> None:
    sources = {Path(source).resolve() for source, _ in pairs if not is_url(source) and source != "-"}
    seen: dict[str, str] = {}
    for source, sink in pairs:
        if sink in ("-", "null:") or is_url(sink):
            continue
        path = Path(sink)
        if path.resolve() in sources:
            raise InputError(f"{sink}: is a source itself; choose another sink")
        if sink in seen:
            raise InputError(f"{seen[sink]} and {shown(source)} would both become {sink}; translate them apart")
        seen[sink] = shown(source)
        folder = path.with_suffix("") if sink.endswith("/") else path
        if folder.exists() and (folder.is_file() or any(folder.iterdir())) and not overwrite:
            raise InputError(f"{folder} exists; use overwrite or another sink")
        there = next(p for p in folder.absolute().parents if p.exists())
        if not there.is_dir():
            raise InputError(f"sink {sink}: {there} is a file, not a folder")

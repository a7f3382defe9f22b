"""One FFmpeg input opened, with every failure said in the project's terms and no password in it."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable
from typing import Any

import av
import av.error
import torch
from av.codec.hwaccel import HWAccel

from ..config import Stream
from ..device import with_index
from ..errors import EnvironmentFailed, InputError
from .address import WHITELIST, Kind, shown

SILENT = (av.error.ExitError, av.error.TimeoutError)  # nothing came within the time limit

_NO_CUDA = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS)


class Stopped(Exception):
    """The person asked to stop before there was anything to finish."""


def open_input(
    address: str, kind: Kind, options: Stream, hardware: bool, stop: Callable[[], bool], device: str = "cuda"
) -> tuple[Any, bool]:  # the container, and whether it decodes in hardware
    """Open a file, camera, URL or stdin. Raises InputError, EnvironmentFailed for networks."""
    pipe = Pipe(stop, keep=hardware) if kind == "pipe" else None
    file = pipe or address
    if hardware:
        try:
            stays = options.frames == "cuda" and options.preview is None  # the preview looks at frames on the CPU
            opened = _open(file, kind, options, _accelerator(stays, device))
            if pipe:
                pipe.forget()
            return opened, True
        except Exception as error:
            if not _no_hardware(error):
                raise
            if options.hwaccel == "cuda":
                what = getattr(error, "strerror", None) or error
                raise EnvironmentFailed(
                    f"hwaccel = cuda: NVDEC could not be started ({what}); use hwaccel = auto or none"
                ) from None
            if pipe:
                pipe.rewind()
    return _open(file, kind, options, None), False


def _accelerator(stays: bool, device: str) -> HWAccel:
    """NVDEC of the GPU that the model runs on; its pictures stay where they are, or come to the CPU.

    Those that stay have to lie in torch's CUDA context, and a context for every other stream would take memory. FFmpeg
    does not take the primary context where torch had it first, with other flags; it takes the one that is current in
    this thread, which the tensor makes torch's.
    """
    if not torch.cuda.is_available():
        return HWAccel("cuda", allow_software_fallback=True, is_hw_owned=stays)
    where = with_index(torch.device(device))
    torch.cuda.set_device(where)
    torch.zeros(1, device=where)
    context: dict[str, object] = {"primary_ctx": "0", "current_ctx": "1"}
    return HWAccel("cuda", str(where.index), allow_software_fallback=True, options=context, is_hw_owned=stays)


def _no_hardware(error: Exception) -> bool:
    """Whether FFmpeg says that it cannot decode with CUDA: no device, none it may use, or a context that fails."""
    if isinstance(error, av.error.ExternalError | av.error.UnknownError):  # what CUDA itself says becomes one of these
        return True
    return isinstance(error, OSError) and error.errno in _NO_CUDA


def _open(file: str | Pipe, kind: Kind, options: Stream, hwaccel: HWAccel | None) -> Any:
    given: dict[str, Any] = {"hwaccel": hwaccel}
    if isinstance(file, Pipe):
        if raw := options.raw_format:
            given["format"] = "rawvideo"
            size = f"{raw.width}x{raw.height}"
            given["options"] = {"video_size": size, "pixel_format": raw.pixels, "framerate": str(raw.rate)}
    elif kind == "camera":
        given["format"] = "v4l2"
    elif kind == "url":
        given["timeout"] = options.timeout
        given["options"] = {"protocol_whitelist": WHITELIST}
        if file.startswith("rtsp"):
            given["options"]["rtsp_transport"] = "tcp"
    try:
        return av.open(file, **given)
    except av.error.FFmpegError as error:
        if hwaccel is not None and _no_hardware(error):
            raise
        raise _failure(error, "stdin" if isinstance(file, Pipe) else file, kind, options) from None


def _failure(error: av.error.FFmpegError, address: str, kind: Kind, options: Stream) -> Exception:
    what, name = error.strerror or type(error).__name__, shown(address)
    if kind == "url":
        if isinstance(error, SILENT):
            what = f"no answer within {options.timeout:g} s (timeout = {options.timeout:g})"
        return EnvironmentFailed(f"{name}: cannot be opened: {what}")
    if kind == "camera":
        return InputError(f"{name}: cannot be opened as a V4L2 camera: {what}; ls /dev/video* shows what there is")
    if kind == "pipe":
        how = "" if options.raw else "; for raw frames give raw = rgb24:1280x720@30"
        return InputError(f"stdin: cannot be read as a video: {what}{how}")
    return InputError(f"{name}: cannot be read as a video: {what}")


class Pipe:
    """stdin as a file that FFmpeg reads, which ends where the command is to stop. While it keeps what it has read, it
    can be read from the start once more."""

    name = "stdin"

    def __init__(self, stop: Callable[[], bool], descriptor: int | None = None, keep: bool = False) -> None:
        self._stop = stop
        self._descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        self._keep = keep
        self._kept = bytearray()  # has been read
        self._again = b""  # is read once more

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        if self._again:
            found, self._again = self._again[:size], self._again[size:]
            return found
        while not self._stop():
            if select.select([self._descriptor], [], [], 0.2)[0]:
                found = os.read(self._descriptor, size)
                if self._keep:
                    self._kept += found
                return found
        return b""

    def rewind(self) -> None:
        """Start with what was kept; from there on nothing is."""
        self._again = bytes(self._kept)
        self.forget()

    def forget(self) -> None:
        """Keep nothing any more."""
        self._keep = False
        self._kept.clear()

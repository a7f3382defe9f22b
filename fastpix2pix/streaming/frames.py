"""Pictures that the caller has, translated while the caller goes on: live translation inside other programs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import stream_config
from ..console import say
from ..errors import InputError
from ..openmp import release_team
from ..runtime.fitting import size_asked
from ..runtime.tiles import TiledEngine, check_tiles
from ..runtime.translator import Translator
from .frame_runtime import Inside, frame_runtime
from .geometry import check_fixed, fit_into
from .network import Batches, Network, check_channels, for_video, steps_of
from .together import Together

OPTIONS = ("fit", "size", "tile", "live", "steady", "frames")
_CHANNELS = {"rgb": 3, "bgr": 3, "rgba": 4}
_SUBSAMPLED = ("nv12", "yuv420")
_HIGH = 720  # lines from which YUV counts as BT.709, as in files without a tag


class Frames:
    """A model that takes frames by `submit` and gives them back by `collect`, in order, on threads of its own.

        with f2p.Frames(g, 720, 1280, pixels="bgr") as frames:  # as OpenCV has them
            for shown in frames.translate(camera()):            # or submit and collect
                cv2.imshow("live", shown)

    A frame is uint8: [H, W, 3] of rgb and bgr, [H, W, 4] of rgba (alpha is dropped, and 255 in what comes out). Of nv12
    and yuv420 (I420) it is all planes one after the other, as in a buffer [H * 3 / 2, W], or a tuple of planes, whose
    rows may lie at any distance. With frames = cuda it may lie on the GPU (DLPack, or __cuda_array_interface__).

    With `live` the newest frames count: one is in work, one waits, and an older one that waits gives way. Without it
    `submit` waits for a place. Any threads may submit; one collects. To be closed, by `with` or `close`.

    Raises InputError for options and frames that do not fit, and EnvironmentFailed in the next call after the engine
    failed, or after `close`.
    """

    def __init__(
        self,
        g: Translator,  # fastpix2pix.load
        height: int,  # of the frames, pixels
        width: int,
        *,
        pixels: str = "rgb",  # of the frames: rgb, bgr, rgba, nv12, yuv420
        pixels_out: str | None = None,  # likewise of what comes out; default: the same
        matrix: str | None = None,  # of YUV: bt601 or bt709; default: bt709 from 720 lines
        range: str = "limited",  # of YUV, or full
        **options: Any,  # fit, size, tile, live, steady, frames: as of config.Stream
    ) -> None:
        pixels_out = pixels_out or pixels
        for name, value in (("pixels", pixels), ("pixels_out", pixels_out)):
            if value not in (*_CHANNELS, *_SUBSAMPLED):
                raise InputError(f"{name} = {value}: allowed are {', '.join((*_CHANNELS, *_SUBSAMPLED))}")
        if others := sorted(set(options) - set(OPTIONS)):
            raise InputError(f"unknown option {others[0]}; allowed are {', '.join(OPTIONS)}")
        given, source = stream_config(**options), (height, width)
        engine = for_video(g, say).engine
        check_channels(engine)
        check_tiles(engine, given)
        described, trained = engine.describe(), int(g.record.get("size") or 256)
        even = pixels_out in _SUBSAMPLED
        geometry = fit_into(source, given.fit, size_asked(given, described), trained, engine.multiple, even)
        check_fixed(geometry, source, described)
        tall, wide = geometry.output
        self.shape: tuple[int, ...] = (tall * 3 // 2, wide) if even else (tall, wide, _CHANNELS[pixels_out])  # outputs
        self._together = Together(Batches(TiledEngine(engine, given.tile) if given.fit == "tile" else engine), 1)
        self._together.join()
        network = Network(self._together, engine, steps_of(given))
        colour = (matrix or ("bt709" if height >= _HIGH else "bt601"), range)
        self._runtime, _ = frame_runtime(engine, network, source, geometry, (pixels, pixels_out), colour, given)
        self._numbers = itertools.count()
        self._tags = Inside()
        self._submitting = threading.Lock()  # numbers rise in the order in which frames go in
        release_team()

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        frame: Any,
        tag: Any = None,  # comes back with the translated frame
        *,
        deadline: float | None = None,  # seconds from now; a frame not begun by then is dropped
        timeout: float | None = None,  # seconds to wait for a place
    ) -> bool:
        """Copy a frame in; False where there was no place within `timeout`."""
        with self._submitting:
            number = next(self._numbers)
            self._tags.put(number, tag)
            taken = False
            try:
                taken = self._runtime.submit(frame, number, deadline=deadline, timeout=timeout)
            finally:
                if not taken:
                    self._tags.withdraw()
        return taken

    def collect(
        self,
        into: Any = None,  # a frame to be written, of `shape`; default: a new array
        *,
        timeout: float | None = None,  # seconds to wait for the next frame
    ) -> tuple[Any, Any] | None:
        """(the next frame, its tag); None after `timeout`, and at the end (`finish`)."""
        frame: Any = np.empty(self.shape, np.uint8) if into is None else into
        number = self._runtime.collect(frame, timeout=timeout)
        if number is None:
            return None
        return frame, self._tags.take(number)

    def translate(self, frames: Iterable[Any]) -> Iterator[NDArray[np.uint8]]:
        """The outputs of all frames, in order, each as soon as it is there; then no more frames are taken."""
        for frame in frames:
            while not self.submit(frame, timeout=0.0):
                if done := self.collect():
                    yield done[0]
            while done := self.collect(timeout=0.0):
                yield done[0]
        self.finish()
        while done := self.collect():
            yield done[0]

    def finish(self) -> None:
        """No more frames will come: `collect` gives those inside, then None."""
        self._runtime.finish()

    def close(self) -> None:
        """Stop; frames inside are abandoned. May be called twice, from any thread."""
        self._runtime.close()
        self._together.close()

    def stats(self) -> dict[str, Any]:
        """{"frames": how many went in, came out and were dropped, "latency": milliseconds of every stage}."""
        return dict(self._runtime.stats())

    def describe(self) -> dict[str, Any]:
        """Device, slots and policy, and whether the work is a CUDA graph."""
        return dict(self._runtime.describe())

"""Timestamps that only rise, whatever the source says: gaps of a connection, restarts, missing stamps, wrong order."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

_BACK = 3  # periods that a timestamp may fall back before it counts as a new beginning


class Timeline:
    """One source's. Sound is moved by as much as the pictures are."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._step = 0  # from the last picture to the next, as far as it is known
        self._offset: int | None = 0  # added to timestamps; None: to be found
        self._pts, self._dts = _Order(), _Order()

    def begin_anew(self) -> None:
        """The next picture is of a new connection: it follows the last one."""
        self._offset = None
        self._pts, self._dts = _Order(), _Order()

    def stamp(
        self,
        pts: int | None,  # of the picture, in the source's time base
        dts: int | None,  # of the packet that brought it out of the decoder
        duration: int,  # in the same, 0 where unknown
        period: int,  # of the average rate
    ) -> int:
        """When the picture is shown."""
        following = 0 if self._last is None else self._last + (self._step or period)
        given = self._believed(pts, dts)
        if given is None:
            stamp = following
        else:
            if self._offset is None or (self._last or 0) - (given + self._offset) > _BACK * period:
                self._offset = following - given
            stamp = given + self._offset
        if self._last is not None:
            stamp = max(stamp, self._last + 1)
        self._last, self._step = stamp, duration
        return stamp

    def _believed(self, pts: int | None, dts: int | None) -> int | None:
        """pts, unless it fell back more often than dts: FFmpeg's guess_correct_pts (libavcodec/decode.c).

        A new beginning lets both fall back; of pictures whose pts are in the order of decoding pts alone does.
        """
        self._pts.see(pts)
        self._dts.see(dts)
        wrong_order = self._dts.last is not None and self._pts.faults > self._dts.faults
        return dts if pts is None or wrong_order else pts

    def move(
        self,
        packet: Any,  # of sound; its timestamps are changed
        time_base: Fraction,  # of the pictures
    ) -> bool:
        """Whether its place is known: before the first picture of a new connection it is not."""
        if self._offset is None:
            return False
        shift = round(self._offset * time_base / packet.time_base)
        if shift:
            packet.dts += shift
            if packet.pts is not None:
                packet.pts += shift
        return True


class _Order:
    """How often timestamps of one kind did not rise."""

    def __init__(self) -> None:
        self.faults = 0
        self.last: int | None = None

    def see(self, stamp: int | None) -> None:
        if stamp is not None:
            self.faults += self.last is not None and stamp <= self.last
            self.last = stamp

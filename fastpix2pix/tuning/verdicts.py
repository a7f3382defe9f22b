"""What measuring a way to compute gives: its milliseconds, or in words why it may not be used."""

from __future__ import annotations

GAIN = 0.97  # of the other's time, at most: less is not worth another way


def one_line(error: Exception) -> str:
    """What was raised, as such words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def clearly_faster(own: float | str | None, other: float | str | None) -> bool:
    """Whether both were timed, and `own` takes less time by more than a trifle."""
    return isinstance(own, float) and isinstance(other, float) and own <= GAIN * other

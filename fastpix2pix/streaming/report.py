"""What became of one stream, for a person and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# in = out + dropped + late + failed + abandoned; broken is of the source: left out, or patched by the decoder
COUNTS = ("in", "out", "dropped", "late", "failed", "abandoned", "broken")
WORK = ("decode", "to_network", "engine", "from_network", "encode")  # stages that work rather than wait


@dataclass
class Report:
    """What became of one stream."""

    source: str
    sink: str
    frames: dict[str, int] = field(default_factory=dict)  # by COUNTS
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # p50_ms, p95_ms, p99_ms, max_ms, count
    seconds: float = 0.0  # from the first picture asked for to the trailer
    fps: float = 0.0  # pictures out per second of it
    engine_share: float = 0.0  # of the wall time in which the engine worked
    overlap: float = 0.0  # sum of the working times of WORK over the wall time; above 1 only where stages overlap
    reconnects: int = 0
    live: bool = False
    interrupted: bool = False
    media: dict[str, Any] = field(default_factory=dict)
    error: str = ""  # why it ended, while other streams went on

    def line(self) -> str:
        """For a person."""
        f = self.frames
        if self.error:
            done = f"failed after {f['out']} frames" if f["out"] else "left out"
            return f"{done}: {self.source}: {self.error.removeprefix(f'{self.source}: ')}"
        lost = ", ".join(f"{f[name]} {name}" for name in COUNTS[2:] if f[name])
        spent = ", ".join(f"{name} {self.stages[name]['p50_ms']:.1f} ms" for name in ("decode", "engine", "encode"))
        total = self.stages["total"]
        sink = self.sink.removesuffix(":")  # of null:
        late = f"; latency p50 {total['p50_ms']:.0f}, p95 {total['p95_ms']:.0f}, p99 {total['p99_ms']:.0f} ms"
        return (
            f"{self.source} -> {sink}: {f['out']} of {f['in']} frames{f' ({lost})' if lost else ''} in "
            f"{self.seconds:.1f} s, {self.fps:.1f} fps; {spent} a frame, engine busy {100 * self.engine_share:.0f} %"
            f"{late if self.live else ''}{'; interrupted' if self.interrupted else ''}"
        )

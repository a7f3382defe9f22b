"""What a video costs beside its engine: python -m bench.video MODEL VIDEO [rounds] [frames]

In turn, so that a busy machine slows both: the engine alone on as many pictures of the network's size, and the whole
`infer` from file to file. Prints medians and their ratio, which is what decoding, colours, padding, encoding and the
frame runtime add, in wall time and in processor time (which other programs disturb less). On a machine that is shared
say GOMP_SPINCOUNT=0: OpenMP's threads then wait without spinning, which costs an engine alone more than a pipeline.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import av
import torch

from fastpix2pix.runtime.load import load
from fastpix2pix.streaming.geometry import fit_into
from fastpix2pix.streaming.stream import Stream


def main(model: str, video: str, rounds: int = 5, frames: int = 24) -> None:
    g = load(model)
    with av.open(video) as opened:
        first = next(opened.decode(video=0))
    size = first.height, first.width
    network = fit_into(size, "pad", None, 256, g.engine.multiple, True).network
    device = g.engine.device
    picture = torch.rand(1, g.engine.in_channels, *network).mul_(2).sub_(1)
    picture = picture.to(device, memory_format=torch.channels_last)
    g.engine.translate(picture)  # warm
    alone, whole, reports = [], [], []  # (wall, processor) seconds of every round
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            start = _now(device)
            for number in range(frames):
                g.engine.translate(picture, number)
            alone.append(_since(start, device))
            start = _now(device)
            with redirect_stderr(StringIO()):
                report = Stream(g, video, Path(folder) / "out.mp4", overwrite=True, max_frames=frames).run()
            whole.append(_since(start, device))
            reports.append(report)
            assert report.frames["out"] == frames
    report = sorted(reports, key=lambda r: r.seconds)[len(reports) // 2]
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, PyAV {av.__version__}"
    print(f"{where}, {g.describe()['backend']} {g.describe()['precision']}; {size[1]}x{size[0]}, {frames} frames")
    for i, what in enumerate(("wall time", "processor time")):
        engine, infer = (statistics.median(times[i] for times in side) for side in (alone, whole))
        rounds_ = ", ".join(f"{w[i] / a[i]:.2f}" for a, w in zip(alone, whole, strict=True))
        print(
            f"{what}: engine alone {engine:.2f} s, infer {infer:.2f} s, ratio {infer / engine:.3f} (rounds: {rounds_})"
        )
    busy = ", ".join(f"{name} {report.stages[name]['total_s']:.2f} s" for name in ("decode", "engine", "encode"))
    print(f"of {report.seconds:.2f} s: {busy}; overlap {report.overlap:.2f}x, engine busy {report.engine_share:.0%}")


def _now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float], device: torch.device) -> tuple[float, float]:
    wall, processor = _now(device)
    return wall - start[0], processor - start[1]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

"""Where the time of a training step goes, by kind of work: ours and the baseline under torch's profiler."""

from __future__ import annotations

from typing import Any

import torch

from fastpix2pix.profiling import breakdown

from .comparison import release
from .comparisons import steps
from .devices import Setting
from .report import Skipped

STEPS = 3  # under the profiler, after as many as a graph needs


def step_breakdown(at: Setting) -> dict[str, Any]:
    """{batch, ways: {name: {kind of work: ms per step}}} at the smallest batch; profiling itself costs time."""
    (comparison, *_) = steps.comparisons(at)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if at.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    found: dict[str, Any] = {"batch": comparison.images, "ways": {}}
    for name in (comparison.ours, comparison.baseline):
        try:
            run = comparison.ways[name]()
        except Skipped:
            continue
        for _ in range(steps.WARM_UP + 2 if at.device.type == "cuda" else 1):
            run()
        with torch.profiler.profile(activities=activities) as trace:
            for _ in range(STEPS):
                run()
            if at.device.type == "cuda":
                torch.cuda.synchronize()
        found["ways"][name] = breakdown(trace, STEPS)
        del run
        release(at)
    return found

"""Where a check runs and at what size: facts for the record, and the settings of a real and of a small run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpix2pix import __version__
from fastpix2pix.config import Train, train_config
from fastpix2pix.kernels.levels import units

ROOT = Path(__file__).resolve().parents[1]
Pair = tuple[Tensor, Tensor]  # x, y: [N, C, H, W] fp32 in [-1, 1] unless said otherwise, channels-last


class Setting(NamedTuple):
    """What is run."""

    device: torch.device
    batches: tuple[int, ...]
    options: dict[str, Any]  # of train_config: the networks and the crop
    curve_steps: int
    sides: tuple[int, int]  # of the square matrices for the matmul peak, and of those copied for the bandwidth
    rounds: int  # of interleaved timing
    sample_s: float  # seconds one timing sample lasts, at least
    compile_backend: str
    scale: str = "full"  # full, short or smoke: bench_setting

    def config(self, batch: int, **options: Any) -> Train:
        """Training options of this setting."""
        return train_config(device=self.device.type, batch=batch, **self.options, **options)


def prepare(device: torch.device) -> None:
    """Make a GPU the current one; cuDNN chooses as in training, the same for every competitor."""
    if device.type != "cuda":
        return
    if device.index is not None:  # plain "cuda" is the current one, and torch refuses to be told so
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # shapes do not change
    torch.backends.cudnn.allow_tf32 = True  # of fp32 convolutions, as by default


def setting(device: torch.device, small: bool) -> Setting:
    """unet_256 with the 70x70 PatchGAN at batch 1, 16 and 64; or, to test the harness, networks of a few channels."""
    if not small:
        return Setting(device, (1, 16, 64), {}, 200, (8192, 16384), 9, 0.15, "inductor")
    tiny = {"depth": 5, "ngf": 4, "ndf": 4, "n_layers": 1, "crop_size": 32}
    return Setting(device, (2,), tiny, 3, (64, 64), 2, 0.0, "eager")


def bench_setting(device: torch.device, scale: str) -> Setting:
    """Of the comparisons. full: the paper's networks on a GPU, on a CPU smaller ones that two cores train in seconds;
    short: what a gate has time for; smoke: once each, to see that it runs."""
    if scale == "smoke":
        return setting(device, True)._replace(rounds=2, sides=(256, 1024), scale="smoke")
    if device.type == "cuda":
        batches, rounds = ((1, 16, 64), 15) if scale == "full" else ((1, 8), 25)
        return setting(device, False)._replace(batches=batches, rounds=rounds, sample_s=0.05, scale=scale)
    middle: dict[str, Any] = {"depth": 7, "ngf": 32, "ndf": 32, "crop_size": 128}
    small = middle | {"ngf": 8, "ndf": 8}
    options, batches, rounds = (middle, (1, 4), 9) if scale == "full" else (small, (1, 2), 25)
    return Setting(device, batches, options, 0, (1024, 4096), rounds, 0.02, "inductor", scale)


def facts(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date of a record."""
    import numpy

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    found = {
        "device": machine(),
        "capability": None,
        "memory_gib": None,
        "driver": None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"], found["capability"] = properties.name, f"{properties.major}.{properties.minor}"
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = (_output(query) or "unknown").splitlines()[0]
    return found


def machine() -> str:
    """What the CPU calls itself, without its frequency, and its cores."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    except OSError:
        found = None
    name = found[1].split("@")[0].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str:
    """Short hash of HEAD, "-dirty" where files differ; without git FASTPIX2PIX_COMMIT, else "unknown"; the version
    where it is installed."""
    if not (ROOT / "setup.py").is_file():  # installed: git would find whatever repository lies around it
        return f"v{__version__}"
    head = _output(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"])
    if head is None:
        return os.environ.get("FASTPIX2PIX_COMMIT", "unknown")
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}-dirty" if changed else head


def result_path(found: dict[str, Any]) -> Path:
    """bench/results/<gpu>-<commit>.json"""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(found["device"]).lower()).strip("-")
    return ROOT / "bench" / "results" / f"{gpu}-{found['commit']}.json"


def _output(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def synthetic_pairs(config: Train, count: int, device: torch.device, seed: int = 1) -> list[Pair]:
    """`synthetic_levels` in fp32."""
    return [of_units(pair) for pair in synthetic_levels(config, count, device, seed)]


def of_units(pair: Pair) -> Pair:
    """Of levels."""
    x, y = (units(levels, torch.float32, impl="reference") for levels in pair)
    return x, y


def synthetic_levels(config: Train, count: int, device: torch.device, seed: int = 1) -> list[Pair]:
    """`count` batches of smooth random pictures as loaders give them: uint8, [N, C, H, W] channels-last. y is x
    inverted, its channels rolled: a map that can be learned."""
    draws = torch.Generator().manual_seed(seed)
    size, n = config.data.crop_size, config.batch
    pairs = []
    for _ in range(count):
        coarse = torch.rand(n, 3, 8, 8, generator=draws).to(device) * 2.4 - 1.2
        smooth = F.interpolate(coarse, (size, size), mode="bicubic").clamp(-1, 1)
        grain = torch.rand(n, 3, size, size, generator=draws).to(device) * 0.1 - 0.05
        x = ((smooth + grain + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        y = 255 - x.roll(1, 1)
        pairs.append((x.contiguous(memory_format=torch.channels_last), y.contiguous(memory_format=torch.channels_last)))
    return pairs

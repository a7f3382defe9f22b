"""What was measured, kept per machine, versions and kernel source: what could change a time changes the key."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..files import cache_folder, make_folder, write_text
from ..kernels import dispatch
from ..kernels._triton import triton


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and a hash of the kernels' source."""
    found: dict[str, Any] = {
        "device": "cpu",
        "triton": None if triton is None else triton.__version__,
        "torch": torch.__version__,
        "kernels": source_hash(dispatch.__file__),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "device": f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} processors",
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


class PlanCache:
    """Records as JSON files: `record = cache.load(subject)`, `cache.save(subject, record)`.

    subject: what was measured, JSON-ready; with the machine it is the key.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder("plans")
        self.machine = machine(device)

    def path(self, subject: dict[str, Any]) -> Path:
        """Where the record of a subject lies, if there is one."""
        key = json.dumps({"machine": self.machine, "subject": subject}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def load(self, subject: dict[str, Any]) -> dict[str, Any] | None:
        """The record, or None where there is none for this machine, or it is damaged: it is measured anew then."""
        try:
            content = json.loads(self.path(subject).read_text(encoding="utf-8"))
            fits = content["machine"] == self.machine and content["subject"] == subject
            return content["record"] if fits else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, subject: dict[str, Any], record: dict[str, Any]) -> Path:
        """Keep a record; returns its file. EnvironmentFailed where the disk refuses."""
        path = self.path(subject)
        make_folder(self.folder)
        content = {"machine": self.machine, "subject": subject, "record": record}
        write_text(path, json.dumps(content, indent=1) + "\n")
        return path


@lru_cache
def source_hash(module: str) -> str:
    """Of every file in the folder of the module in this file."""
    digest = hashlib.sha256()
    for file in sorted(Path(module).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    """The kernel module's line, which names the driver's version."""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text(encoding="utf-8").splitlines()[0] if file.is_file() else "unknown"

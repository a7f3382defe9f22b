"""What a run leaves to look at: metrics.jsonl, TensorBoard events, sample grids, loss curves, one static page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import write_image
from ..files import write_text, written_aside
from ..pages import address, table, text, write_page

_GAP = 4  # pixels between the pictures of a grid


class Metrics:
    """Appends records to metrics.jsonl and TensorBoard; on resume, drops what lies beyond the checkpoint."""

    def __init__(self, run: Path, resume_step: int, tensorboard: bool) -> None:
        self.path = run / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] <= resume_step]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(run), purge_step=resume_step + 1)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """One line {"step": step, **record}; numbers (nested too) also go to TensorBoard under their path."""
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        if self._board is not None:
            for tag, value in _numbers(record):
                self._board.add_scalar(tag, value, step)

    def picture(self, step: int, grid: np.ndarray) -> None:
        """A sample grid uint8 [H, W, C] for TensorBoard."""
        if self._board is not None:
            self._board.add_image("samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut off by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures uint8 [H, W, 1 | 3 | 4] of equal size in rows -> one uint8 [H', W', 3] on white."""
    height, width = rows[0][0].shape[:2]
    sheet = np.full((len(rows) * (height + _GAP) - _GAP, len(rows[0]) * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = r * (height + _GAP), c * (width + _GAP)
            sheet[top : top + height, left : left + width] = picture[..., :3]  # one channel broadcasts to three
    return sheet


def save_samples(run: Path, step: int, sheet: np.ndarray) -> Path:
    """samples/<step>.png"""
    path = run / "samples" / f"{step:08d}.png"
    write_image(path, sheet)
    return path


def save_curves(run: Path, records: list[dict[str, Any]]) -> Path | None:
    """curves.png: the losses, and the validation metrics of each pair of modes. None while there is nothing to draw."""
    losses = [r for r in records if "loss" in r]
    checks = [r for r in records if "validation" in r]
    if not losses:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = [r["step"] for r in losses]
    for name in losses[0]["loss"]:
        values = [r["loss"][name] for r in losses]
        axis = middle if name == "g_l1" else left
        axis.plot(steps, values, linewidth=0.6, alpha=0.35, color=f"C{list(losses[0]['loss']).index(name)}")
        axis.plot(steps, _smooth(values), label=name, color=f"C{list(losses[0]['loss']).index(name)}")
    for modes in checks[0]["validation"] if checks else ():
        right.plot([r["step"] for r in checks], [r["validation"][modes]["l1"] for r in checks], marker="o", label=modes)
    for axis, title in (
        (left, "adversarial losses"),
        (middle, "L1, training, range [-1, 1]"),
        (right, "L1, validation, range [0, 1]"),
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    path = run / "curves.png"
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    return path


def save_page(run: Path, config: dict[str, Any], records: list[dict[str, Any]]) -> Path:
    """index.html: one static page with options, curves, validation table and samples."""
    checks = [r for r in records if "validation" in r]
    samples = sorted((run / "samples").glob("*.png"), reverse=True)[:6]
    parts = []
    if (run / "curves.png").exists():
        parts.append('<img src="curves.png" alt="loss curves">')
    if checks:
        parts.append(f"<h2>Validation at step {checks[-1]['step']}</h2>{_validation_table(checks[-1]['validation'])}")
    for path in samples:
        label = f"step {int(path.stem)}: input | output | target"
        parts.append(f'<h2>{label}</h2><img src="{address(path.relative_to(run))}" alt="samples">')
    rows = [[text(name), text(value)] for name, value in _flat(config)]
    parts.append(f"<h2>Options</h2>{table([], rows)}")
    return write_page(run / "index.html", run.resolve().name, parts)


def _validation_table(validation: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(validation.values())))
    rows = [[text(modes), *(f"{row[name]:.4f}" for name in names)] for modes, row in validation.items()]
    return table([text(name) for name in ("modes", *names)], rows)


def _flat(config: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in config.items():
        rows += _flat(value) if isinstance(value, dict) else [(key, value)]
    return rows


def _numbers(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found.append((prefix + key, float(value)))
    return found


def _smooth(values: list[float]) -> list[float]:
    """Exponential average with a memory of a twentieth of the curve."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smoothed, last = [], values[0]
    for value in values:
        last = keep * last + (1 - keep) * value
        smoothed.append(last)
    return smoothed

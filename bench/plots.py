"""The plots of a record, as SVG text: latency and throughput over batch, layers and steps against their floors."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]
OURS, BASE, OTHER, FLOOR = "#0b6e4f", "#b04a3a", "#8a8f98", "#1c1e21"
COLOURS = ["#0b6e4f", "#3b8ea5", "#e0a03c", "#b04a3a", "#7a5c99", "#5a7d2b", "#8a8f98", "#c9789b"]
_STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#9aa0a6", "axes.grid": True, "grid.color": "#e6e8eb",
    "axes.axisbelow": True, "legend.frameon": False, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}  # fmt: skip


def plots(record: Record) -> dict[str, str]:
    """Title -> SVG, of what the record has rows for."""
    found = {}
    with matplotlib.rc_context(_STYLE):
        for part, what in (("engines", "translation"), ("steps", "training step")):
            rows = _by_batch(record, part)
            if rows:
                found[f"{what.capitalize()}: latency over batch"] = _over_batch(rows, "ms", "ms per batch")
                title = f"{what.capitalize()}: throughput over batch"
                found[title] = _over_batch(rows, "images_per_s", "images per second")
        if rows := _ok(record, "layers"):
            found["Convolutions, forward, against the floor"] = _layers(rows)
        if ways := record.get("breakdown", {}).get("ways"):
            found[f"Where a step's time goes, batch {record['breakdown']['batch']}"] = _breakdown(ways)
    return found


def _ok(record: Record, part: str) -> list[Record]:
    return [row for row in record["comparisons"] if row["part"] == part and row["status"] == "ok"]


def _by_batch(record: Record, part: str) -> list[Record]:
    """The rows of one network that differ in the batch alone, smallest first."""
    rows = [row for row in _ok(record, part) if re.fullmatch(r"(running )?batch \d+", row["name"])]
    return sorted(rows, key=lambda row: row["images"])


def _over_batch(rows: list[Record], key: str, label: str) -> str:
    """A line per way, ours and the baseline strong, and the floor."""
    figure = Figure(figsize=(5.6, 3.6))
    axes = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row["ways"]))
    others = iter([c for c in COLOURS if c not in (OURS, BASE)] * 3)
    for name in names:
        points = [(row["images"], row["ways"][name]) for row in rows if key in row["ways"].get(name, {})]
        if not points:
            continue
        strong = name in (rows[0]["ours"], rows[0]["baseline"])
        colour = OURS if name == rows[0]["ours"] else BASE if name == rows[0]["baseline"] else next(others)
        x, y = zip(*((batch, way[key]) for batch, way in points), strict=True)
        axes.plot(x, y, marker="o", markersize=4, color=colour, linewidth=2.2 if strong else 1.1, label=name)
        if key == "ms" and strong:
            low, high = zip(*(way["quartiles_ms"] for _, way in points), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    floors = [(row["images"], row["floor_ms"]) for row in rows if row["floor_ms"]]
    if floors:
        least = [ms if key == "ms" else batch * 1e3 / ms for batch, ms in floors]
        axes.plot(
            [batch for batch, _ in floors], least, color=FLOOR, linewidth=1.2, linestyle=(0, (2, 2)), label="floor"
        )
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel=label)
    _plain_ticks(axes, sorted({row["images"] for row in rows}))
    axes.legend(fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(-0.02, -0.16), handlelength=1.6)
    return _svg(figure)


def _plain_ticks(axes: Axes, batches: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())


def _layers(rows: list[Record]) -> str:
    """Per layer: ours, the baseline, and a tick at the floor."""
    figure = Figure(figsize=(11.6, 3.8))
    axes = figure.subplots()
    names = [row["name"].split(" batch")[0].removeprefix("generator.") for row in rows]
    for shift, key, colour in ((-0.2, "ours", OURS), (0.2, "baseline", BASE)):
        values = [1e3 * row["ways"][row[key]]["ms"] for row in rows]
        axes.bar([i + shift for i in range(len(rows))], values, 0.38, color=colour, label=rows[0][key])
    floors = [1e3 * (row["floor_ms"] or 0) for row in rows]
    if any(floors):
        axes.hlines(floors, [i - 0.42 for i in range(len(rows))], [i + 0.42 for i in range(len(rows))], color=FLOOR,
                    linewidth=1.6, label="floor")  # fmt: skip
    axes.set(ylabel="microseconds")
    axes.set_xticks(range(len(rows)), names, rotation=35, ha="right")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=8)
    return _svg(figure)


def _breakdown(ways: dict[str, dict[str, float]]) -> str:
    """A stacked bar per way."""
    figure = Figure(figsize=(11.6, 0.9 + 0.62 * len(ways)))
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for parts in ways.values() for kind in parts))
    names = list(ways)
    left = [0.0] * len(names)
    for kind, colour in zip(kinds, COLOURS, strict=False):
        values = [ways[name].get(kind, 0.0) for name in names]
        axes.barh(range(len(names)), values, 0.55, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds per step")
    axes.grid(axis="y", visible=False)
    axes.legend(
        fontsize=8, ncols=len(kinds), loc="lower left", bbox_to_anchor=(0, 1.0), handlelength=1.0, columnspacing=1.2
    )
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(
        text, format="svg", bbox_inches="tight", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    content = text.getvalue()
    return content[content.index("<svg") :]

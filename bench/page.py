"""A record as one static page: no scripts, nothing fetched; whatever comes from a file or a device is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from .plots import plots

Record = dict[str, Any]

_STYLE = """
:root { color-scheme: light; --ink: #1c1e21; --soft: #5f6670; --line: #e3e6ea; --good: #0b6e4f; --bad: #b04a3a; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 0 auto; max-width: 1180px;
       padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .25rem; } p { max-width: 75ch; } .soft { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: 0; margin: .75rem 0 0; list-style: none; }
.facts b { font-weight: 600; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--ink);
     padding: .3rem .6rem; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: .28rem .6rem; white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; white-space: normal; }
td.text { color: var(--soft); } .good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; margin-top: .75rem; }
.plots figure { margin: 0; } .plots figure.wide { grid-column: 1 / -1; } .plots svg { width: 100%; height: auto; }
@media (max-width: 760px) { .plots { grid-template-columns: 1fr; } }
details { font-size: .86rem; margin: .4rem 0; } summary { cursor: pointer; color: var(--soft); }
"""
_FACTS = ("device", "driver", "cuda", "torch", "triton", "python", "threads", "fastpix2pix", "commit", "date")
_TITLES = {
    "kernels": "Kernels", "layers": "Convolutions", "steps": "Training step", "loader": "Loader",
    "engines": "Translation", "frames": "Frames", "video": "Video", "startup": "Start-up",
}  # fmt: skip


def page(record: Record) -> str:
    """HTML text."""
    facts = record["facts"]
    shown = "".join(f"<li>{name} <b>{escape(str(facts[name]))}</b></li>" for name in _FACTS if facts.get(name))
    peaks = record["peaks"]
    body = [
        f"<h1>fastpix2pix on {escape(str(facts['device']))}</h1>",
        f'<ul class="facts">{shown}</ul>',
        "<p>Ratio is the time of ours over the time of the baseline, measured in turns in one run: below 1 is faster. "
        "It is the median of the rounds' ratios, with the 99 % interval of that median. Every way was checked to "
        "compute the same before it was timed.</p>",
        f'<p class="soft">Floor: the least time the work can take at {peaks["tflops"]:.3g} TFLOP/s and '
        f"{1e3 * peaks['tb_s']:.4g} GB/s ({escape(peaks['name'])}; {escape(peaks['source'])}).</p>",
        _plots(record),
    ]
    parts = dict.fromkeys(row["part"] for row in record["comparisons"])
    body += [_part(part, [row for row in record["comparisons"] if row["part"] == part]) for part in parts]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastpix2pix bench: {escape(str(facts['device']))}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _plots(record: Record) -> str:
    found = plots(record)
    if not found:
        return ""
    figures = [
        f"<figure{'' if 'over batch' in title else ' class=wide'}><h3>{escape(title)}</h3>{svg}</figure>"
        for title, svg in found.items()
    ]
    return f'<div class="plots">{"".join(figures)}</div>'


def _part(part: str, rows: list[Record]) -> str:
    head = (
        '<tr><th>what</th><th class="text">ours</th><th>ms</th><th class="text">baseline</th><th>ms</th><th>ratio</th>'
        "<th>interval</th><th>floor ms</th><th>of floor</th></tr>"
    )
    lines = "".join(_row(row) for row in rows)
    table = f'<div class="scroll"><table>{head}{lines}</table></div>'
    return f"<h2>{escape(_TITLES.get(part, part))}</h2>{table}{_others(rows)}"


def _row(row: Record) -> str:
    name = f"<td>{escape(row['name'])}</td>"
    if row["status"] != "ok":
        return f'<tr>{name}<td class="text" colspan="8">{row["status"]}: {escape(row["reason"])}</td></tr>'
    ours, base = row["ways"][row["ours"]], row["ways"][row["baseline"]]
    ratio, floor = ours["ratio"], row["floor_ms"]
    mark = "good" if ratio["high"] < 1 else "bad" if ratio["low"] > 1 else ""
    cells = [
        f'<td class="text">{escape(row["ours"])}</td>',
        f"<td>{ours['ms']:.3f}</td>",
        f'<td class="text">{escape(row["baseline"])}</td>',
        f"<td>{base['ms']:.3f}</td>",
        f'<td class="{mark}">{ratio["median"]:.2f}</td>',
        f"<td>{ratio['low']:.2f} to {ratio['high']:.2f}</td>",
        f"<td>{floor:.4g}</td><td>{100 * floor / ours['ms']:.0f} %</td>" if floor else "<td></td><td></td>",
    ]
    return f"<tr>{name}{''.join(cells)}</tr>"


def _others(rows: list[Record]) -> str:
    """Every way of the part that is neither ours nor the baseline, folded away."""
    lines = []
    for row in rows:
        for name, way in row["ways"].items():
            if name in (row["ours"], row["baseline"]):
                continue
            what = f"<td>{escape(row['name'])}</td><td class=text>{escape(name)}</td>"
            if "ms" in way:
                ratio = f"{way['ratio']['median']:.2f}" if "ratio" in way else ""
                lines.append(f"<tr>{what}<td>{way['ms']:.3f}</td><td>{ratio}</td></tr>")
            else:
                status, reason = next(iter(way.items()))
                lines.append(f'<tr>{what}<td class="text" colspan="2">{status}: {escape(str(reason))}</td></tr>')
    if not lines:
        return ""
    head = '<tr><th>what</th><th class="text">way</th><th>ms</th><th>of the baseline</th></tr>'
    table = f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'
    return f"<details open><summary>The other ways</summary>{table}</details>"

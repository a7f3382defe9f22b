"""README's figures and plots, from the committed records in bench/results/ and nothing else.

python -m bench.results                        write README.md and docs/plots/ anew
python -m bench.results --add benchmark/result.json    take a record of `fastpix2pix bench` in first
python -m bench.results --check                exit code 4 where they are not what the records say

A record of `make gpu-check` is <device>-<commit>.json, one of `fastpix2pix bench` <device>-<commit>-bench.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpix2pix.errors import InputError
from fastpix2pix.files import write_text

from .command import floor_columns
from .devices import ROOT, result_path
from .plots import plots

RESULTS, README, PLOTS = ROOT / "bench" / "results", ROOT / "README.md", ROOT / "docs" / "plots"
BEGIN, END = "<!-- figures: made by `make results`, not by hand -->", "<!-- end of figures -->"
NO_GPU = "No result of a GPU is committed yet, so there is no figure for one here: `make gpu-check` makes one."
SHOWN = ("steps", "engines", "loader", "frames", "video", "startup")  # parts in README; a record's page has them all
Record = dict[str, Any]


def records(folder: Path) -> dict[str, Record]:
    """Stem -> record. InputError names a file that is neither kind."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "facts" not in content or not ("rows" in content or "comparisons" in content):
            raise InputError(f"{path}: neither a record of make gpu-check nor of fastpix2pix bench")
        found[path.stem] = content
    return found


def render(found: dict[str, Record]) -> tuple[str, dict[str, str]]:
    """(Markdown, name -> SVG): GPUs first."""
    sections: list[str] = []
    drawn: dict[str, str] = {}
    gpus = {stem: r for stem, r in found.items() if r["facts"].get("capability")}
    if not gpus:
        sections.append(NO_GPU)
    for stem, record in [*gpus.items(), *((s, r) for s, r in found.items() if s not in gpus)]:
        if "rows" in record:
            sections.append(_checked(record))
            continue
        pictures = {f"{stem}-{_slug(title)}.svg": svg for title, svg in plots(record).items() if "over batch" in title}
        drawn |= pictures
        links = " ".join(f"![{name}](docs/plots/{name})" for name in pictures)
        sections.append("\n\n".join(part for part in (_compared(record), links) if part))
    return "\n\n".join(sections), drawn


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _source(record: Record) -> str:
    """Card, versions, commit and date."""
    facts = record["facts"]
    versions = [f"{name} {facts[name]}" for name in ("torch", "triton", "cuda", "cudnn", "driver") if facts.get(name)]
    threads = f", {facts['threads']} threads" if facts.get("threads") and not facts.get("capability") else ""
    return f"**{facts['device']}**{threads}; {', '.join(versions)}; commit {facts['commit']}, {facts['date'][:10]}"


def _compared(record: Record) -> str:
    """A table of `fastpix2pix bench`: ours, baseline, ratio, floor."""
    lines = [
        f"{_source(record)}; `fastpix2pix bench`. Ratio: time of ours / time of the baseline in the same run, with the "
        "99 % interval of the median.",
        "",
        "| what | ours | ms | baseline | ms | ratio | floor ms | of floor |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in record["comparisons"]:
        if row["part"] not in SHOWN or row["status"] != "ok":
            continue
        ours, base = row["ways"][row["ours"]], row["ways"][row["baseline"]]
        ratio, (floor, share) = ours["ratio"], floor_columns(row)
        lines.append(
            f"| {row['part']}: {row['name']} | {row['ours']} | {ours['ms']:.3g} | {row['baseline']} | {base['ms']:.3g} "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) | {floor} | {share} |"
        )
    return "\n".join(lines)


def _checked(record: Record) -> str:
    """A table of `make gpu-check`: what was timed, and how many checks passed."""
    rows = record["rows"]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "skipped")}
    lines = [
        f"{_source(record)}; `make gpu-check`: {', '.join(f'{n} {status}' for status, n in counts.items() if n)}.",
        "",
        "| what | ms | quartiles | images/s | times eager fp32 |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        values = row["values"]
        if row["status"] != "ok" or "ms" not in values:
            continue
        low, high = values["quartiles_ms"]
        times = f"{values['times_eager_fp32']:.2f}" if "times_eager_fp32" in values else ""
        lines.append(
            f"| {row['part']}: {row['row']} | {values['ms']:.4g} | {low:.4g} to {high:.4g} "
            f"| {values['images_per_s']:,.0f} | {times} |"
        )
    return "\n".join(lines)


def into_readme(text: str, figures: str) -> str:
    """README with the figures between its markers."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise InputError(f"README.md needs the lines {BEGIN} and {END}, in this order")
    return f"{text[: begin + len(BEGIN)]}\n{figures}\n{text[end:]}"


def add(path: Path, folder: Path = RESULTS) -> Path:
    """Copy a record of `fastpix2pix bench` under its name. A dirty commit's is refused: nobody could repeat it."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if "comparisons" not in record:
        raise InputError(f"{path}: not a record of fastpix2pix bench")
    commit = record["facts"]["commit"]
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        raise InputError(f"{path}: measured at commit {commit}; commit first, measure again")
    if failed := [row["name"] for row in record["comparisons"] if row["status"] == "failed"]:
        raise InputError(f"{path}: {', '.join(failed)} failed")
    target = folder / f"{result_path(record['facts']).stem}-bench.json"
    write_text(target, json.dumps(record, indent=1) + "\n")
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or compare with, what the records say."""
    parser = argparse.ArgumentParser(prog="python -m bench.results", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--add", type=Path, help="record of `fastpix2pix bench` to take in")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    try:
        if options.add:
            print(add(options.add))
        figures, drawn = render(records(RESULTS))
        before = README.read_text(encoding="utf-8")
        after = into_readme(before, figures)
    except InputError as error:
        print(f"bench.results: {error}", file=sys.stderr)
        return error.exit_code
    if options.check:
        missing = [name for name in drawn if not (PLOTS / name).is_file()]
        if after != before or missing:
            print("README.md is not what bench/results/ says: run make results", file=sys.stderr)
            return 4
        return 0
    write_text(README, after)
    for old in PLOTS.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, svg in drawn.items():
        write_text(PLOTS / name, svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`fastpix2pix bench`, its page, and README's figures."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser

import pytest

from bench import results
from bench.page import page
from bench.plots import plots
from bench.results import BEGIN, END, NO_GPU, add, into_readme, records, render
from fastpix2pix import cli
from fastpix2pix.config import Bench
from fastpix2pix.errors import InputError


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    """Of a real run."""
    out = tmp_path_factory.mktemp("bench") / "benchmark"
    options = ["--out", str(out), "--scale", "smoke", "--parts", "layers,steps,frames", "--device", "cpu"]
    assert cli.main(["bench", *options, "--json", str(out.parent / "copy.json"), "--threads", "1"]) == 0
    text = (out / "result.json").read_text()
    assert json.loads((out.parent / "copy.json").read_text()) == json.loads(text)
    assert "<svg" in (out / "index.html").read_text()
    return json.loads(text)


def test_the_record_says_what_was_measured_where(record):
    assert {row["part"] for row in record["comparisons"]} == {"layers", "steps", "frames"}
    assert all(row["status"] in ("ok", "skipped") for row in record["comparisons"])
    for key in ("device", "torch", "commit", "date", "threads", "python"):
        assert record["facts"][key]
    assert record["peaks"]["tflops"] > 0 and "measured here" in record["peaks"]["source"]
    ways = record["breakdown"]["ways"]
    assert len(ways) == 2 and all(sum(parts.values()) > 0 and "convolution" in parts for parts in ways.values())


def test_the_table_has_a_line_per_comparison(record):
    from bench.command import table

    head, *lines = table(record)
    assert head.split()[:3] == ["what", "ours", "ms"] and len(lines) == len(record["comparisons"])
    step = next(line for line in lines if line.startswith("steps/batch 2"))
    assert step.rstrip().endswith("%")


class Tags(HTMLParser):
    """Element names and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        fetched = [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[0] != "#"]
        assert fetched == []

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_and_escapes_everything(record):
    evil = copy.deepcopy(record)
    evil["facts"]["device"] = "<script>alert(1)</script>"
    row = evil["comparisons"][0]
    row["name"], row["baseline"] = "<img onerror=x>", "<b>base"
    row["ways"] = {row["ours"]: row["ways"][row["ours"]], "<b>base": list(row["ways"].values())[-1]}
    parsed = Tags()
    parsed.feed(page(evil))
    assert "script" not in parsed.tags and "img" not in parsed.tags and "b" in parsed.tags
    text = " ".join(parsed.words)
    assert "<script>alert(1)</script>" in text and "<img onerror=x>" in text and "99 % interval" in text


def test_plots_are_of_what_was_measured(record):
    found = plots(record)
    assert set(found) == {
        "Training step: latency over batch",
        "Training step: throughput over batch",
        "Convolutions, forward, against the floor",
        "Where a step's time goes, batch 2",
    }
    assert all(svg.startswith("<svg") and svg.rstrip().endswith("</svg>") for svg in found.values())
    assert "down.0" in found["Convolutions, forward, against the floor"]
    assert plots(record | {"comparisons": [], "breakdown": {}}) == {}


def test_rows_that_failed_are_shown_with_their_reason(record):
    failed = copy.deepcopy(record)
    failed["comparisons"][0] |= {"status": "failed", "reason": "ours: off by <3>"}
    assert "failed: ours: off by &lt;3&gt;" in page(failed)


def test_a_failed_comparison_ends_the_command_with_4(monkeypatch, tmp_path, capsys):
    import fastpix2pix.bench.command as command

    monkeypatch.setattr(command, "measure", lambda c, *_, **__: {
        "part": c.part, "name": c.name, "status": "failed", "reason": "off", "ways": {}, "ours": "a", "baseline": "b",
    })  # fmt: skip
    assert cli.main(["bench", "--out", str(tmp_path / "b"), "--scale", "smoke", "--parts", "frames"]) == 4
    assert "to tensor: off" in capsys.readouterr().err
    assert (tmp_path / "b" / "result.json").is_file()


@pytest.mark.parametrize("parts", ["", "kernels,speed", "all"])
def test_parts_are_named(parts):
    with pytest.raises(InputError, match="allowed are kernels, layers"):
        Bench(parts=parts)


GPU = {
    "facts": {"device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "torch": "2.13.0", "triton": "3.7.1",
              "cuda": "13.0", "cudnn": 91000, "driver": "580.1", "commit": "abc1234567",
              "date": "2027-01-02T03:04:05+00:00"},
    "budget_s": 480,
    "rows": [
        {"part": "kernels", "row": "adam", "status": "ok", "reason": "", "seconds": 1, "values": {"p": 0.3}},
        {"part": "steps", "row": "batch 1 explicit bf16 triton graph", "status": "ok", "reason": "", "seconds": 1,
         "values": {"ms": 1.25, "quartiles_ms": [1.2, 1.3], "images_per_s": 800.0, "times_eager_fp32": 5.5}},
        {"part": "engines", "row": "batch 1 running", "status": "skipped", "reason": "x", "seconds": 1, "values": {}},
    ],
}  # fmt: skip


def test_figures_come_from_the_records_alone(record, tmp_path):
    assert render({}) == (NO_GPU, {})
    (tmp_path / "gpu.json").write_text(json.dumps(GPU))
    (tmp_path / "cpu-bench.json").write_text(json.dumps(record))
    text, drawn = render(records(tmp_path))
    assert NO_GPU not in text and text.index("H100") < text.index(record["facts"]["device"])
    assert "| steps: batch 1 explicit bf16 triton graph | 1.25 | 1.2 to 1.3 | 800 | 5.50 |" in text
    assert "driver 580.1" in text and "commit abc1234567, 2027-01-02" in text and "2 ok, 1 skipped" in text
    assert "| steps: batch 2 | modules fp32 |" in text and "generator.down" not in text
    assert len(drawn) == 2 and all(f"docs/plots/{name}" in text for name in drawn)


def test_without_a_gpu_the_readme_says_so(record, tmp_path):
    (tmp_path / "cpu-bench.json").write_text(json.dumps(record))
    assert NO_GPU in render(records(tmp_path))[0]


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "x.json").write_text('{"facts": {}}')
    with pytest.raises(InputError, match=r"x\.json: neither"):
        records(tmp_path)


def test_readme_between_its_markers():
    text = f"# a\n{BEGIN}\nold\n{END}\nz\n"
    assert into_readme(text, "new") == f"# a\n{BEGIN}\nnew\n{END}\nz\n"
    assert into_readme(into_readme(text, "new"), "old") == text
    with pytest.raises(InputError, match="needs the lines"):
        into_readme("# a\n", "new")


def test_the_readme_is_what_the_committed_records_say():
    assert results.main(["--check"]) == 0


def test_records_are_taken_in_only_from_clean_commits(record, tmp_path):
    path, folder = tmp_path / "result.json", tmp_path / "results"
    given = copy.deepcopy(record)
    given["facts"]["commit"] = "0123456789-dirty"
    path.write_text(json.dumps(given))
    with pytest.raises(InputError, match="commit first"):
        add(path, folder)
    given["facts"]["commit"] = "0123456789"
    path.write_text(json.dumps(given))
    assert add(path, folder).name.endswith("-0123456789-bench.json")
    given["comparisons"][0]["status"] = "failed"
    path.write_text(json.dumps(given))
    with pytest.raises(InputError, match="failed"):
        add(path, folder)

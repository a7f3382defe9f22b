"""The gate: what is over, what is not, and a slow-down in a real run."""

from __future__ import annotations

import json

import pytest

from bench import gate, prove
from bench.comparison import PARTS, all_comparisons
from bench.devices import bench_setting
from bench.gate import Limits, judge, newest, rows_of, storage, table
from fastpix2pix.device import resolve_device

LIMITS = Limits.read()


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    """pytest-benchmark measures nothing in a process that it takes for one of several."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def row(median: float, low: float | None = None, high: float | None = None) -> dict:
    ratio = {"median": median, "low": low or median, "high": high or median}
    return {"what": "", "ratio": ratio, "ours_ms": median, "baseline_ms": 1.0, "floor_ms": None}


@pytest.mark.parametrize(
    ("now", "saved", "over"),
    [
        (row(1.2), None, False),
        (row(1.4), None, True),  # over thresholds.toml alone
        (row(1.4, low=1.25), None, False),  # not surely over
        (row(0.9), row(0.6), True),  # half as slow again as before, though under the limit
        (row(0.9, low=0.7), row(0.6), False),
        (row(0.9), row(0.6, high=0.8), False),  # the saved one was not sure either
        (row(0.7), row(0.6), False),
        (row(0.2), row(0.6), False),
        (row(1.4), row(1.39), True),  # a saved ratio does not excuse what is over the limit
    ],
)
def test_verdicts(now, saved, over):
    limits = Limits(1.2, 2, [{"what": "steps/*", "cpu": 1.3, "reason": "x"}])
    (verdict,) = judge({"steps/batch 1": now}, {"steps/batch 1": saved} if saved else {}, limits, "cpu")
    assert verdict.over == over
    assert ("OVER" in table({"steps/batch 1": now}, [verdict])) == over


def test_every_comparison_has_a_limit_and_every_limit_a_reason():
    at = bench_setting(resolve_device("cpu"), "short")
    for comparison in all_comparisons(at, PARTS):
        assert LIMITS.of(comparison.what, "cpu") is not None, comparison.what
    assert all(limit["reason"] for limit in LIMITS.rows)
    assert LIMITS.against_saved > 1 and LIMITS.retries >= 1
    assert LIMITS.of("nothing/at all", "cpu") is None


def test_the_newest_record_of_this_machine_is_the_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "STORAGE", tmp_path)
    folder = storage("cpu") / "Linux-CPython"
    folder.mkdir(parents=True)
    assert newest(storage("cpu")) == {} and storage("cpu").parent == tmp_path
    for number, ratio in ((1, 0.5), (2, 0.7)):
        content = {"benchmarks": [{"extra_info": row(ratio) | {"what": "steps/batch 1"}}, {"extra_info": {}}]}
        (folder / f"000{number}_saved.json").write_text(json.dumps(content))
    assert newest(storage("cpu"))["steps/batch 1"]["ratio"]["median"] == 0.7


class Suites:
    """run_suites with ratios to come, one list per call."""

    def __init__(self, *ratios: dict[str, float]) -> None:
        self.ratios, self.asked = list(ratios), []

    def __call__(self, only, plant, device, extra=()):
        self.asked.append(list(only))
        rows = self.ratios.pop(0)
        return {"benchmarks": [{"extra_info": row(ratio) | {"what": what}} for what, ratio in rows.items()]}


@pytest.mark.parametrize(
    ("ratios", "code"),
    [
        ([{"steps/a": 1.0, "steps/b": 1.0}], 0),
        ([{"steps/a": 9.0, "steps/b": 1.0}, {"steps/a": 1.0}], 0),  # a disturbance
        ([{"steps/a": 9.0, "steps/b": 1.0}, {"steps/a": 9.0}, {"steps/a": 1.0}], 0),
        ([{"steps/a": 9.0, "steps/b": 1.0}, {"steps/a": 9.0}, {"steps/a": 9.0}], 4),
    ],
)
def test_only_what_stays_over_fails(ratios, code, monkeypatch, tmp_path, capsys):
    suites = Suites(*ratios)
    monkeypatch.setattr(gate, "run_suites", suites)
    monkeypatch.setattr(gate, "STORAGE", tmp_path)
    assert gate.main(["compare", "--device", "cpu"]) == code
    assert suites.ratios == [] and all(asked == ["steps/a"] for asked in suites.asked[1:])
    assert ("SLOWER: steps/a" in capsys.readouterr().out) == (code == 4)


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--plant", "kernels/gan_loss *=10", "--retries", "0"], 4)])
def test_a_deliberately_slowed_kernel_is_caught(options, code, monkeypatch, tmp_path, capsys):
    """The suites for real, on one comparison: alone it passes, ten times as slow it does not."""
    monkeypatch.setattr(gate, "STORAGE", tmp_path)
    only = ["--only", "kernels/gan_loss *"]
    assert gate.main(["compare", "--device", "cpu", *only, *options]) == code
    out = capsys.readouterr().out
    assert "kernels/gan_loss 2x392, warm" in out and ("SLOWER: kernels/gan_loss" in out) == (code == 4)


def test_saving_keeps_a_record_that_compare_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gate, "STORAGE", tmp_path)
    assert gate.main(["save", "--device", "cpu", "--only", "kernels/l1_tanh_loss *, warm"]) == 0
    (found,) = newest(storage("cpu")).values()
    assert found["ours"] == "kernel" and found["rounds"] >= 9 and found["ratio"]["low"] > 0
    record = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert record["machine_info"]["facts"]["torch"] and rows_of(record).keys() == newest(storage("cpu")).keys()


def test_a_comparison_that_does_not_hold_fails_the_gate(monkeypatch, capsys):
    def broken(*_):
        raise gate.Failed("Mismatch: off by 3")

    monkeypatch.setattr(gate, "run_suites", broken)
    assert gate.main(["compare", "--device", "cpu"]) == 4
    assert "off by 3" in capsys.readouterr().err


def test_options(capsys):
    with pytest.raises(SystemExit) as stop:
        gate.main(["compare", "--plant", "kernels/adam"])
    assert stop.value.code == 2 and "give PATTERN=TIMES" in capsys.readouterr().err
    assert gate.main(["compare", "--device", "tpu"]) == 2
    assert gate.main(["compare", "--device", "cpu", "--only", "nothing/*"]) == 2
    assert "--only nothing/*: matches no comparison" in capsys.readouterr().err


@pytest.mark.parametrize(("caught", "code"), [(4, 0), (0, 4)])
def test_the_proof_wants_every_planted_run_to_fail_and_every_other_to_pass(caught, code, monkeypatch, capsys):
    asked = []

    def answer(arguments):
        asked.append(arguments)
        print("so it ended")
        return caught if "--plant" in arguments else 0

    monkeypatch.setattr(gate, "main", answer)
    assert prove.main(["--runs", "2", "--only", "kernels/*"]) == code
    assert [a[0] for a in asked] == ["save", *["compare"] * 4]
    assert f"{4 if code == 0 else 2} of 4 runs as they must be" in capsys.readouterr().out

"""The race between the two steps: what is right, what is faster, what is kept; the kernels in Triton's interpreter."""

import json
import signal
import sys
from dataclasses import replace

import pytest
import torch

from fastpix2pix.config import train_config
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.kernels.dispatch import interpreted
from fastpix2pix.training import race as racing
from fastpix2pix.training import step as stepping
from fastpix2pix.training.explicit_step import ExplicitStep
from fastpix2pix.training.loop import train
from fastpix2pix.training.race import BEGUN, explicit_wins, held, in_words, kept, race
from fastpix2pix.training.step import choose_step
from fastpix2pix.tuning.cache import PlanCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = torch.device("cuda")
LONGEST = 300.0  # seconds


@pytest.fixture
def config(small):
    return train_config(**small | {"device": DEVICE.type})


@pytest.fixture
def cache(tmp_path):
    return PlanCache(DEVICE, tmp_path / "plans")


@pytest.mark.parametrize(
    ("impl", "options"),
    [
        ("auto", {}),
        ("reference", {"precision": "bf16", "objective": "cgan"}),
        ("reference", {"pool": 2, "ema": 0.9, "batch": 1}),
    ],
    ids=str,
)
def test_both_are_timed_where_the_explicit_step_is_right(config, impl, options, monkeypatch):
    monkeypatch.setattr(racing, "_SAMPLE_S", 0.0)
    monkeypatch.setattr(racing, "_ENOUGH_S", 0.0)
    found = race(replace(config, **options), DEVICE, impl)
    assert set(found) == {"explicit", "modules"}
    assert all(isinstance(ms, float) and ms > 0 for ms in found.values()), found


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda step: step.lr.mul_(1.3), "wrong: "),
        (lambda step: step.lr.fill_(float("nan")), "wrong: "),
        (lambda step: 1 / 0, "ZeroDivisionError: "),
        (lambda step: (_ for _ in ()).throw(RuntimeError("Triton Error [CUDA]: out of memory")), "out of memory"),
    ],
    ids=["another rate", "not a number", "an error", "no memory"],
)
def test_what_is_wrong_is_not_timed(config, monkeypatch, fault, reason):
    right = ExplicitStep.body

    def body(self, x, y, number):
        if self.how.impl != "reference" and number:
            fault(self)
        return right(self, x, y, number)

    monkeypatch.setattr(ExplicitStep, "body", body)
    found = race(replace(config, lr=5e-3), DEVICE, "auto")
    assert set(found) == {"explicit"} and found["explicit"].startswith(reason)
    assert not explicit_wins(found)


def test_the_faster_one_wins():
    assert explicit_wins({"explicit": 1.0, "modules": 2.0})
    assert not explicit_wins({"explicit": 1.99, "modules": 2.0})
    assert not explicit_wins({"explicit": "wrong", "modules": 2.0})
    assert in_words({"explicit": 1.0, "modules": 2.0}).endswith("the explicit step takes 1.00 ms, modules 2.00 ms")
    assert in_words({"explicit": "wrong: x"}) == "step = auto: not the explicit one: wrong: x"


def printing(text: str, end: str = "") -> list[str]:
    """A process that begins, prints and ends so."""
    code = f"import os, sys; sys.stdin.read(); print({BEGUN!r}); print({text!r}, flush=True); {end}"
    return [sys.executable, "-c", code]


def test_what_was_found_is_kept(config, cache):
    found = {"explicit": 1.0, "modules": 2.0}
    assert held(config, DEVICE, 1, cache, printing("compiling\n" + json.dumps(found))) == found
    assert kept(config, DEVICE, cache) == found
    assert kept(replace(config, batch=3), DEVICE, cache) is None


def test_what_says_nothing_of_the_kernels_is_not_kept(config, cache):
    endless = [sys.executable, "-c", "import time; time.sleep(1000)"]
    assert held(config, DEVICE, 1e-3, cache, endless)["explicit"].startswith("time is up after 0.001 minutes")
    held(config, DEVICE, 1, cache, printing(json.dumps({"explicit": "out of memory"})))
    for code in (-signal.SIGKILL, -signal.SIGTERM):
        found = held(config, DEVICE, 1, cache, printing("", f"os.kill(os.getpid(), {-code})"))
        assert found["explicit"].startswith(f"its process ended with {code}")
    assert kept(config, DEVICE, cache) is None


@pytest.mark.parametrize("end", ["sys.exit(7)", "os.abort()"])
def test_a_process_that_is_brought_down_is_a_verdict(config, cache, end):
    code = -signal.SIGABRT if "abort" in end else 7
    assert held(config, DEVICE, 1, cache, printing("", end))["explicit"].startswith(f"its process ended with {code}")
    assert kept(config, DEVICE, cache)["explicit"].startswith(f"its process ended with {code}")


def test_a_process_that_never_began_is_none(config, cache):
    """As where a library is missing, or another process has the GPU."""
    command = [sys.executable, "-c", "import no_such_library"]
    with pytest.raises(EnvironmentFailed, match=r"ended with 1 before it began \(.*no_such_library.*run again"):
        held(config, DEVICE, 1, cache, command)
    assert kept(config, DEVICE, cache) is None


@pytest.mark.gpu
def test_auto_on_a_gpu_is_what_the_race_says(config, cache, monkeypatch):
    monkeypatch.setattr(racing, "PlanCache", lambda device: cache)
    step, (line,) = choose_step(replace(config, tune_minutes=LONGEST / 60), GPU, quiet=True)
    found = kept(config, GPU, cache)
    assert all(isinstance(found[name], float) for name in ("explicit", "modules")), found
    assert step == ("explicit" if explicit_wins(found) else "modules") and line == in_words(found)


def test_the_race_in_a_process_of_its_own(config, cache):
    """On a GPU or in the interpreter; without either Triton refuses, and says so."""
    found = held(replace(config, batch=1, objective="l1"), DEVICE, LONGEST / 60, cache)
    if DEVICE.type == "cuda" or interpreted:
        assert all(isinstance(found[name], float) for name in ("explicit", "modules")), found
    else:
        assert "own kernels need a CUDA GPU" in found["explicit"], found


@pytest.mark.parametrize(("explicit", "step"), [(1.0, "explicit"), (3.0, "modules"), ("wrong: x", "modules")])
def test_auto_is_what_was_found(config, monkeypatch, explicit, step):
    found = {"explicit": explicit, "modules": 2.0}
    monkeypatch.setattr(stepping, "environment_reasons", lambda kind: [])
    monkeypatch.setattr(racing, "kept", lambda config, device: None)
    monkeypatch.setattr(racing, "held", lambda config, device, minutes: found)
    assert choose_step(config, GPU, quiet=True) == (step, [in_words(found)])
    monkeypatch.setattr(racing, "kept", lambda config, device: {"explicit": "wrong: once"})
    assert choose_step(config, GPU, quiet=True) == ("modules", [in_words({"explicit": "wrong: once"})])
    assert choose_step(config, GPU, afresh=True, quiet=True) == (step, [in_words(found)])


def test_auto_where_nothing_is_measured(config, monkeypatch):
    def refuse(*rest):
        raise EnvironmentFailed("no space left")

    monkeypatch.setattr(racing, "held", refuse)
    monkeypatch.setattr(racing, "kept", lambda config, device: None)
    assert choose_step(config, torch.device("cpu")) == ("modules", [])
    monkeypatch.setattr(stepping, "environment_reasons", lambda kind: [])
    assert choose_step(config, GPU, processes=2) == ("modules", [])
    assert choose_step(config, GPU, resume=True) == ("modules", [])
    assert choose_step(replace(config, deterministic=True), GPU) == ("modules", [])
    assert choose_step(replace(config, step="explicit"), GPU) == ("explicit", [])
    step, (line,) = choose_step(replace(config, tune_minutes=0), GPU)
    assert step == "modules" and "nothing was measured" in line
    step, (line,) = choose_step(config, GPU, quiet=True)
    assert step == "modules" and "measuring failed (no space left)" in line


def test_a_run_keeps_the_step_it_began_with(tmp_path, pairs, small, monkeypatch):
    train(pairs, tmp_path / "run", **small, max_steps=2, quiet=True)
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["step"] == "modules"
    monkeypatch.setattr("fastpix2pix.training.loop.choose_step", lambda *rest, **options: ("explicit", ["measured"]))
    train(pairs, tmp_path / "other", **small, max_steps=2, quiet=True)
    assert json.loads((tmp_path / "other/config.json").read_text())["train"]["step"] == "explicit"
    monkeypatch.undo()
    assert train(pairs, tmp_path / "other", resume=True, max_steps=4, quiet=True).step == 4

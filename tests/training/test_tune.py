"""Measured choice of convolutions: the whole way with plain kernels, single sites with Triton's."""

import contextlib
import dataclasses
import io
import json
import signal
import sys
import threading
import time

import pytest
import torch

from fastpix2pix.config import train_config
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.kernels.dispatch import processors
from fastpix2pix.training import step as stepping
from fastpix2pix.training import trial_processes
from fastpix2pix.training import trials as trials_file
from fastpix2pix.training import tune as tuning
from fastpix2pix.training.plan_sites import sites_of
from fastpix2pix.training.plans import static_plans
from fastpix2pix.training.step import build_state, choose_convolutions
from fastpix2pix.training.trial_processes import process_count, verdicts
from fastpix2pix.training.trials import Trial, trials_of
from fastpix2pix.training.tune import Tuned, cached, tune
from fastpix2pix.tuning.cache import PlanCache
from fastpix2pix.tuning.measure import usable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = {
    **{"depth": 5, "ngf": 4, "ndf": 4, "n_layers": 1, "crop_size": 32, "batch": 1},
    **{"step": "explicit", "graph": "off", "precision": "fp32"},
}


@pytest.fixture
def config():
    return train_config(**OPTIONS)


@pytest.fixture
def cache(tmp_path):
    return PlanCache(DEVICE, tmp_path / "plans")


def test_everything_is_measured_kept_and_found_again(config, cache):
    counted = []
    found = tune(
        config, DEVICE, 5, impl="reference", cache=cache, count=lambda done, total: counted.append((done, total))
    )
    assert found.complete
    assert counted[-1][0] == counted[-1][1] == len(found.times)
    assert all(isinstance(t, float) for t in found.times.values()), found.times
    assert set(found.steps) == {"library", "static", "searched"}
    assert found.steps[found.winner] == min(found.steps.values())
    assert set(found.plans) == set(static_plans(config, processors(DEVICE)))
    assert cached(config, DEVICE, cache) == found
    assert found.summary().startswith(f"convolutions: {found.winner}, ")
    assert len(found.table()) == 3 * len(found.plans)


def test_a_second_call_goes_on_where_the_first_ended(config, cache, monkeypatch):
    first = tune(config, DEVICE, 0, impl="reference", cache=cache)
    assert not first.complete
    assert first.times == {}
    assert first.plans == {}
    assert "too little" in first.summary()
    measured = []
    real = trials_file.device_ms
    monkeypatch.setattr(trials_file, "device_ms", lambda run, device: measured.append(run) or real(run, device))
    second = tune(config, DEVICE, 5, impl="reference", cache=cache)
    assert len(measured) == len(second.times)
    assert tune(config, DEVICE, 5, impl="reference", cache=cache).times == second.times
    assert len(measured) == len(second.times)  # nothing was left
    tune(config, DEVICE, 5, impl="reference", cache=cache, afresh=True)
    assert len(measured) == 2 * len(second.times)


def test_another_batch_is_another_subject(config, cache):
    tune(config, DEVICE, 0, impl="reference", cache=cache)
    assert cached(config, DEVICE, cache) is not None
    assert cached(dataclasses.replace(config, batch=2), DEVICE, cache) is None
    assert cached(dataclasses.replace(config, epochs=7), DEVICE, cache) is not None


def test_a_plan_that_fails_is_not_timed(config, cache, monkeypatch):
    monkeypatch.setattr(Trial, "_error", lambda trial: "y is off by 3 times the allowed error")
    found = tune(config, DEVICE, 5, impl="reference", cache=cache)
    failed = [name for name, t in found.times.items() if isinstance(t, str)]
    assert all(("library" in name) == (name not in failed) for name in found.times)
    assert not any(plan for plans in found.plans.values() for plan in plans[:2])  # of wgrad, some are never taken


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("Triton Error [CUDA]: out of memory")], ids=repr
)
def test_a_plan_for_which_there_was_no_memory_is_tried_again(config, cache, monkeypatch, error):
    def full(trial):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Trial, "_error", full)
        first = tune(config, DEVICE, 5, impl="reference", cache=cache)
    assert not first.complete
    assert first.times and all("library" in name for name in first.times)
    assert tune(config, DEVICE, 5, impl="reference", cache=cache).complete


def test_a_whole_step_for_which_there_was_no_memory_is_tried_again(config, cache, monkeypatch):
    def full(*rest):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_step_ms", full)
        assert not tune(config, DEVICE, 5, impl="reference", cache=cache).complete
    assert tune(config, DEVICE, 5, impl="reference", cache=cache).complete


def test_a_plan_that_breaks_the_device_takes_no_other_with_it(config, cache, monkeypatch):
    measured, real = [], Trial.ms

    def ms(trial, device):
        measured.append(trial.name)
        return real(trial, device) if len(measured) < 4 else "AcceleratorError: an illegal memory access"

    with monkeypatch.context() as patch:
        patch.setattr(Trial, "ms", ms)
        patch.setattr(tuning, "usable", lambda device: False)
        with pytest.raises(EnvironmentFailed, match=r"cannot be used any more .* an illegal memory access.*run again"):
            tune(config, DEVICE, 5, impl="reference", cache=cache)
    first = cached(config, DEVICE, cache)
    assert list(first.times) == measured and not first.complete
    assert [isinstance(t, float) for t in first.times.values()] == [True, True, True, False]
    second = tune(config, DEVICE, 5, impl="reference", cache=cache)
    assert second.complete and second.times.items() >= first.times.items()


def test_a_step_that_breaks_the_device_is_not_tried_again(config, cache, monkeypatch):
    steps = iter([2.0, RuntimeError("an illegal memory access")])

    def step(*rest):
        if isinstance(ms := next(steps), float):
            return ms
        raise ms

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_step_ms", step)
        patch.setattr(tuning, "usable", lambda device: False)
        with pytest.raises(EnvironmentFailed, match=r"after a whole step \(static: .*run again"):
            tune(config, DEVICE, 5, impl="reference", cache=cache)
    found = cached(config, DEVICE, cache)
    assert found.complete and found.winner == "library" and list(found.steps) == ["library", "static"]


def test_an_interrupt_leaves_what_was_measured(config, cache):
    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    for number in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            tune(config, DEVICE, 5, impl="reference", cache=cache, count=interrupt)
        assert len(cached(config, DEVICE, cache).times) == 3 * number


def test_a_device_is_usable_until_cuda_says_no(monkeypatch):
    def refuse(error):
        monkeypatch.setattr(torch, "rand", lambda *rest, **options: (_ for _ in ()).throw(error))

    assert usable(DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refuse(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert not usable(torch.device("cuda"))
    refuse(torch.OutOfMemoryError("full"))  # others have it
    assert usable(torch.device("cuda"))


SITES = [
    ("down.1.conv.weight", 1, "dgrad"), ("up.3.conv.weight", 1, "forward"), ("up.3.conv.weight", 1, "wgrad"),
    ("blocks.1.conv.weight", 2, "forward"),
]  # fmt: skip


@pytest.mark.parametrize("site", SITES, ids=lambda s: f"{s[0]} {s[2]}")
def test_candidates_are_right_and_timed(config, site):
    """Every form of a product where it stands, by Triton."""
    weight, images, product = site
    every = trials_of(sites_of(config, DEVICE, "fp32", "triton")).values()
    trials = [t for t in every if t.site.key == (weight, images) and t.product == product]
    assert trials[0].plan is None
    for trial in [trials[0], trials[-1]]:
        assert trial.verdict() == "", trial.name
        assert isinstance(trial.ms(DEVICE), float), trial.name


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_one_pair_is_not_an_instance_norm(norm):
    """Joined, the discriminator sees two images in two groups; on large maps its blocks read what others left raw."""
    config = train_config(**OPTIONS | {"norm": norm, "crop_size": 256, "n_layers": 3, "depth": 8})
    trials = trials_of(sites_of(config, DEVICE, "fp32", "reference")).values()
    forward = [t for t in trials if t.product == "forward" and t.site.key[0].startswith("blocks.")]
    assert any(t.own and t.raw and t.site.key == ("blocks.2.conv.weight", 2) for t in forward)
    assert {t.name: t.verdict() for t in forward} == {t.name: "" for t in forward}


def test_trials_are_judged_in_processes(config):
    """The real process, with plain kernels; the share of each is asked of it alone."""
    names = list(trials_of(sites_of(config, DEVICE, "fp32", "reference")))[:7]
    assert verdicts(config, DEVICE, "reference", names, 2, 600) == dict.fromkeys(names, "")


FALLS = """
import json, os, sys
for name in json.load(sys.stdin)["names"]:
    print("try", name, flush=True)
    if name == "b":
        os._exit(9)
    print("is", {"a": "out of memory", "c": "wrong"}.get(name, ""), flush=True)
    if name == "d":
        import time; time.sleep(10**6)
"""


def test_a_process_that_falls_or_hangs_takes_one_trial_with_it(config):
    found = verdicts(config, DEVICE, "triton", ["a", "b", "c", "d", "e"], 1, 10, command=[sys.executable, "-c", FALLS])
    assert found == {"b": "its process ended with 9", "c": "wrong", "d": ""}


def test_a_process_that_the_system_ends_is_no_verdict(config):
    """As it does where memory runs out."""
    killed = (
        "import os, signal, sys; sys.stdin.read(); print('try a', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert verdicts(config, DEVICE, "triton", ["a", "b"], 1, 60, command=[sys.executable, "-c", killed]) == {}


def test_an_interrupt_ends_the_processes(config, tmp_path):
    """And does not wait for the end of their time."""
    begun, limit = tmp_path / "begun", 120
    sleeps = f"import pathlib, sys, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(3600)"

    def interrupt() -> None:
        while not begun.exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    start = time.monotonic()
    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        verdicts(config, DEVICE, "triton", ["a", "b"], 1, limit, command=[sys.executable, "-c", sleeps])
    watcher.join()
    assert time.monotonic() - start < limit


def test_names_without_end_do_not_block_on_a_process_that_ends(config):
    names = [f"{number:05} {'x' * 100}" for number in range(2000)]  # more than a pipe holds
    assert verdicts(config, DEVICE, "triton", names, 1, 60, command=[sys.executable, "-c", "1 / 0"]) == {}


def test_a_process_ends_after_a_trial_that_broke_the_device(config, monkeypatch, capsys):
    given = {"config": dataclasses.asdict(config), "names": ["a", "b", "c"]}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(given)))
    results = [("a", None), ("a", ""), ("b", None), ("b", "illegal memory access"), ("c", None)]
    monkeypatch.setattr(tuning, "try_trials", lambda *rest: iter(results))
    monkeypatch.setattr(trial_processes, "usable", lambda device: False)
    with pytest.raises(SystemExit):
        trial_processes.main("cpu", "triton")
    assert capsys.readouterr().out == "try a\nis \ntry b\nis illegal memory access\n"


def test_a_process_gives_memory_back_after_each_trial(config, monkeypatch):
    given = {"config": dataclasses.asdict(config), "names": ["a", "b"]}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(given)))
    results, freed = [("a", None), ("a", ""), ("b", None), ("b", "wrong")], []
    monkeypatch.setattr(tuning, "try_trials", lambda *rest: iter(results))
    monkeypatch.setattr(trial_processes, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(trial_processes, "usable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    trial_processes.main("cuda", "triton")
    assert len(freed) == 2


@pytest.mark.parametrize(
    ("sites", "free", "cpus", "processes"),
    [
        (6, 73, 64, 5),  # the paper's networks at batch 64 on a card of 80 GB
        (1, 78, 64, 8),
        (1, 78, 4, 2),
        (6, 5, 64, 1),
    ],
)
def test_as_many_processes_as_there_is_memory_for(monkeypatch, sites, free, cpus, processes):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: sites * 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 10**9, 80 * 10**9))
    monkeypatch.setattr(trial_processes.os, "cpu_count", lambda: cpus)
    assert process_count(torch.device("cuda")) == processes
    assert process_count(torch.device("cpu")) == 1


def test_a_process_that_cannot_start_judges_nothing(config):
    assert verdicts(config, DEVICE, "triton", ["a", "b"], 2, 30, command=[sys.executable, "-c", "1 / 0"]) == {}


def test_the_librarys_plans_train_as_the_state_without_plans(config):
    """Plans given are what runs."""
    own = build_state(dataclasses.replace(config, convolutions="own"), DEVICE)
    assert own.how.plans == static_plans(config, processors(DEVICE))
    assert build_state(config, DEVICE).how.plans == {}


def test_choice_on_a_cpu_is_the_library(config):
    if DEVICE.type == "cuda":
        pytest.skip("would measure")
    assert choose_convolutions(config, DEVICE) == (None, ["convolutions: the library's"])
    own = dataclasses.replace(config, convolutions="own")
    assert choose_convolutions(own, DEVICE) == (None, ["convolutions: own, as asked for"])
    assert choose_convolutions(train_config(), DEVICE) == (None, [])


@pytest.mark.parametrize("error", [EnvironmentFailed("no space left"), torch.OutOfMemoryError("no memory left")])
def test_training_goes_on_where_measuring_fails(config, monkeypatch, error):
    def fail(*rest, **options):
        raise error

    monkeypatch.setattr(tuning, "cached", lambda config, device: None)
    monkeypatch.setattr(tuning, "tune", fail)
    plans, said = choose_convolutions(config, torch.device("cuda"), quiet=True)
    assert plans is None
    assert said == [f"convolutions: the library's; measuring failed ({error})"]
    monkeypatch.setattr(stepping, "usable", lambda device: False)
    with pytest.raises(type(error)):  # but not in a process that has lost its GPU
        choose_convolutions(config, torch.device("cuda"), quiet=True)


def test_refusals(config, cache, monkeypatch):
    with pytest.raises(InputError, match="convolutions = own: chooses"):
        train_config(convolutions="own")
    monkeypatch.setattr(tuning, "environment_reasons", lambda kind: ["triton is not installed"])
    with pytest.raises(EnvironmentFailed, match="triton is not installed"):
        tune(config, DEVICE, 1, cache=cache)


def test_records_survive_json(config):
    plans = static_plans(config, processors(DEVICE))
    tuned = Tuned(plans, {"a": 1.0, "b": "failed"}, {"library": 2.0}, "library", False)
    assert Tuned.from_dict(tuned.as_dict()) == tuned

"""Whole runs: what they leave, exact resume, kill -9, Ctrl-C, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpix2pix.cli import main
from fastpix2pix.data.pairs import find_pairs, hold_out, read_pair
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.evaluation import evaluate
from fastpix2pix.model.load import load_generator
from fastpix2pix.training import checkpoint, loop, validation
from fastpix2pix.training.loop import train
from fastpix2pix.training.processes import Group
from fastpix2pix.training.report import read_metrics


def tensors_of(run) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    folder = checkpoint.newest(run)
    return {f"{f.name}/{k}": t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert a
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_run_leaves_everything_a_person_looks_for(tmp_path, pairs, small):
    small["tensorboard"] = True
    result = train(pairs, tmp_path / "run", **small, epochs=4, validate_epochs=2, quiet=True)
    run = tmp_path / "run"
    assert (result.step, result.epochs, result.stopped) == (10, 4, "done")
    assert set(result.validation) == {"image+off", "running+off", "image+random", "running+random"}
    assert checkpoint.newest(run).name == "00000010"
    assert {"config.json", "metrics.jsonl", "best.safetensors", "index.html", "curves.png"} <= {
        p.name for p in run.iterdir()
    }
    assert any(p.name.startswith("events") for p in run.iterdir())
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["00000005.png", "00000010.png"]
    net, record = load_generator(run)
    assert str(net.modes) == result.best["modes"]
    assert record["modes"] == dict(zip(("norm_stats", "noise"), result.best["modes"].split("+"), strict=True))
    assert (record["direction"], record["size"], record["step"]) == ("AtoB", 32, result.best["step"])
    lines = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in lines if "loss" in r] == [3, 6, 9, 10]
    assert all(r["speed"]["img_per_s"] > 0 and r["speed"]["load_ms"] >= 0 for r in lines if "loss" in r)


def test_best_is_the_best_and_not_the_last(tmp_path, pairs, small):
    result = train(pairs, tmp_path / "run", **small, epochs=6, validate_epochs=1, lr=0.05, quiet=True)
    checks = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation" in r]
    lowest = min((row["l1"], r["step"]) for r in checks for row in r["validation"].values())
    assert (result.best["value"], result.best["step"]) == lowest
    assert load_generator(tmp_path / "run")[1]["step"] == lowest[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": 2, "ema": 0.9},
        {"precision": "bf16"},
        {"precision": "fp16", "objective": "l1+gan"},
        {"objective": "l1", "batch": 4},  # 5 pairs: batches straddle epochs
        {"norm": "instance", "gan_loss": "lsgan"},
        {"workers": 2},
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, pairs, small, options):
    small |= {"epochs": 5, "quiet": True, "keep_checkpoints": 1} | options
    train(pairs, tmp_path / "whole", **small)
    train(pairs, tmp_path / "parts", **small, max_steps=2)
    train(pairs, tmp_path / "parts", resume=True, quiet=True, max_steps=5)
    train(pairs, tmp_path / "parts", resume=True, quiet=True, max_steps=0)
    assert_equal(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts"))
    whole, parts = (losses_of(tmp_path / run) for run in ("whole", "parts"))
    # the stops at steps 2 and 5 end an interval of the log there; the kill below does not
    assert {s: v for s, v in whole.items() if s > 6} == {s: v for s, v in parts.items() if s > 6}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"step": "explicit", "graph": "on", "up": "resize", "ema": 0.9}])
def test_a_run_on_a_gpu_is_stopped_and_resumed(tmp_path, monkeypatch, pairs, small, options):
    """Loading processes, measured convolutions, the captured step, validation and checkpoints, all in one."""
    monkeypatch.setenv("FASTPIX2PIX_CACHE", str(tmp_path / "cache"))
    small |= {"device": "cuda", "loader": "torch", "workers": 2, "tune_minutes": 0.2, "epochs": 4, "quiet": True}
    run = tmp_path / "run"
    train(pairs, run, **small | options, validate_epochs=1, max_steps=6)
    result = train(pairs, run, resume=True, quiet=True, max_steps=0)
    assert (result.step, result.stopped) == (10, "done")
    assert set(losses_of(run)) >= {3, 6, 9, 10}
    assert np.isfinite([*losses_of(run)[10].values(), result.best["value"]]).all()
    assert all(t.isfinite().all() for t in tensors_of(run).values() if t.is_floating_point())


def losses_of(run) -> dict[int, dict[str, float]]:
    return {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r}


def start(pairs, run, small: dict, *options: str) -> subprocess.Popen:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in small.items() if k != "tensorboard"]
    command = [
        sys.executable,
        "-m",
        "fastpix2pix.cli",
        "train",
        str(pairs),
        "--out",
        str(run),
        *flags,
        "--no-tensorboard",
        *options,
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_with_sigkill_and_resumed_equals_uninterrupted(tmp_path, pairs, small):
    run = tmp_path / "killed"
    train(pairs, tmp_path / "whole", **small, epochs=60, quiet=True, checkpoint_steps=7, validate_epochs=20)
    process = start(pairs, run, small, "--epochs=60", "--checkpoint-steps=7", "--validate-epochs=20")
    wait_for(lambda: checkpoint.newest(run) is not None, process)
    process.kill()
    process.wait()
    assert int(checkpoint.newest(run).name) < 150
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99')  # as a kill in the middle of a write leaves it
    result = train(pairs, run, resume=True, quiet=True)
    assert result.step == 150
    assert_equal(tensors_of(tmp_path / "whole"), tensors_of(run))
    best = [load_file(tmp_path / name / "best.safetensors") for name in ("whole", "killed")]
    assert_equal(*best)
    assert losses_of(tmp_path / "whole") == losses_of(run)
    steps = [r["step"] for r in read_metrics(run / "metrics.jsonl")]
    assert steps == sorted(steps)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_a_complete_checkpoint(tmp_path, pairs, small, number, code):
    run = tmp_path / "run"
    process = start(pairs, run, small | {"workers": 1}, "--epochs=100000")
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0, process)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
    assert number.name in err
    step = int(checkpoint.newest(run).name)
    assert train(pairs, run, resume=True, quiet=True, max_steps=step + 2).step == step + 2


def test_time_limit_ends_with_validation_and_checkpoint(tmp_path, pairs, small):
    result = train(pairs, tmp_path / "run", **small, epochs=100000, max_minutes=0.02, quiet=True)
    assert result.stopped == "time"
    assert result.validation
    assert int(checkpoint.newest(tmp_path / "run").name) == result.step


def test_resuming_a_finished_run_changes_nothing_and_says_so(tmp_path, pairs, small, capsys):
    first = train(pairs, tmp_path / "run", **small, epochs=2, quiet=True)
    before = (tmp_path / "run" / "best.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    again = train(pairs, tmp_path / "run", resume=True)
    assert "nothing is left to do" in capsys.readouterr().err
    assert (again.step, again.best, again.validation) == (first.step, first.best, first.validation)
    assert (tmp_path / "run" / "best.safetensors").stat().st_mtime_ns == before


def test_a_run_of_a_version_with_fewer_options_goes_on(tmp_path, pairs, small):
    train(pairs, tmp_path / "run", **small, max_steps=2, quiet=True)
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    del record["train"]["convolutions"], record["train"]["tune_minutes"]
    path.write_text(json.dumps(record))
    assert train(pairs, tmp_path / "run", resume=True, quiet=True, max_steps=3).step == 3


def test_resuming_with_nothing_left_to_do_in_the_middle_of_an_interval(tmp_path, pairs, small):
    train(pairs, tmp_path / "run", **small, epochs=4, checkpoint_steps=4, max_steps=5, quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000005")
    result = train(pairs, tmp_path / "run", resume=True, quiet=True, max_steps=4)
    assert result.step == 4


def test_without_validation_pairs_the_newest_checkpoint_is_the_model(tmp_path, pairs, small):
    result = train(pairs / "train", tmp_path / "run", **small, epochs=1, quiet=True)
    assert result.validation is None
    assert not (tmp_path / "run" / "best.safetensors").exists()
    assert "modes" not in load_generator(tmp_path / "run")[1]


def test_file_names_need_not_be_utf_8(tmp_path, pairs, small):
    data, run = tmp_path / "data", tmp_path / "run"
    for path in pairs.glob("*/*.png"):
        target = data / path.parent.name / os.fsdecode(b"x\xff" + path.name.encode())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    train(data, run, **small, max_steps=1, quiet=True)
    assert train(data, run, resume=True, max_steps=2, quiet=True).step == 2
    assert {one.name for one in evaluate(run, data, device="cpu").per_image} == {f"x\udcff{i}" for i in range(3)}


def test_holdout_takes_pairs_out_of_training(tmp_path, pairs, small):
    train(pairs / "train", tmp_path / "run", **small, epochs=1, holdout=2, quiet=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["pairs"] == 3


def test_pairs_held_out_are_evaluated(tmp_path, pairs, small):
    run, data = tmp_path / "run", pairs / "train"
    result = train(data, run, **small, epochs=1, holdout=2, seed=3, quiet=True)
    found = evaluate(run / "best.safetensors", data, split="holdout", device="cpu")
    assert evaluate(run, data, split="holdout", device="cpu") == found
    held = hold_out(find_pairs(data, "train"), 2, 3)[1]
    assert [one.name for one in found.per_image] == [pair.name for pair in held]
    assert result.validation is not None
    validated = result.validation[f"{found.modes.norm_stats}+{found.modes.noise}"]
    assert found.l1 == pytest.approx(validated["l1"], rel=1e-5)

    train(data, tmp_path / "all", **small, epochs=1, quiet=True)
    with pytest.raises(InputError, match=r"split = holdout: .*all does not say what pairs"):
        evaluate(tmp_path / "all", data, split="holdout", device="cpu")


def test_holdout_beside_a_val_folder_is_refused(tmp_path, pairs, small):
    with pytest.raises(InputError, match=r"holdout = 2: .* has validation pairs of its own"):
        train(pairs, tmp_path / "run", **small, holdout=2, quiet=True)


def test_refuses_an_existing_run_and_leaves_it_alone(tmp_path, pairs, small):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--resume"):
        train(pairs, tmp_path, **small, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_broken_image_is_named_before_anything_is_written(tmp_path, pairs, small):
    data = tmp_path / "data"
    data.mkdir()
    for path in (pairs / "train").iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:100])
    with pytest.raises(InputError, match=r"3\.png"):
        train(data, tmp_path / "run", **small, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ngf": 8}, r"ngf \(was 4, now 8\)"),
        ({"batch": 1, "seed": 5}, r"batch \(was 2, now 1\), seed"),
        ({"epoch": 5}, "did you mean epochs"),
    ],
)
def test_resume_refuses_what_would_be_another_run(tmp_path, pairs, small, change, match):
    train(pairs, tmp_path / "run", **small, epochs=1, quiet=True)
    with pytest.raises(InputError, match=match):
        train(pairs, tmp_path / "run", resume=True, quiet=True, **change)


def test_resume_refuses_other_pairs_and_other_folders(tmp_path, pairs, small):
    train(pairs, tmp_path / "run", **small, epochs=1, quiet=True)
    with pytest.raises(InputError, match="the 3 pairs there are not the 5"):
        train(pairs / "val", tmp_path / "run", resume=True, quiet=True)
    with pytest.raises(InputError, match=r"no config\.json"):
        train(pairs, tmp_path / "elsewhere", resume=True, quiet=True)


def test_exploding_run_stops_and_keeps_no_broken_weights(tmp_path, pairs, small):
    with pytest.raises(EnvironmentFailed, match="not finite"):
        train(pairs, tmp_path / "run", **small, epochs=50, lr=1e30, quiet=True)
    assert checkpoint.newest(tmp_path / "run") is None
    with pytest.raises(InputError, match="add --resume to continue it"):
        train(pairs, tmp_path / "run", **small, quiet=True)
    assert train(pairs, tmp_path / "run", resume=True, quiet=True, lr=2e-4, max_steps=2).step == 2


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, pairs, small, resume, capsys):
    train(pairs, tmp_path / "model", **small, max_steps=1, seed=5, quiet=True)
    small |= {"init": str(tmp_path / "model"), "epochs": 2}
    train(pairs, tmp_path / "whole", **small, quiet=True)
    train(pairs, tmp_path / "run", **small | {"log_steps": 1, "epochs": 1}, quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / ".00000001.tmp-17-140011").mkdir(parents=True)
    train(pairs, tmp_path / "run", resume=resume, log_steps=3, epochs=2)
    said = capsys.readouterr().err
    assert "no checkpoint yet: from the beginning" in said
    assert f"generator: starts from {tmp_path / 'model'}" in said
    assert_equal(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "run"))
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000005"]


def test_one_call_begins_a_run_and_goes_on_with_it(tmp_path, pairs, small, capsys):
    run, again = tmp_path / "run", small | {"resume": "auto", "keep_checkpoints": 1}
    assert train(pairs, run, **again, max_steps=2).step == 2
    assert f"auto-resume: no run yet in {run}" in capsys.readouterr().err
    assert train(pairs, run, **again, max_steps=4).step == 4
    said = capsys.readouterr().err
    assert f"auto-resume: goes on with the run in {run}" in said
    assert "steps 2 to 4" in said
    train(pairs, tmp_path / "whole", **small, max_steps=2, quiet=True)
    train(pairs, tmp_path / "whole", resume=True, max_steps=4, quiet=True)
    assert_equal(tensors_of(tmp_path / "whole"), tensors_of(run))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(InputError, match="mine exists and is not an empty folder"):
        train(pairs, tmp_path / "mine", **again)
    with pytest.raises(InputError, match="resume = 'sometimes': allowed are True, False and 'auto'"):
        train(pairs, tmp_path / "other", resume="sometimes")


def test_one_command_line_begins_a_run_and_goes_on_with_it(tmp_path, pairs, small, capsys):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in small.items() if k not in ("tensorboard", "ngf")]
    command = ["train", str(pairs), "--out", str(tmp_path / "run"), "--no-tensorboard", "--auto-resume", *flags]
    assert main([*command, "--ngf=4", "--max-steps=1"]) == 0
    assert main([*command, "--max-steps=2"]) == 0  # with the recorded ngf
    assert int(checkpoint.newest(tmp_path / "run").name) == 2
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    assert "error: --resume and --auto-resume: give one" in capsys.readouterr().err


def test_a_precision_that_changes_with_the_device_is_said(tmp_path, pairs, small, monkeypatch, capsys):
    train(pairs, tmp_path / "run", **small, max_steps=2, quiet=True)  # precision = auto: fp32 on a CPU
    monkeypatch.setattr("fastpix2pix.training.state.resolve_precision", lambda *_: "fp16")
    assert train(pairs, tmp_path / "run", resume=True, max_steps=3).step == 3
    said = capsys.readouterr().err
    assert "changed on resume: precision fp32 -> fp16; the loss scale begins anew" in said
    assert train(pairs, tmp_path / "run", resume=True, max_steps=4).step == 4
    assert "precision fp" not in capsys.readouterr().err


def signal_in_validation(monkeypatch) -> None:
    """SIGTERM as soon as the first validation has begun."""
    evaluated = validation.evaluate_network

    def begins(*given):
        monkeypatch.setattr(validation, "evaluate_network", evaluated)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluated(*given)

    monkeypatch.setattr(validation, "evaluate_network", begins)


@pytest.mark.parametrize("last", [False, True], ids=["between epochs", "at the end"])
def test_a_signal_ends_a_validation_and_the_run_is_saved(tmp_path, pairs, small, monkeypatch, last):
    run, options = tmp_path / "run", small | {"epochs": 4, "validate_epochs": 0 if last else 2, "quiet": True}
    train(pairs, tmp_path / "whole", **options)
    signal_in_validation(monkeypatch)
    result = train(pairs, run, **options)
    assert (result.stopped, result.step) == ("SIGTERM", 10 if last else 5)
    assert (result.validation, result.best) == (None, None)
    assert int(checkpoint.newest(run).name) == result.step
    assert not [r for r in read_metrics(run / "metrics.jsonl") if "validation" in r]
    assert not (run / "best.safetensors").exists() and not (run / "samples").exists()
    again = train(pairs, run, resume=True, quiet=True)
    assert (again.stopped, again.step) == ("done", 10)
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "validation" in r] == [10]
    assert_equal(tensors_of(tmp_path / "whole"), tensors_of(run))


def test_steps_longer_than_an_epoch_miss_no_validation(tmp_path, pairs, small):
    train(pairs, tmp_path / "run", **small | {"batch": 12}, epochs=14, validate_epochs=5, quiet=True)
    validated = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation" in r]
    assert [(r["step"], r["epoch"]) for r in validated] == [(3, 7), (5, 12), (6, 14)]


def test_each_process_checks_its_share_of_the_files(tmp_path, pairs, small, monkeypatch):
    shares = []

    def stop(pairs, **_):
        shares.append([pair.name for pair in pairs])
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "check_files", stop)
    for rank in range(2):
        group = nullcontext((Group(rank=rank, size=2), torch.device("cpu")))
        monkeypatch.setattr(loop, "joined", lambda _, group=group: group)
        with pytest.raises(ZeroDivisionError):
            train(pairs, tmp_path / "run", **small, quiet=True)
    assert shares == [["0", "2", "4", "1"], ["1", "3", "0", "2"]]  # 5 to train, then 3 to validate


def test_file_in_the_way_of_the_run_folder_is_named(tmp_path, pairs, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is in the way"):
        train(pairs, tmp_path / "file" / "run", **small, quiet=True)


def test_real_pairs_are_learned_better_than_grey(tmp_path, facades, small):
    """160 small steps on real files."""
    small |= {"crop_size": 64, "depth": 6, "ngf": 8, "batch": 1, "objective": "l1", "lr": 2e-3}
    data = tmp_path / "facades"
    for split, count in (("train", 40), ("val", 8)):
        (data / split).mkdir(parents=True)
        for path in sorted((facades / split).iterdir())[:count]:
            (data / split / path.name).symlink_to(path)
    grey = [np.abs(read_pair(p, "BtoA", 3, 3)[1] / 255 - 0.5).mean() for p in find_pairs(data, "val")]
    result = train(data, tmp_path / "run", **small, direction="BtoA", epochs=4, quiet=True)
    assert result.validation["image+off"]["l1"] < 0.85 * np.mean(grey)

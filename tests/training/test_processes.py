"""Several processes on the CPU: what they compute together, resume, stopping, errors; one run through torchrun."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

from fastpix2pix.config import train_config
from fastpix2pix.data.batches import Feed
from fastpix2pix.data.check import default_threads
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.training import checkpoint, processes
from fastpix2pix.training.loop import train
from fastpix2pix.training.losses import gan_loss, seen_by_discriminator
from fastpix2pix.training.pool import ImagePool
from fastpix2pix.training.processes import ALONE, Agreement, Group, joined, own_device
from fastpix2pix.training.report import read_metrics
from fastpix2pix.training.step import build_state
from tests.training.process_worker import LR, batches

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LONGEST = 300.0  # seconds that a slow machine may take; what hangs is ended then
STEP = {"depth": 5, "ngf": 4, "ndf": 4, "crop_size": 32, "n_layers": 1}


class Two:
    """Two processes that stay for all tests here: importing torch takes longer than what they do."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has it
        shared = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("process_worker.py"))],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        assert self.end() == ["ready"] * 2

    def begin(self, do: str, *given: dict) -> None:
        """Start a task, with the arguments of each process, or the same for both."""
        for process, own in zip(self.processes, given if len(given) == 2 else given * 2, strict=True):
            process.stdin.write(json.dumps({"do": do, "given": own}) + "\n")
            process.stdin.flush()

    def end(self) -> list:
        """The answers; an error where one of them hangs."""
        alarm = threading.Timer(LONGEST, self.close)
        alarm.start()
        try:
            return [json.loads(process.stdout.readline()) for process in self.processes]
        finally:
            alarm.cancel()

    def __call__(self, do: str, *given: dict) -> list[dict]:
        self.begin(do, *given)
        return self.end()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    started = Two()
    yield started
    started.close()


def saved(out: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(f"{out}{rank}.pt") for rank in range(2)]


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize(("pairs", "batch", "size"), [(5, 1, 2), (7, 3, 2), (11, 2, 4), (3, 4, 3)])
def test_batches_of_all_processes_are_the_batch_of_one(pairs, batch, size):
    def items(batch: int, rank: int, size: int) -> list[list]:
        feed = Feed(
            pairs=range(pairs), data=train_config().data, in_channels=3, out_channels=3, batch=batch, seed=3,
            start=2, stop=9, device=CPU, rank=rank, processes=size,
        )  # fmt: skip
        all_of = [feed.item(p) for lo, hi in feed.chunks() for p in range(lo, hi)]
        return [all_of[i : i + batch] for i in range(0, len(all_of), batch)]

    slices = zip(*(items(batch, rank, size) for rank in range(size)), strict=True)
    assert [[item for part in parts for item in part] for parts in slices] == items(size * batch, 0, 1)


def test_error_in_one_process_ends_both_and_is_told_once(tmp_path, two, pairs, small):
    """The first test of the two: what is imported during their first run must not keep its connections open."""
    data = tmp_path / "data"
    data.mkdir()
    for path in (pairs / "train").iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:100])
    options = small | {"data": str(data), "out": str(tmp_path / "run"), "batch": 1, "check_data": False}
    answers = two("train", options)
    (told,) = [answer for answer in answers if answer["error"] != "SystemExit"]
    assert told["error"] == "InputError"
    assert "3.png" in told["text"]
    (data / "2.png").write_bytes((data / "2.png").read_bytes()[:100])
    answers = two("train", options | {"out": str(tmp_path / "other"), "check_data": True})  # each finds one of them
    assert answers[0]["error"] == "InputError"
    assert re.search(r"^2 broken pairs: .*2\.png: .*; .*3\.png: ", answers[0]["text"])
    assert answers[1] == {"error": "SystemExit", "text": "3"}
    answers = two("train", options | {"out": str(tmp_path / "long"), "tune_minutes": 60})
    (told,) = [answer for answer in answers if answer["error"] != "SystemExit"]
    assert told["error"] == "InputError" and told["text"].startswith("tune_minutes = 60: ")


@pytest.mark.parametrize("options", [{"step": "modules", "dropout": "none"}, {"step": "explicit", "impl": "reference"}])
def test_two_processes_with_half_a_batch_each_are_one_with_all_of_it(tmp_path, two, options):
    """Explicit: with dropout too, whose masks follow the number of the image."""
    options = STEP | options | {"norm": "instance"}
    answers = two("steps", {"options": options | {"batch": 1}, "count": 5, "out": str(tmp_path / "two")})
    alone = build_state(train_config(**options, batch=2), CPU)
    expected = [alone.step(x, y, n, LR).tolist() for n, (x, y) in enumerate(batches(5, 2))]
    both = torch.tensor([answer["losses"] for answer in answers])
    torch.testing.assert_close(both.mean(0), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert_moments(saved(tmp_path / "two"), alone.tensors())


def assert_moments(found: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    """Both processes have the same bits, and the first moments expected: the gradients, as Adam averages them."""
    assert_same(*found)
    for net in ("adam_g", "adam_d"):
        moments = {k: m for k, m in expected.items() if k.startswith(net) and k.endswith("exp_avg")}
        whole = torch.stack([m.norm() for m in moments.values()]).norm()
        for name, moment in moments.items():  # of a bias before a norm it is rounding noise
            assert (found[0][name] - moment).norm() <= 1e-4 * moment.norm() + 1e-5 * whole, name


@pytest.mark.parametrize("options", [{"step": "modules"}, {"step": "explicit", "impl": "reference"}])
def test_statistics_are_each_processes_own_and_gradients_are_averaged(tmp_path, two, options):
    """Beside a step written by hand, which passes through the networks once for each process."""
    options = STEP | options | {"norm": "batch", "dropout": "none", "batch": 2}
    answers = two("steps", {"options": options, "count": 3, "out": str(tmp_path / "two")})
    both = torch.tensor([answer["losses"] for answer in answers])

    initial = build_state(train_config(**STEP, batch=2, dropout="none"), CPU)
    g, d = initial.generator, initial.discriminator
    adams = {n: torch.optim.Adam(net.parameters(), LR, (0.5, 0.999)) for n, net in (("adam_g", g), ("adam_d", d))}
    for number, (x, y) in enumerate(batches(3, 4)):
        shares = [(x[:2], y[:2]), (x[2:], y[2:])]
        fakes = [g(x) for x, _ in shares]
        shown = [seen_by_discriminator(x, fake, True) for (x, _), fake in zip(shares, fakes, strict=True)]
        d_fake = torch.stack([gan_loss(d(seen.detach()), False) for seen in shown]).mean()
        d_real = torch.stack([gan_loss(d(seen_by_discriminator(x, y, True)), True) for x, y in shares]).mean()
        adams["adam_d"].zero_grad()
        (0.5 * (d_fake + d_real)).backward()
        adams["adam_d"].step()
        g_gan = torch.stack([gan_loss(d(seen), True) for seen in shown]).mean()
        g_l1 = torch.stack([F.l1_loss(fake, y) for (_, y), fake in zip(shares, fakes, strict=True)]).mean()
        adams["adam_g"].zero_grad()
        (g_gan + 100 * g_l1).backward()
        adams["adam_g"].step()
        torch.testing.assert_close(both[:, number].mean(0), torch.stack((d_fake, d_real, g_gan, g_l1)).detach())
    expected = {
        f"{name}/{key}/exp_avg": adams[name].state[p]["exp_avg"]
        for name, net in (("adam_g", g), ("adam_d", d))
        for key, p in net.named_parameters()
    }
    assert_moments(saved(tmp_path / "two"), expected)


@pytest.mark.parametrize("options", [{"step": "modules"}, {"step": "explicit", "impl": "reference"}])
def test_overflow_in_one_process_skips_the_update_in_both(tmp_path, two, options):
    options = STEP | options | {"precision": "fp16"}
    two("steps", {"options": options, "count": 1, "out": str(tmp_path / "two"), "overflow": 1})
    initial = build_state(train_config(**options), CPU)
    first, second = saved(tmp_path / "two")
    assert_same(first, second)
    scale = initial.tensors()["scaler" if options["step"] == "modules" else "scale"].flatten()[0]
    assert first["scaler" if options["step"] == "modules" else "scale"].flatten()[0] == 0.5 * scale
    for name, p in initial.generator.named_parameters():
        assert torch.equal(first[f"generator/{name}"], p)


def run_of(small: dict, **more: object) -> dict:
    return small | {"checkpoint_steps": 4, "max_steps": 8, "epochs": 100, "schedule": "constant"} | more


def checkpoint_of(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.newest(run)
    return {f"{f.name}/{k}": t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


def test_resumed_run_is_the_uninterrupted_one(tmp_path, two, pairs, small):
    options = run_of(small, data=str(pairs / "train"), pool=3, ema=0.9)
    done = two("train", options | {"out": str(tmp_path / "whole")})
    assert [answer["step"] for answer in done] == [8, 8]
    assert done[0]["epochs"] == 8 * 4 // 5
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "00000008")  # as if killed after step 4
    done = two("train", {"data": options["data"], "out": str(tmp_path / "parts"), "resume": True, "max_steps": 8})
    assert [answer["step"] for answer in done] == [8, 8]
    whole, parts = checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "parts")
    assert_same(whole, parts)
    for own in ("rng/cpu", "pool/0"):  # each has dropout and a pool of its own
        assert not torch.equal(whole[f"training.safetensors/{own}"], whole[f"process-1.safetensors/{own}"])
    losses = [[r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3

    with pytest.raises(InputError, match=r"1 processes, but the run in .* was started with 2"):
        train(options["data"], tmp_path / "parts", resume=True, quiet=True)


def test_run_of_two_processes_is_the_run_of_one_with_their_batch(tmp_path, two, pairs, small):
    """Order, gradients, losses and epochs, from the images to the figures."""
    options = small | {"norm": "instance", "dropout": "none", "epochs": 4, "log_steps": 2}
    two("train", options | {"data": str(pairs / "train"), "out": str(tmp_path / "two"), "batch": 1})
    train(pairs / "train", tmp_path / "one", quiet=True, **options)
    found, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [r["step"] for r in found] == [r["step"] for r in expected] == [2, 4, 6, 8, 10]
    for a, b in zip(found, expected, strict=True):
        assert (a["epoch"], a["lr"]) == (b["epoch"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_process_0_alone_writes_and_validates(tmp_path, two, pairs, small):
    """Process 1 is given another folder, which never comes to be."""
    options = small | {"data": str(pairs), "epochs": 4, "validate_epochs": 2}
    folders = [str(tmp_path / name) for name in ("run", "elsewhere")]
    done = two("train", *(options | {"out": out} for out in folders))
    assert done == [{"step": 5, "epochs": 4, "stopped": "done", "rank": rank} for rank in range(2)]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "best.safetensors", "index.html", "samples"} <= names
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(r["step"], r["epoch"]) for r in records if "loss" in r] == [(3, 2), (5, 4)]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2


@pytest.mark.parametrize("how", ["time", "SIGTERM"])
def test_one_process_stops_and_both_end_at_the_same_step(tmp_path, two, pairs, small, how):
    run = tmp_path / "run"
    options = small | {"data": str(pairs / "train"), "out": str(run), "epochs": 100000}
    two.begin("train", options, options | ({"max_minutes": 1e-3} if how == "time" else {}))
    if how == "SIGTERM":
        wait_for(lambda: has_metrics(run))
        two.processes[1].send_signal(signal.SIGTERM)
    first, second = two.end()
    assert first == second | {"rank": 0}
    assert first["stopped"] == how
    assert int(checkpoint.newest(run).name) == first["step"]


def test_both_resume_without_a_checkpoint_and_process_0_chooses_the_loader(tmp_path, two, pairs, small):
    pytest.importorskip("nvidia.dali")
    options = small | {"data": str(pairs / "train"), "out": str(tmp_path / "run"), "resume": "auto", "loader": "dali"}
    begun = two("train", options | {"max_steps": 2})
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again = two("train", options | {"max_steps": 3})
    assert [[answer["step"] for answer in answers] for answers in (begun, again)] == [[2, 2], [3, 3]]
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [3]


def test_processes_that_do_not_all_find_the_run_are_refused(tmp_path, two, pairs, small):
    options = small | {"data": str(pairs / "train"), "resume": "auto", "max_steps": 1}
    two("train", options | {"out": str(tmp_path / "run")})
    answers = two("train", *(options | {"out": str(tmp_path / name)} for name in ("run", "elsewhere")))
    assert answers[1]["error"] == "InputError"
    assert "not all processes find a run there" in answers[1]["text"]
    assert answers[0]["error"] == "SystemExit"


def test_one_process_wants_a_checkpoint_and_both_save(tmp_path, two, pairs, small):
    options = small | {"data": str(pairs / "train"), "out": str(tmp_path / "run"), "max_steps": 3}
    done = two("train", options, options | {"checkpoint_minutes": 1e-6})
    assert [answer["step"] for answer in done] == [3, 3]
    assert len(checkpoint.all_checkpoints(tmp_path / "run")) == 2


def test_exploding_run_is_told_once_and_keeps_no_broken_weights(tmp_path, two, pairs, small):
    answers = two("train", run_of(small, data=str(pairs / "train"), out=str(tmp_path / "run"), lr=1e30))
    told = [answer for answer in answers if answer["error"] != "SystemExit"]
    assert [answer["error"] for answer in told] == ["EnvironmentFailed"]
    assert "not finite" in told[0]["text"]
    assert checkpoint.newest(tmp_path / "run") is None


def test_processes_that_see_other_data_are_refused(tmp_path, two, pairs, small):
    options = small | {"out": str(tmp_path / "run"), "max_steps": 1}
    answers = two("train", *(options | {"data": str(pairs / name)} for name in ("train", "val")))
    assert answers[1]["error"] == "InputError"
    assert "process 1 finds other pairs" in answers[1]["text"]
    assert answers[0]["error"] == "SystemExit"
    assert not (tmp_path / "run").exists()


def has_metrics(run: Path) -> bool:
    return bool(read_metrics(run / "metrics.jsonl"))


def wait_for(condition) -> None:
    deadline = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_to_torchrun_leaves_a_complete_checkpoint(tmp_path, pairs, small):
    """The processes exit with 130; torchrun itself with 1, for every end that is not success."""
    run, small = tmp_path / "run", {k: v for k, v in small.items() if k != "tensorboard"}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in small.items()]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "fastpix2pix", "train", str(pairs / "train"), "--out", str(run), "--no-tensorboard"),
        *(*flags, "--epochs=100000"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: torchrun.poll() is not None or has_metrics(run))
    torchrun.send_signal(signal.SIGINT)
    _, said = torchrun.communicate(timeout=LONGEST)
    assert torchrun.returncode == 1, said
    assert len(re.findall(r"^SIGINT at step \d+ after", said, re.MULTILINE)) == 1, said
    assert said.count("2 processes: a step takes 2 images of each, 4 in all") == 1
    assert {p.name for p in checkpoint.newest(run).iterdir()} == {
        *("generator.safetensors", "discriminator.safetensors"),
        *("training.safetensors", "process-1.safetensors", "training.json"),
    }


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # of some other launcher
    monkeypatch.delenv("RANK", raising=False)
    with joined("cpu") as (group, device):
        assert group is ALONE
        assert device == CPU
    flat = torch.ones(2)
    group.reduce(flat)
    assert flat.tolist() == [1, 1]
    assert (group.first(lambda: 7), group.from_others(lambda: 7), group.highest(3, 4)) == (7, [], (3, 4))
    agree = Agreement(group, -2)
    assert [agree(wish) for wish in (-2, -1, 15)] == [-2, -1, 15]


def test_workers_share_the_cores_of_their_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert [default_threads(here) for here in (1, 2, 4, 32)] == [8, 7, 3, 1]


def test_pools_of_processes_decide_differently():
    batch = torch.arange(40.0).view(40, 1, 1, 1)
    shown = [ImagePool(5, seed=1, rank=rank).query(batch, 0) for rank in (0, 0, 1)]
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (RuntimeError("Connection closed by peer"), EnvironmentFailed, "another process .* has ended.* by peer"),
        (dist.DistBackendError("NCCL error in: x.cpp,\nLast error:\n no space"), EnvironmentFailed, "NCCL .*no space"),
        (torch.AcceleratorError("an illegal memory access"), torch.AcceleratorError, "an illegal memory access"),
    ],
)
def test_who_failed(error, raised, text):
    with pytest.raises(raised, match=text), processes._peers():
        raise error


@pytest.fixture
def alone_of_two(monkeypatch) -> SimpleNamespace:
    """Process 0 of two under torchrun, which waits for nobody. `agent`: the store of torchrun's agent, which outlives
    attempts; `stores`: what the groups were given; `ends`: how they ended."""
    found = SimpleNamespace(agent=dist.HashStore(), stores=[], ends=[])
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *given, **options: iter([(found.agent, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *given, store, **options: found.stores.append(store))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: found.ends.append("destroyed"))
    monkeypatch.setattr(processes.atexit, "register", lambda *call: found.ends.append(call))
    return found


def test_a_run_that_torchrun_starts_again_finds_nothing_of_the_first_attempt(monkeypatch, alone_of_two):
    """No addresses of processes that are gone, and nobody who has told of an error: the second one is told again."""
    for attempt in range(2):
        monkeypatch.setattr(processes, "_groups", itertools.count())  # of a new process
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with pytest.raises(InputError, match="no pairs"), joined("cpu"):
            assert not alone_of_two.stores[-1].check(["address"])
            alone_of_two.stores[-1].set("address", "here")
            raise InputError("no pairs")
    assert len(alone_of_two.stores) == 2


def test_after_an_error_a_process_with_a_gpu_ends_without_waiting_for_nccl(monkeypatch, alone_of_two):
    """Whose destructor would wait for the others."""
    monkeypatch.setattr(processes, "own_device", lambda device, *given: torch.device(device, 0))
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(processes, "_groups", itertools.count(ord(device[1])))
        with pytest.raises(InputError), joined(device):
            raise InputError("no pairs")
    assert alone_of_two.ends == ["destroyed", (processes._leave, InputError.exit_code)]


def test_processes_ask_each_other_seldom(monkeypatch):
    """Steps of 1/64 s: in the end every 32nd, twice a second, and until then every time twice as seldom."""
    now, asked = SimpleNamespace(t=0.0), []

    class Fake(Group):
        def highest(self, *numbers: float) -> tuple[float, ...]:
            asked.append(int(64 * now.t))
            return (9, *numbers[1:])

    monkeypatch.setattr(processes.time, "monotonic", lambda: now.t)
    agree, agreed = Agreement(Fake(size=2), -2), []
    for _ in range(100):
        now.t += 1 / 64
        agreed.append(agree(-1))
    assert asked == [1, 3, 7, 15, 31, 63, 95]
    assert [i + 1 for i, found in enumerate(agreed) if found == 9] == asked
    assert set(agreed) == {-2, 9}


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device("auto", 2, 1) == own_device("cuda", 2, 1) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")] * 2
    assert own_device("cpu", 2, 1) == CPU
    with pytest.raises(InputError, match="device = cuda:0: 3 processes need a GPU each"):
        own_device("cuda:0", 3, 0)
    with pytest.raises(EnvironmentFailed, match=r"torch sees 2, .* lower --nproc-per-node"):
        own_device("auto", 3, 2)

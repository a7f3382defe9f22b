"""--profile: what is left behind is what the steps did."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpix2pix import cli
from fastpix2pix.config import Generator
from fastpix2pix.data.synthetic import write_demo_set
from fastpix2pix.kernels.losses import gan_loss
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.profiling import SKIPPED, TRACED, Counter, Profile, breakdown
from fastpix2pix.training.loop import train

TINY = {
    **{"crop_size": 32, "depth": 5, "ngf": 4, "ndf": 4, "n_layers": 1, "workers": 0, "device": "cpu", "batch": 2},
    **{"tensorboard": False, "epochs": 40, "quiet": True, "validate_epochs": 0},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_demo_set(tmp_path_factory.mktemp("data") / "pairs", train=4, val=1, size=32)


def names(trace: dict) -> set[str]:
    return {event.get("name") for event in trace["traceEvents"]}


@pytest.mark.parametrize(("step", "steps"), [("modules", TRACED), ("explicit", 1)])
def test_training_leaves_a_trace_a_table_and_a_summary(step, steps, pairs, tmp_path):
    train(pairs, tmp_path / "run", step=step, profile=True, max_steps=SKIPPED + steps, **TINY)
    folder = tmp_path / "run" / "profile"
    found = json.loads((folder / "summary.json").read_text())
    assert found["steps"] == steps and found["ms_per_step"] > 0
    assert sum(found["breakdown_ms"].values()) < 1.5 * found["ms_per_step"]
    assert found["breakdown_ms"]["convolution"] > 0 and found["aten_calls"] > 50 and found["aten_mb"] > 1
    assert found["triton_launches"] == 0  # on a CPU
    assert {"step", "load"} <= names(json.loads((folder / "trace.json").read_text()))
    if step == "modules":
        assert {"generator.down.0", "discriminator"} <= names(json.loads((folder / "trace.json").read_text()))
    assert "convolution" in (folder / "kernels.txt").read_text()


def test_a_profiled_run_computes_the_same(pairs, tmp_path):
    for name, profile in (("with", True), ("without", False)):
        train(pairs, tmp_path / name, profile=profile, max_steps=SKIPPED + 2, **TINY)
    weights = [
        next((tmp_path / n).glob("checkpoints/*/generator.safetensors")).read_bytes() for n in ("with", "without")
    ]
    assert weights[0] == weights[1]
    assert (tmp_path / "with" / "profile" / "summary.json").is_file()
    assert not (tmp_path / "without" / "profile").exists()


def test_a_run_that_ends_early_says_that_nothing_was_traced(pairs, tmp_path, capsys):
    train(pairs, tmp_path / "run", profile=True, max_steps=2, **(TINY | {"quiet": False}))
    assert f"the loop ended before step {SKIPPED + 1}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()


def test_inference_of_images(pairs, tmp_path, capsys):
    model, trace = tmp_path / "g.safetensors", tmp_path / "trace"
    save_network(model, build_generator(Generator(depth=5, ngf=4)))
    sources = [str(pairs / "train")]
    assert cli.main(["infer", str(model), *sources, str(tmp_path / "out"), "--profile", str(trace)]) == 0
    assert "ms per step of 2" in capsys.readouterr().err  # four images, two left out
    assert "translate" in names(json.loads((trace / "trace.json").read_text()))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_ranges_named_in_python_are_no_work_of_the_device(on_gpu):
    def event(key, device_us, cpu_us, *, device=True, annotation=False):
        kind = torch.autograd.DeviceType.CUDA if device else torch.autograd.DeviceType.CPU
        times = {"self_device_time_total": device_us * on_gpu, "self_cpu_time_total": cpu_us}
        return SimpleNamespace(key=key, device_type=kind, is_user_annotation=annotation, **times)

    events = [
        event("step", 0, 10, device=False, annotation=True),  # what Python itself took
        event("ProfilerStep#1", 0, 5000, device=False, annotation=True),
        event("aten::conv2d", 0, 40, device=False),
    ]
    if on_gpu:
        events += [
            event("step", 5000, 0, annotation=True),  # spans its kernels
            event("sm80_xmma_fprop_conv", 700, 0),
            event("_norm_act_fwd_kernel", 200, 0),
        ]
    found = breakdown(SimpleNamespace(key_averages=lambda: events), steps=1)
    assert found == ({"convolution": 0.7, "normalisation": 0.2} if on_gpu else {"convolution": 0.04, "other": 0.01})


def test_counts_are_of_calls_that_compute():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with Counter() as counted:
        y = torch.nn.functional.conv2d(x, w).relu()
        y.view(-1).detach()
    assert counted.calls == 2
    assert counted.bytes == 4 * (x.numel() + w.numel() + 3 * y.numel())


def test_what_is_written_in_place_counts_once_where_a_fake_tensor_is_made_of_it():
    real = torch.zeros(100)
    with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counted:
        real.copy_(torch.empty(100))
    assert (counted.calls, counted.bytes) == (1, 4 * 200)


def test_launches_are_those_of_the_first_step(tmp_path):
    profile = Profile(tmp_path)
    logits = torch.randn(128, device="cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(2):
        profile.run("step", lambda: gan_loss(logits, (1.0,), 1.0, torch.empty_like(logits), impl="triton"))
    assert profile.summary["triton_launches"] == 2  # values and gradient, then the mean

"""`fastpix2pix tune`: refusals, and both of its subjects on Triton's interpreter with next to no time."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastpix2pix import cli
from fastpix2pix.config import Generator, Modes, train_config
from fastpix2pix.kernels.conv_plan import conv_candidates, conv_plan
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime import auto_choice, triton_tuning
from fastpix2pix.runtime.engine import TorchEngine
from fastpix2pix.runtime.triton_engine import TritonEngine
from fastpix2pix.runtime.triton_tuning import describe, product_error, tune_engine
from fastpix2pix.training.plans import layers_of, problems
from fastpix2pix.tuning.cache import PlanCache
from fastpix2pix.tuning.products import Ways, keep_plans, measured_choice, measured_ways

TINY = ["--crop-size=32", "--depth=5", "--ngf=4", "--ndf=4", "--n-layers=1", "--device=cpu"]
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "g.safetensors"
    save_network(path, build_generator(Generator(depth=5, ngf=4)), direction="BtoA", size=32)
    return path


@pytest.mark.parametrize("of", ["step", "model"])
def test_without_triton_on_this_device_it_says_why(model, of):
    """Of its own process: the suite's runs the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subject = [f"--model={model}"] if of == "model" else []
    command = [sys.executable, "-m", "fastpix2pix.cli", "tune", *TINY, *subject]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 3
    assert "error: tune: own kernels need a CUDA GPU" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_training_step_with_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTPIX2PIX_CACHE", str(tmp_path))
    assert cli.main(["tune", *TINY, "--minutes=0", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["complete"] is False
    assert "time was up" in err
    assert len(list((tmp_path / "plans").iterdir())) == 1


@pytest.mark.parametrize(
    ("option", "text"), [("--size=33", "multiple of 32"), ("--model=/nowhere.pth", "no such file")]
)
def test_bad_input(model, option, text, capsys):
    assert cli.main(["tune", f"--model={model}", *TINY, option]) == 2
    assert text in capsys.readouterr().err


def test_a_size_is_for_a_model(capsys):
    assert cli.main(["tune", *TINY, "--size=64"]) == 2
    assert "--size 64: is for --model; a step of training is measured at crop_size" in capsys.readouterr().err


def test_a_generator_is_tuned_and_its_products_are_found_again(tmp_path):
    """The whole way with plain kernels."""
    net, cache = build_generator(Generator(depth=5, ngf=4)).eval(), PlanCache(CPU, tmp_path)
    found = tune_engine(net, Modes("running"), CPU, "fp32", 1, (32, 64), 5, impl="reference", cache=cache)
    assert found["complete"]
    assert len(found["products"]) == 10 + 4  # up-blocks with a skip read one source or two
    assert all(isinstance(ms, float) for product in found["products"] for ms in product["ms"].values())
    assert found["overlap_ms"] == "kernels overlap on a GPU only" and not found["overlap"]
    lines = describe(found)[-4:]
    assert "with static plans" in lines[0] and lines[1].startswith("large maps normalised by their readers: ")
    assert lines[2].startswith("kernels that overlap: ")
    choose = measured_choice(PlanCache(CPU, tmp_path), "fp32")
    met = []
    for lazy in (False, True):
        TritonEngine(
            net, Modes("running"), CPU, "fp32", impl="reference", choose=lambda p: met.append(p) or choose(p), lazy=lazy
        ).translate(torch.zeros(1, 3, 32, 64))
    chosen = {product["problem"]: product["plan"] for product in found["products"]}
    assert {str(p): ".".join(map(str, choose(p))) for p in met} == chosen


def test_a_plan_that_is_right_and_slow_is_taken_before_one_that_is_wrong_and_fast(tmp_path, monkeypatch):
    def measured(problem, plan, *rest):
        return "y is off" if plan == conv_plan(problem) else 1e9

    monkeypatch.setattr(triton_tuning, "_measured", measured)
    net, cache = build_generator(Generator(depth=5, ngf=4)).eval(), PlanCache(CPU, tmp_path)
    found = tune_engine(net, Modes("running"), CPU, "fp32", 1, (32, 32), 5, impl="reference", cache=cache)
    for product in found["products"]:
        right = [plan for plan, ms in product["ms"].items() if isinstance(ms, float)]
        assert product["plan"] in (right or product["ms"])
    assert any(isinstance(ms, float) for product in found["products"] for ms in product["ms"].values())


@pytest.mark.parametrize("lazy", [False, True])
def test_large_maps_are_left_to_their_readers_where_that_is_faster(tmp_path, monkeypatch, lazy):
    ran = []
    right = TritonEngine.enqueue
    monkeypatch.setattr(TritonEngine, "enqueue", lambda self, *rest: ran.append(self.lazy) or right(self, *rest))

    def step_ms(run, device):
        run()
        return 1.0 if ran[-1] == lazy else 2.0

    monkeypatch.setattr(triton_tuning, "step_ms", step_ms)
    net, cache = build_generator(Generator(depth=5, ngf=4)).eval(), PlanCache(CPU, tmp_path)
    found = tune_engine(net, Modes(), CPU, "fp32", 1, (64, 64), 5, impl="reference", cache=cache)
    assert (found["lazy"], found["lazy_ms"], found["after_ms"]) == (lazy, 1.0 if lazy else 2.0, 1.0)
    assert ("not kept" in describe(found)[-3]) != lazy
    assert measured_ways(PlanCache(CPU, tmp_path), "fp32") == Ways(overlap=False, lazy=lazy)


@pytest.mark.gpu
def test_a_generator_is_tuned_on_a_gpu(tmp_path):
    device = torch.device("cuda")
    net, cache = build_generator(Generator(depth=5, ngf=16)).eval(), PlanCache(device, tmp_path)
    found = tune_engine(net, Modes("running"), device, "auto", 1, (64, 64), 1, cache=cache)
    assert all(isinstance(found["backends"][name], float) for name in ("triton", "torch")), found["backends"]


def test_auto_is_triton_where_it_was_right_and_faster(tmp_path, monkeypatch):
    net, cache, modes = build_generator(Generator(depth=5, ngf=4)).eval(), PlanCache(CPU, tmp_path), Modes("running")
    times = {TritonEngine: 1.0, TorchEngine: 2.0}
    monkeypatch.setattr(auto_choice, "latency", lambda engine, *size: {"ms": times[type(engine)]})

    def tuned() -> tuple[str, str]:
        found = tune_engine(net, modes, CPU, "fp32", 1, (32, 32), 0, impl="reference", cache=cache)
        return auto_choice.chosen(cache, net.config, modes, "fp32"), describe(found)[-1]

    assert auto_choice.chosen(cache, net.config, modes, "fp32") == "torch"
    assert tuned() == ("triton", "backend = auto: triton (triton 1.0000 ms, torch 2.0000 ms)")
    for other in (modes, "bf16"), (Modes("image"), "fp32"):
        assert auto_choice.chosen(cache, net.config, *other) == "torch"
    times[TritonEngine] = 1.99
    assert tuned() == ("torch", "backend = auto: torch (triton 1.9900 ms, torch 2.0000 ms)")

    times[TritonEngine] = 1.0
    right = TritonEngine.translate
    monkeypatch.setattr(TritonEngine, "translate", lambda self, x, first=0: right(self, x, first) + 0.01)
    choice, line = tuned()
    assert choice == "torch" and "triton wrong: its pictures are off by 0.01" in line

    monkeypatch.setattr(TritonEngine, "translate", right)
    assert tuned()[0] == "triton"

    def short(self, x, first=0):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(TritonEngine, "translate", short)
    assert tuned() == ("triton", "backend = auto: torch (triton out of memory)")  # what was found before stays


def test_what_was_not_measured_is_static(tmp_path):
    layer, groups = next(iter(layers_of(train_config(batch=2))))
    problem, other = problems(layer, groups)
    cache = PlanCache(CPU, tmp_path)
    last = conv_candidates(problem)[-1]
    keep_plans(cache, "bf16", {problem: last}, Ways(overlap=True))
    assert measured_choice(cache, "bf16")(problem) == last
    assert measured_choice(cache, "bf16")(other) == conv_plan(other)
    assert measured_choice(cache, "fp16")(problem) == conv_plan(problem)
    assert measured_ways(cache, "bf16") == Ways(overlap=True) and measured_ways(cache, "fp16") == Ways()


def test_product_errors_are_none_for_right_kernels():
    """Every product of a tiny generator, by Triton, with its static plan."""
    met = []
    net = build_generator(Generator(depth=5, ngf=4)).eval()
    engine = TritonEngine(
        net, Modes("image"), CPU, "fp32", impl="reference", choose=lambda p: met.append(p) or conv_plan(p)
    )
    engine.translate(torch.zeros(1, 3, 32, 32))
    for problem in met[1:9:3]:
        assert product_error(problem, conv_plan(problem), torch.float32, CPU) == ""

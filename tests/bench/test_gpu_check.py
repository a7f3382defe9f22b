"""The GPU check itself, on the CPU with networks of a few channels: what it records, and that it can say no."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch

from bench import gpu_check, precompile
from bench import report as report_module
from bench.compare import Poisoned
from bench.devices import prepare, result_path, setting, synthetic_levels, synthetic_pairs
from bench.gpu_check import PARTS, SHOWN, _go_on, _options, _parts, _summary, _watch
from bench.precompile import case_launches, distinct, engine_launches, step_launches, trial_launches
from bench.report import Mismatch, Report, Running, Skipped
from bench.step_times import _to_do
from bench.timing import Timing, interleaved
from bench.training_checks import FP32
from fastpix2pix.config import train_config
from fastpix2pix.data.images import to_unit
from fastpix2pix.kernels._triton import triton
from fastpix2pix.model import PatchGAN, Unet
from fastpix2pix.model.unet import macs
from fastpix2pix.training.layers import discriminator_layers, generator_layers
from fastpix2pix.training.state import LOSSES
from fastpix2pix.tuning.numerics import excess

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FACTS = {"device": "cpu", "commit": "0123456789", "date": "today"}
# One process, as importing torch is the slowest part. Libraries that a GPU machine may lack are made unimportable.
SCRIPT = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("PIL", "tyro", "torchmetrics", "tensorboard", "matplotlib", "safetensors", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from tests.interpreter import quicken
quicken()
from bench.gpu_check import main
from fastpix2pix.kernels import adam, conv_wgrad

folder = sys.argv[1]
def check(name, *options):
    return main(["--device", "cpu", "--small", "--out", f"{folder}/{name}.json", "--budget", "3000", *options])

codes = {"good": check("good"), "late": check("late", "--budget", "0")}
right = adam._adam_triton
adam._adam_triton = lambda p, m, v, g, half, lr, *rest: right(p, m, v, g, half, 2 * lr, *rest)
codes["wrong"] = check("wrong", "--parts", "kernels,steps")
codes["wrong_step"] = check("wrong_step", "--parts", "steps")
adam._adam_triton = right
computed = conv_wgrad._conv_wgrad_triton
conv_wgrad._conv_wgrad_triton = lambda sources, g, dw, *rest: (computed(sources, g, dw, *rest), dw.mul_(1.01))
codes["wrong_convolution"] = check("wrong_convolution", "--parts", "convolutions")
json.dump(codes, open(f"{folder}/codes.json", "w"))
"""


@pytest.mark.parametrize(("name", "told"), [("cpu", []), ("cuda", []), ("cuda:1", [1])])
def test_a_gpu_is_made_current_where_it_has_a_number(monkeypatch, name, told):
    """torch.cuda.set_device itself refuses plain cuda, on any machine."""
    current = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    for option in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, option, getattr(torch.backends.cudnn, option))
    prepare(torch.device(name))
    assert current == told


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """{name: (exit code, record)} of the runs in SCRIPT."""
    folder = tmp_path_factory.mktemp("gpu_check")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads((folder / "codes.json").read_text())
    return {name: (code, json.loads((folder / f"{name}.json").read_text())) for name, code in codes.items()}


GPU_ONLY = ("frames", "tests")  # parts that have nothing to do on a CPU


def rows(record: dict, part: str, text: str = "") -> list[dict]:
    return [row for row in record["rows"] if row["part"] == part and text in row["row"]]


def test_record_of_a_good_run(runs):
    code, record = runs["good"]
    assert code == 0
    assert {"device", "capability", "driver", "cuda", "torch", "triton", "python", "commit", "date"} <= set(
        record["facts"]
    )
    assert list(dict.fromkeys(row["part"] for row in record["rows"])) == list(PARTS)
    for row in record["rows"]:
        assert set(row) == {"part", "row", "status", "reason", "seconds", "values"}
        assert row["status"] == "ok" or (row["status"] == "skipped" and row["reason"])
    skipped = [row["row"] for row in record["rows"] if row["status"] == "skipped" and row["part"] not in GPU_ONLY]
    assert len([row for row in rows(record, "steps") if row["status"] == "skipped"]) == 3
    assert len(skipped) == 3 + 2 * 5 and all("graph" in name for name in skipped), skipped


def test_every_kernel_is_checked_in_every_type(runs):
    checked = Counter(tuple(row["row"].split()[::3][:2]) for row in rows(runs["good"][1], "kernels"))
    ops = ("norm_act", "bias_act", "gan_loss", "l1_tanh_loss", "units", "adam", "found_inf_")
    assert set(checked) == {(dtype, op) for dtype in ("bfloat16", "float16", "float32") for op in ops}
    assert rows(runs["good"][1], "kernels", "dropout 0") and rows(runs["good"][1], "kernels", "relu left")
    names = [row["row"] for row in rows(runs["good"][1], "kernels")]
    assert len(names) == len(set(names))


def test_every_parameter_has_its_gradient_compared(runs):
    (fp32, own, bf16) = rows(runs["good"][1], "gradients")
    config = setting(CPU, small=True).config(1)
    names = {f"generator.{name}" for name, _ in Unet(config.generator).named_parameters()}
    names |= {f"discriminator.{name}" for name, _ in PatchGAN(config.discriminator()).named_parameters()}
    for row in (fp32, own, bf16):
        assert set(row["values"]["explicit, autocast"]) == names | set(LOSSES)
    for row in (fp32, own):
        assert max(error for error, _ in row["values"]["explicit, autocast"].values()) < FP32 / 10


def test_step_times(runs):
    timed = {row["row"]: row["values"] for row in rows(runs["good"][1], "steps") if "ms" in row["values"]}
    assert len(timed) == 6
    for values in timed.values():
        assert 0 < values["quartiles_ms"][0] <= values["ms"] <= values["quartiles_ms"][1]
        assert values["images_per_s"] == pytest.approx(2000 / values["ms"], rel=0.01)
    assert timed["batch 2 eager fp32 nchw"]["times_eager_fp32"] == 1


def test_engine_times(runs):
    """What runs on a CPU: eager in two precisions and torch.compile, with either statistics."""
    timed = [row["row"] for row in rows(runs["good"][1], "engines") if "ms" in row["values"]]
    names = ("eager fp32", "eager fp16", "torch.compile fp16")
    assert timed == [f"batch 2 {statistics} {name}" for statistics in ("image", "running") for name in names]
    for row in rows(runs["good"][1], "engines", "check"):
        assert row["status"] == "skipped" or row["values"]["mean"] < 0.25 / 127.5


def test_layer_times(runs):
    ceilings, *layers = rows(runs["good"][1], "layers")
    assert ceilings["values"]["matmul_tflops"] > 0
    assert len(layers) == 10 + 3
    for row in layers:
        assert all(row["values"][product]["us"] > 0 for product in ("forward", "dgrad", "wgrad"))


def test_wrong_kernel_fails_and_is_not_timed(runs):
    code, record = runs["wrong"]
    assert code == 4
    failed = [row for row in record["rows"] if row["status"] == "failed"]
    assert failed and all("adam" in row["row"] for row in failed)
    assert all("update is off by" in row["reason"] for row in failed)
    for row in (*rows(record, "steps", "triton"), *rows(record, "steps", "own convolutions")):
        assert row["status"] == "skipped" and "not timed: 2 checks failed" in row["reason"]
        assert "ms" not in row["values"]
    assert any("ms" in row["values"] for row in rows(record, "steps", "explicit bf16 reference"))


def test_convolutions_are_checked_then_timed_beside_the_library(runs):
    record = runs["good"][1]
    checked = [row["row"].removesuffix(": check") for row in rows(record, "convolutions", ": check")]
    timed = {row["row"]: row["values"] for row in rows(record, "convolutions") if "us" in row["values"]}
    assert len(checked) > 8 and list(timed) == checked
    assert {name.rsplit(" ", 1)[1] for name in timed} == {"forward", "dgrad", "wgrad"}
    for values in timed.values():
        assert all(us > 0 for us in values["us"].values()) and not values["not timed"]
        assert len(values["us"]) == 1 or values["times_library"] > 0
    assert any("best" in values for values in timed.values())


def test_wrong_convolution_is_named_and_not_timed(runs):
    code, record = runs["wrong_convolution"]
    assert code == 4
    failed = [row["row"] for row in record["rows"] if row["status"] == "failed"]
    assert failed and all(row.endswith("wgrad: check") for row in failed)
    for row in rows(record, "convolutions", "wgrad"):
        if "us" in row["values"]:
            assert list(row["values"]["us"]) == ["library"]
            assert all("sum over rows is off" in reason for reason in row["values"]["not timed"].values())


def test_step_finds_a_wrong_kernel_by_itself(runs):
    code, record = runs["wrong_step"]
    assert code == 4
    (failed,) = [row for row in record["rows"] if row["status"] == "failed"]
    assert failed["row"] == "batch 2 explicit bf16 triton: check" and "update: relative error" in failed["reason"]
    assert not any("ms" in row["values"] for row in rows(record, "steps", "triton"))


def test_spent_budget_skips(runs):
    code, record = runs["late"]
    assert code == 0
    assert record["rows"] and all(row["status"] == "skipped" for row in record["rows"])
    assert all("budget: 0 s left" in row["reason"] for row in record["rows"])


def report(path: Path, **facts: str) -> Report:
    return Report(path, FACTS | facts, 100.0, {"kernels": 1.0, "steps": 3.0})


def test_rows_are_on_disk_as_they_come(tmp_path):
    path = tmp_path / "results" / "r.json"
    kept = report(path)

    def wrong() -> dict:
        raise Mismatch("y is off", {"y": 3.0})

    def absent() -> dict:
        raise Skipped("no such thing")

    def broken() -> dict:
        raise RuntimeError("ptxas\n   died")

    assert kept.run("kernels", "a", lambda: {"y": 0.5})
    for row, function, options in (("b", wrong, {}), ("c", absent, {}), ("d", broken, {}), ("e", broken, {"required": False})):  # fmt: skip  # noqa: E501
        assert not kept.run("kernels", row, function, **options)
        assert json.loads(path.read_text())["rows"][-1]["row"] == row
    assert not kept.run("steps", "f", dict, needs=1e3)
    found = {row["row"]: (row["status"], row["reason"]) for row in json.loads(path.read_text())["rows"]}
    assert found["a"] == ("ok", "") and found["b"] == ("failed", "y is off") and found["c"][0] == "skipped"
    assert found["d"] == ("failed", "RuntimeError: ptxas died") and found["e"][0] == "skipped"
    assert "this needs about 1000 s" in found["f"][1]
    assert kept.rows[1]["values"] == {"y": 3.0} and len(kept.failures()) == 2
    assert kept.left("kernels") < 25 < 74 < kept.left("steps")


def test_every_row_is_encoded_once(tmp_path, monkeypatch):
    """And the file is what the encoder would make of all of it."""
    encode, seen = json.dumps, []
    monkeypatch.setattr(json, "dumps", lambda what, **options: seen.append(what) or encode(what, **options))
    many = report(tmp_path / "r.json")
    for number in range(4):
        record = {"facts": many.facts, "budget_s": many.budget, "rows": many.rows}
        assert many.path.read_text() == encode(record, indent=1) + "\n"
        many.add("steps", f"row {number}", "ok", us={"a\n": [1.5, 2], "b": {}, "c": None})
    assert [what["row"] for what in seen if "row" in what] == [f"row {number}" for number in range(4)]
    assert not any(what.get("rows") for what in seen)


def test_other_parts_are_kept_for_the_same_device_and_clean_commit(tmp_path):
    path = tmp_path / "r.json"
    old = report(path)
    old.add("curves", "a", "ok")
    old.add("steps", "b", "ok")
    assert [row["row"] for row in report(path, date="tomorrow").rows] == ["a"]
    assert report(path, commit="other").rows == []
    report(path, commit="0123456789-dirty").add("curves", "c", "ok")
    assert report(path, commit="0123456789-dirty").rows == []


def test_another_process_goes_on_with_all_rows(tmp_path):
    old = report(tmp_path / "r.json", commit="0123456789-dirty")
    old.add("kernels", "a", "ok")
    old.add("steps", "batch 1 eager: check", "ok")
    new = Report(old.path, FACTS, 10.0, {"steps": 1.0}, goes_on=True)
    assert [row["row"] for row in new.rows] == ["a", "batch 1 eager: check"]
    assert len(new.of("steps", "batch 1 ")) == 1 and new.of("steps", "batch 16 ") == new.of("kernels", "batch") == []


def test_batch_that_lost_the_gpu_is_done_again_without_what_failed(tmp_path):
    kept = report(tmp_path / "r.json")
    kept.add("steps", "batch 1 eager: check", "ok")
    kept.add("steps", "batch 1 graph: check", "failed", "capture invalidated")
    kept.add("steps", "batch 16 eager: check", "ok")
    kept.add("steps", "batch 16 timing", "ok")
    assert _to_do(kept, 1) and not _to_do(kept, 16) and _to_do(kept, 64)
    assert [row["row"] for row in kept.of("steps", "batch 1 ")] == ["batch 1 graph: check"]
    assert len(kept.of("steps", "batch 16 ")) == 2


class Replaced(Exception):
    """The process would be another one now."""


@pytest.mark.parametrize(
    ("part", "rest"),
    [("kernels", "steps,frames"), ("steps", "steps,frames"), ("frames", "none")],
)
def test_process_that_lost_the_gpu_hands_over(tmp_path, monkeypatch, part, rest):
    commands = []

    def replace(program, command):
        commands.append(command)
        raise Replaced

    monkeypatch.setattr(os, "execv", replace)
    options = _options(["--parts", "frames,kernels,steps", "--device", "cuda:1", "--budget", "70"])
    lost = Report(tmp_path / "r.json", FACTS, 70.0, {"kernels": 1.0, "steps": 1.0, "frames": 1.0})
    with pytest.raises(Replaced):
        _go_on(lost, options, part)
    again = _options(commands[0][3:])
    assert again.parts == _parts(rest) and again.device == "cuda:1" and again.out == lost.path
    assert again.goes_on and 60 <= again.budget <= 70


def test_row_that_hangs_is_left_behind(tmp_path):
    hangs = report(tmp_path / "r.json")
    hangs.running = Running("steps", "batch 1 triton", 0.0)
    left = []

    def go_on(part):
        left.append(part)
        raise Replaced

    with pytest.raises(Replaced):
        _watch(hangs, go_on)
    assert left == ["steps"] and hangs.failures()[0]["row"] == "batch 1 triton"


def test_row_that_compiles_does_not_hang(tmp_path, monkeypatch):
    """Every kernel that Triton compiles is told to the report."""
    compiles, seconds = report(tmp_path / "r.json"), []
    compiles.running = Running("steps", "batch 1 own convolutions", 0.0)

    def sleep(of):
        seconds.append(of)
        if len(seconds) == 3:
            raise Replaced

    listener = triton.knobs.compilation.listener
    gpu_check._notice_compiling(compiles)
    triton.knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=False)
    triton.knobs.compilation.listener = listener
    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(Replaced):
        _watch(compiles, lambda part: pytest.fail("left behind"))
    assert len(seconds) == 3 and not compiles.rows


class Clock:
    """Stands for the module `time` in a report."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_compiling_ahead_has_a_limit_of_its_own_and_takes_from_every_part(tmp_path, monkeypatch):
    clock, given = Clock(), []
    monkeypatch.setattr(report_module, "time", clock)

    def in_time(at, seconds):
        given.append(seconds)
        clock.now += seconds
        return {"all": False}

    monkeypatch.setattr(precompile, "_in_time", in_time)
    at = setting(CPU, small=True)._replace(device=torch.device("cuda"))
    for budget, seconds in ((480.0, 100.0), (200.0, 50.0)):
        clock.now = 0.0
        fresh = Report(tmp_path / "r.json", FACTS, budget, {"kernels": 1.0, "steps": 3.0})
        precompile.run(fresh, at)
        (row,) = fresh.rows
        assert row["part"] == "kernels" and row["status"] == "ok" and row["seconds"] == seconds == given[-1]
        assert fresh.left("kernels") == (budget - seconds) / 4 and fresh.left("steps") == budget - seconds
    steps = Report(tmp_path / "r.json", FACTS, 480.0, {"steps": 1.0})  # on another day, maybe on another machine
    precompile.run(steps, at)
    assert len(steps.of("kernels")) == len(steps.of("steps")) == 1
    precompile.run(Report(tmp_path / "r.json", FACTS, 480.0, {"steps": 1.0}, goes_on=True), at)
    precompile.run(Report(tmp_path / "r.json", FACTS, 480.0, {"frames": 1.0}), at)
    assert len(given) == 3


def test_summary_is_short_and_ends_with_times(tmp_path):
    many = report(tmp_path / "r.json")
    many.add("steps", "batch 1 eager", "ok", ms=2.5, images_per_s=400.0)
    for number in range(50):
        many.add("kernels", f"case {number}", "failed", "y is off")
    *lines, more, last = _summary(many).splitlines()
    assert len(lines) == SHOWN and "46 more" in more and last.split()[-4:] == ["2.500", "ms", "400.0", "img/s"]


def test_layers_are_those_of_unet_256_and_the_70_pixel_discriminator():
    config = train_config()
    generator, discriminator = generator_layers(config, 16), discriminator_layers(config, 16)
    assert len(generator) + len(discriminator) == 21
    assert sum(layer.flops for layer in generator) == 2 * 16 * macs(config.generator, 256, 256)
    assert generator[8].x == (16, 512, 1, 1) and generator[9].x == (16, 1024, 2, 2)
    assert generator[-1].rows == (16 * 65536, 3) and generator[-1].bias and not generator[-1].norm
    assert [layer.drop for layer in generator[8:12]] == [0, 1, 2, None]
    assert [layer.rows for layer in discriminator[-2:]] == [(16 * 961, 512), (16 * 900, 1)]


def test_shares_of_the_checks_are_all_of_them():
    """One check is in the same share at every batch size and in every type: there its kernels are often the same."""
    at = setting(CPU, small=True)
    whole, parts = list(case_launches(at)), [list(case_launches(at, number, 3)) for number in range(3)]
    assert len(whole) > 50 and all(parts)
    assert len(distinct(whole)) == len(distinct(chain(*parts))) and len(whole) == sum(map(len, parts))


def test_what_is_compiled_ahead_is_recorded_without_starting_it():
    at = setting(CPU, small=True)
    steps, trials = list(step_launches(at, 108)), list(trial_launches(at, 108))
    checks, engines = list(case_launches(at)), list(engine_launches(at))
    own = {"_conv_kernel", "_conv_wgrad_kernel"}
    assert own <= {launch.kernel for launch in steps} and own <= {launch.kernel for launch in trials}
    assert {"_conv_kernel", "_norm_act_fwd_kernel"} <= {launch.kernel for launch in engines}
    assert {dict(launch.options).get("launch_pdl", False) for launch in engines} == {False, True}
    assert {"_gan_loss_kernel", "_found_inf_kernel", "_norm_act_bwd_kernel"} <= {launch.kernel for launch in checks}
    assert len(distinct(steps)) < len(distinct(steps + trials)) < len(steps + trials)
    assert len(distinct(steps + steps)) == len(distinct(steps))


AHEAD = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from bench.precompile import _without_gpu, compile_launch
from fastpix2pix.kernels.adam import advance
from fastpix2pix.kernels.dispatch import recorded

with FakeTensorMode(), recorded(run=False) as tape:
    advance(torch.zeros(3, dtype=torch.int64), torch.zeros((), dtype=torch.int64), 16, impl="triton")
_without_gpu(90)
compile_launch(tape[0])
"""


@pytest.mark.skipif(sys.platform != "linux" or triton is None, reason="Triton's compiler is for Linux")
def test_a_kernel_is_compiled_without_a_gpu_for_the_machine_that_has_one(tmp_path):
    """With what starts it: a GPU machine that gets the folder compiles nothing."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AHEAD], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/_advance_kernel.cubin"))) == 1
    assert list(tmp_path.glob("*/*.so"))


AHEAD_OF_CHECKS = """
import json, time
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from bench import precompile
from fastpix2pix.kernels.adam import advance
from fastpix2pix.kernels.dispatch import recorded

with FakeTensorMode(), recorded(run=False) as tape:
    advance(torch.zeros(3, dtype=torch.int64), torch.zeros((), dtype=torch.int64), 16, impl="triton")
precompile.case_launches = lambda at, number, of: iter(tape)
precompile.step_launches = lambda at, processors: iter(tape)
codes = [precompile.main("sm_90", "300"), precompile._mark(90, precompile.CHECKS).is_file()]
precompile._compile = lambda *arguments: time.sleep(300)
began = time.monotonic()
codes += [precompile.main("sm_90", "1"), time.monotonic() - began < 100]
print(json.dumps(codes))
"""


@pytest.mark.skipif(sys.platform != "linux" or triton is None, reason="Triton's compiler is for Linux")
def test_compiling_ahead_says_whether_all_was_compiled_in_time(tmp_path):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AHEAD_OF_CHECKS], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, codes = done.stdout.splitlines()
    assert "0 not through in time, 0 that failed" in first and ": 0 not through" not in second
    assert json.loads(codes) == [0, True, 1, True]
    assert len(list(tmp_path.glob("*/_advance_kernel.cubin"))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y, "right"),
        (lambda y: y * (1 + 2**-8), "one rounding of bf16"),
    ],
)
def test_excess_allows(change, reason):
    exact = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    same = exact.bfloat16()
    assert excess(change(exact).bfloat16(), same, exact) <= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y * 1.05, "a scale"),
        (lambda y: torch.where(y > 2.9, 0.0, y), "a tail left out"),
        (lambda y: torch.where(y > 2.99, torch.nan, y), "never written"),
    ],
)
def test_excess_refuses(change, reason):
    exact = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    assert not excess(change(exact).bfloat16(), exact.bfloat16(), exact) <= 1


@pytest.mark.parametrize("half", ["", "left", "right"])
def test_poisoned_sees_every_stray_write(half):
    for at in (0, 255, -1, *([300] if half == "right" else [])):
        poisoned = Poisoned(4, 100, torch.float16, CPU, half)
        assert poisoned.array.isnan().all() and poisoned.array.shape == (4, 100)
        poisoned.array.fill_(1.0)
        assert poisoned.untouched()
        poisoned.flat[at] = 0.0
        assert not poisoned.untouched()


def test_interleaved_takes_turns_and_drops_what_raises():
    order = []

    def broken() -> None:
        raise ValueError("no")

    runs = {"a": lambda: order.append("a"), "x": broken, "b": lambda: order.append("b")}
    found = interleaved(runs, CPU, 3, 0.0)
    assert isinstance(found["a"], Timing) and found["a"].samples == 3
    assert isinstance(found["x"], ValueError)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]


def test_pairs_are_fresh_pictures_in_range():
    (x, y), (other, _) = synthetic_pairs(setting(CPU, small=True).config(2), 2, CPU)
    assert x.shape == (2, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
    assert x.abs().max() <= 1 and not torch.equal(x, other)
    torch.testing.assert_close(y, -x.roll(1, 1), rtol=0, atol=2e-7)
    ((levels, _),) = synthetic_levels(setting(CPU, small=True).config(2), 1, CPU)
    assert levels.dtype == torch.uint8 and torch.equal(to_unit(levels), x)


def test_options():
    assert _parts("steps, layers") == ("steps", "layers") and _parts("") == tuple(PARTS)
    with pytest.raises(Exception, match="speed: allowed are kernels, gradients"):
        _parts("kernels,speed")
    assert result_path({"device": "NVIDIA H100 80GB HBM3", "commit": "abc"}).name == "nvidia-h100-80gb-hbm3-abc.json"

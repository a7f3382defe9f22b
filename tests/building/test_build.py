import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fastpix2pix import cli
from fastpix2pix.building import candidate, onnx_graph
from fastpix2pix.building.build import build
from fastpix2pix.building.onnx_graph import export_onnx
from fastpix2pix.building.tensorrt import precisions
from fastpix2pix.config import Form, Generator, Modes
from fastpix2pix.data.images import write_image
from fastpix2pix.data.synthetic import write_demo_set
from fastpix2pix.errors import CheckFailed, EnvironmentFailed, InputError
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime.plan import model_hash, read_plan

RTX = {"target": "tensorrt-rtx", "capabilities": "sm80", "size": "64", "gate_images": 2, "device": "cpu"}
ONNX = {"target": "onnx", "size": "64", "gate_images": 2, "device": "cpu"}


def network(**options):
    torch.manual_seed(0)
    net = build_generator(Generator(**{"depth": 5, "ngf": 8, **options})).eval()
    with torch.no_grad():
        net.up[-1].conv.weight.mul_(10)
    return net


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "g.safetensors"
    save_network(path, network(), direction="BtoA", size=64, modes=Modes())
    return path


@pytest.fixture(scope="module")
def steep(tmp_path_factory):
    """A model whose first hidden layer is over 65504, the largest number of fp16; the norm behind it makes it small."""
    net = network()
    with torch.no_grad():
        net.down[1].conv.weight.mul_(1e7)
    path = tmp_path_factory.mktemp("steep") / "g.safetensors"
    save_network(path, net, modes=Modes())
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return {}, tmp_path_factory.mktemp("exported")


@pytest.fixture(autouse=True)
def export_once(exported, monkeypatch):
    """Two builds of the same graph export it once."""
    made, folder = exported

    def export(net, modes, path, form, **options):
        given = model_hash(net), modes, form, repr(options["record"]), len(options["calibration"])
        if given not in made:
            made[given] = export_onnx(net, modes, folder / f"{len(made)}.onnx", form, **options)
        shutil.copyfile(made[given].path, path)
        return dataclasses.replace(made[given], path=path)

    monkeypatch.setattr(candidate, "export_onnx", export)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# What is made


def test_an_engine_with_its_sidecar(model, tmp_path):
    lines, seen = [], []
    options = {"say": lines.append, "progress": lambda *count: seen.append(count)}
    built = build(model, tmp_path / "g.engine", precision="fp16", **options, **RTX)
    assert names(tmp_path) == ["g.engine", "g.engine.json"]
    plan = read_plan(tmp_path / "g.engine")
    assert plan.model == model_hash(network())
    assert plan.modes == Modes()
    assert plan.form == Form("fp16", 1, 64, 64)
    assert (plan.sizes, plan.batches) == (((64, 64),), (1,))
    assert (plan.target, plan.capabilities, plan.gpu) == ("tensorrt-rtx", ("sm80",), None)
    assert plan.record["direction"] == "BtoA"
    assert plan.latency is None, "nothing ran it"
    assert plan.parity == built.parity.as_dict()
    assert 0 < built.parity.worst()["mean"] <= built.parity.tolerance.mean
    assert "in place of the TensorRT-RTX engine" in built.parity.ran
    assert "ONNX Runtime" in built.parity.ran
    assert precisions(built.layers)["convolution"] == {"fp16": 5}
    assert built.opset == 20
    assert built.bytes == (tmp_path / "g.engine").stat().st_size
    assert set(built.seconds) == {"export", "build", "gate"}
    assert any("norm_stats image (record)" in line for line in lines)
    assert seen[-1][0] == seen[-1][1] > 1


@pytest.mark.parametrize(
    "options, why",
    [
        ({"precision": "int8", "capabilities": "sm80,sm89", "calibration_images": 4}, "quantised, two GPUs"),
        ({"precision": "bf16", "norm_stats": "running", "noise": "fixed"}, "the twin in PyTorch; a mask in the graph"),
        (
            {"precision": "fp16", "noise": "random", "size": "32,64,64x96", "batch": "1,2,4", "pixels": "uint8"},
            "dynamic, masks as inputs, pixels in the graph",
        ),
    ],
)
def test_engines_of_every_kind_pass_the_gate(model, tmp_path, options, why):
    built = build(model, tmp_path / "g.plan", **{**RTX, **options})
    built.parity.check()
    plan = read_plan(tmp_path / "g.plan")
    assert plan.form.precision == options["precision"]
    assert plan.modes.noise == options.get("noise", "off")
    assert plan.capabilities == tuple(options.get("capabilities", "sm80").split(","))
    if len(plan.sizes) == 3:
        assert plan.form == Form("fp16", None, None, None, "uint8")
        assert (plan.sizes, plan.batches) == (((32, 32), (64, 64), (64, 96)), (1, 2, 4))


def test_an_onnx_file_is_what_was_compared(model, tmp_path):
    built = build(model, tmp_path / "g.onnx", precision="fp32", **ONNX)
    assert names(tmp_path) == ["g.onnx"]
    assert "in place of" not in built.parity.ran, "it is the thing itself"
    assert built.parity.worst()["max"] <= 1
    assert built.layers == ()


def test_real_pairs_are_compared_on(model, tmp_path):
    data = write_demo_set(tmp_path / "pairs", train=3, val=2, size=64)
    built = build(model, tmp_path / "g.onnx", precision="fp32", calibration=str(data), **ONNX)
    assert [i.name for i in built.parity.images] == ["0001", "0002"]


# What is refused before anything is made


@pytest.mark.parametrize(
    "out, options, said",
    [
        ("g.engine", {**ONNX}, "ends in .onnx"),
        ("g.onnx", {**RTX}, r"ends in .engine or .plan"),
        ("g.engine", {**RTX, "size": "48"}, r"size = 48x48: .* multiples of 32"),
        ("g.engine", {**RTX, "capabilities": "sm90"}, "does not know sm90.*target = tensorrt"),
        ("g.engine", {**RTX, "capabilities": None}, "say which: capabilities = sm75"),
        ("g.engine", {**RTX, "refit": True}, "refit = True only on a GPU"),
        ("g.engine", {**RTX, "precision": "fp8"}, "fp8 needs sm89"),
        ("g.engine", {**RTX, "target": "tensorrt"}, "builds on the GPU"),
        ("g.onnx", {**ONNX, "timing_cache": "x"}, "belongs to engines"),
        ("g.onnx", {**ONNX, "calibration": "nowhere"}, "no such folder"),
        ("g.onnx", {**ONNX, "precison": "fp16"}, "did you mean precision"),
    ],
)
def test_bad_requests_leave_nothing(model, tmp_path, out, options, said):
    with pytest.raises(InputError, match=said):
        build(model, tmp_path / "folder" / out, **options)
    assert names(tmp_path) == []


def test_an_existing_file_is_kept_unless_it_may_go(model, tmp_path):
    out = tmp_path / "g.onnx"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists: choose another name, or overwrite = True"):
        build(model, out, precision="fp32", **ONNX)
    assert out.read_text() == "mine"
    build(model, out, precision="fp32", overwrite=True, **ONNX)
    assert out.read_bytes() != b"mine"


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_tried(model, tmp_path, monkeypatch):
    monkeypatch.setattr("fastpix2pix.building.build.prepare", lambda *given: pytest.fail("was begun"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(EnvironmentFailed, match=f"closed: no permission to write in {tmp_path}; choose another folder"):
        build(model, tmp_path / "closed" / "g.onnx", **ONNX)


def test_without_the_exporter_nothing_is_tried(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFailed, match=r"made with onnx, onnxscript, onnxruntime: pip install 'fastpix2pix"):
        build(model, tmp_path / "g.engine", **RTX)


def test_instance_norm_has_no_running_statistics(tmp_path):
    save_network(tmp_path / "g.safetensors", network(norm="instance"))
    with pytest.raises(InputError, match="no running statistics"):
        build(tmp_path / "g.safetensors", tmp_path / "g.onnx", norm_stats="running", **ONNX)


# The gate


@pytest.mark.parametrize(("out", "options"), [("g.engine", RTX), ("g.onnx", ONNX)])
def test_what_overflows_is_rejected_and_leaves_nothing(steep, tmp_path, out, options):
    with pytest.raises(CheckFailed, match=r"2 of 2 images differ too much from the fp32 generator.*facade") as error:
        build(steep, tmp_path / "folder" / out, precision="fp16", **options)
    assert error.value.exit_code == 4
    assert names(tmp_path) == []
    (tmp_path / out).write_text("the one before")
    with pytest.raises(CheckFailed):
        build(steep, tmp_path / out, precision="fp16", overwrite=True, **options)
    assert names(tmp_path) == [out]
    assert (tmp_path / out).read_text() == "the one before"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_what_was_damaged_on_the_way_is_rejected(model, tmp_path, monkeypatch, capsys, precision):
    """One number of one weight, as a flipped bit of its exponent leaves it, between the export and the engine."""
    export = candidate.export_onnx

    def damaging(net, modes, path, form, **options):
        made = export(net, modes, path, form, **options)
        graph = onnx.load(path)
        tensor = next(t for t in graph.graph.initializer if t.name == "up.4.weight")
        weight = numpy_helper.to_array(tensor).copy()
        weight.flat[0] *= 4096
        tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
        onnx.save(graph, path)
        return made

    monkeypatch.setattr(candidate, "export_onnx", damaging)
    command = ["build", str(model), "--out", str(tmp_path / "g.engine"), "--target=tensorrt-rtx", "--for=sm80"]
    options = ["--size=64", "--gate-images=4", "--calibration-images=4", "--device=cpu", f"--precision={precision}"]
    assert cli.main([*command, *options]) == 4
    said = capsys.readouterr().err
    assert "error: 4 of 4 images differ too much from the fp32 generator" in said
    assert said.count("facade 100000") == 3
    assert "and 1 more. Nothing was written" in said
    assert names(tmp_path) == []


# precision = auto


def test_auto_without_a_gpu_is_fp16_where_that_passes(model, tmp_path):
    lines = []
    built = build(model, tmp_path / "g.engine", say=lines.append, **RTX)
    assert built.form.precision == read_plan(tmp_path / "g.engine").form.precision == "fp16"
    assert built.tried == {"fp16": "passes, not timed"}
    assert any("nothing was timed" in line for line in lines)


def test_auto_goes_on_where_fp16_does_not_pass(steep, tmp_path):
    built = build(steep, tmp_path / "g.engine", **RTX)
    assert built.form.precision == "bf16"
    assert "differ too much" in built.tried["fp16"]
    assert built.tried["bf16"] == "passes, not timed"


def test_auto_for_onnx_times_what_runs_here(model, tmp_path):
    built = build(model, tmp_path / "g.onnx", **ONNX)
    assert set(built.tried) == {"fp16", "fp32"}
    assert all("passes, " in text and " ms" in text for text in built.tried.values())
    assert built.latency["ms"] > 0


def test_auto_without_any_that_passes(model, tmp_path):
    with pytest.raises(CheckFailed, match=r"no precision passes:\n  fp16 .*\n  bf16 .*\n  fp32"):
        build(model, tmp_path / "g.engine", mean_difference=1e-9, max_difference=1e-9, **RTX)
    assert names(tmp_path) == []


# Around it


@pytest.mark.parametrize(("asked", "when"), [(1, "before the export"), (4, "at a step of the builder")])
def test_stopping_leaves_nothing(model, tmp_path, asked, when):
    answers = iter([*[False] * (asked - 1), True])
    with pytest.raises(KeyboardInterrupt):
        build(model, tmp_path / "g.engine", precision="fp16", stop=lambda: next(answers), **RTX)
    assert names(tmp_path) == []
    assert list(answers) == [], when


def test_command(model, tmp_path, capsys):
    common = ["--size=64", "--gate-images=2", "--device=cpu", "--target=tensorrt-rtx", "--precision=fp16"]
    out = str(tmp_path / "g.engine")
    assert cli.main(["build", str(model), "--out", out, "--for", "sm80,sm86", *common, "--json", "-"]) == 0
    stdout, stderr = capsys.readouterr()
    found = json.loads(stdout)
    assert found["form"]["precision"] == "fp16"
    assert len(found["parity"]["images"]) == 2
    assert read_plan(out).capabilities == ("sm80", "sm86")
    for said in ("facade 1000000", "psnr", "convolution: 5 fp16", "normalization: 7 fp32", "MiB ->"):
        assert said in stderr
    assert cli.main(["build", str(model), "--out", out, "--for", "sm80", *common]) == 2
    assert "exists" in capsys.readouterr().err
    again = ["--overwrite", "--mean-difference=1e-6"]
    assert cli.main(["build", str(model), "--out", out, "--for", "sm80", *common, *again]) == 4
    assert read_plan(out).capabilities == ("sm80", "sm86"), "as it was"
    assert cli.main(["build", str(model), "--out", str(tmp_path / "h.engine"), "--for", "sm90", *common]) == 2
    assert "--target tensorrt" in capsys.readouterr().err


def test_a_signal_ends_the_command_with_its_code(model, tmp_path):
    """SIGTERM while the model is exported: taken as soon as that is done."""
    code = """
import os, signal, sys
from fastpix2pix.building import candidate, onnx_graph
from fastpix2pix.cli import main

export = candidate.export_onnx
def interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return export(*args, **options)
candidate.export_onnx = interrupted
sys.exit(main(sys.argv[1:]))
"""
    out = tmp_path / "g.engine"
    options = [
        "--out",
        str(out),
        "--target=tensorrt-rtx",
        "--for=sm80",
        "--size=64",
        "--precision=fp16",
        "--device=cpu",
    ]
    done = subprocess.run([sys.executable, "-c", code, "build", str(model), *options], capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert "interrupted: nothing was written" in done.stderr
    assert done.stdout == ""
    assert names(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_infer_says_why_an_engine_does_not_run(model, tmp_path, capsys):
    engine, picture = tmp_path / "g.engine", tmp_path / "x.png"
    build(model, engine, precision="fp16", **RTX)
    write_image(picture, np.zeros((64, 64, 3), np.uint8))
    assert cli.main(["infer", str(engine), str(picture), str(tmp_path / "y.png")]) == 3
    assert "sees no NVIDIA GPU (install its driver" in capsys.readouterr().err
    assert cli.main(["infer", str(model), str(picture), str(tmp_path / "y.png"), "--backend=tensorrt-rtx"]) == 3
    assert "--backend tensorrt-rtx: torch sees no NVIDIA GPU (install its driver" in capsys.readouterr().err
    assert names(tmp_path) == ["g.engine", "g.engine.json", "x.png"]

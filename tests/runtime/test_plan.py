import dataclasses
import json

import pytest
import torch

from fastpix2pix.config import Form, Generator, Modes
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.model import build_generator
from fastpix2pix.model.load import load_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime.plan import (
    Machine,
    kernels,
    model_hash,
    read_engine,
    read_plan,
    sidecar,
    update_plan,
    write_plan,
)

HERE = Machine("1.7.1.116", "sm80", "A GPU")
RECORD = {"architecture": dataclasses.asdict(Generator(depth=5, ngf=4)), "direction": "BtoA"}
VALUES = {
    "model": "0" * 64,
    "record": RECORD,
    "modes": Modes("running", "fixed", 7),
    "form": Form("fp16", None, None, None, "uint8"),
    "sizes": ((32, 32), (64, 96), (128, 128)),
    "batches": (1, 2, 4),
    "target": "tensorrt-rtx",
    "version": HERE.version,
    "capabilities": ("sm80", "sm86"),
    "gpu": None,
    "stripped": False,
    "parity": {"worst": {"max": 1.0}},
}


@pytest.fixture
def path(tmp_path):
    write_plan(tmp_path / "model.engine", b"engine" * 100, **VALUES)
    return tmp_path / "model.engine"


def test_what_was_written_comes_back(path):
    plan, engine = read_engine(path)
    assert engine == b"engine" * 100
    assert {name: getattr(plan, name) for name in VALUES} == VALUES
    assert plan.generator == Generator(depth=5, ngf=4)
    assert plan.latency is None
    assert plan.mismatches(HERE, "0" * 64) == []
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.engine", "model.engine.json"]


def test_a_new_engine_takes_the_old_ones_kernels_away(path):
    kernels(path).write_bytes(b"of the old one")
    write_plan(path, b"new", **VALUES)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.engine", "model.engine.json"]


def test_latency_is_filled_in_later(path):
    update_plan(path, read_plan(path), latency={"ms": 1.5})
    assert read_plan(path).latency == {"ms": 1.5}


@pytest.mark.parametrize(
    "changes, here, said",
    [
        ({"model": "1" * 64}, {}, "built from another model"),
        ({"version": "1.6.0"}, {}, "built by version 1.6.0 of tensorrt-rtx, here is 1.7.1.116"),
        ({}, {"capability": "sm90"}, "built for sm80, sm86, this GPU is sm90"),
        ({"gpu": "Another GPU"}, {}, "built on Another GPU, this GPU is A GPU"),
        ({"stripped": True}, {}, "has no weights"),
    ],
)
def test_every_mismatch_is_named_with_the_command_that_mends_it(path, changes, here, said):
    plan = dataclasses.replace(read_plan(path), **changes)
    machine = dataclasses.replace(HERE, **here)
    with pytest.raises(InputError, match=said) as error:
        plan.check(path, machine, "0" * 64)
    assert len(plan.mismatches(machine, "0" * 64)) == 1
    command = (
        "--precision fp16 --norm-stats running --noise fixed --seed 7 --size 32x32,64x96,128x128 --batch 1,2,4 "
        f"--pixels uint8 --overwrite --out {path}"
    )
    assert f"--target tensorrt-rtx --for {machine.capability} {command}" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mismatches_are_said_at_once(path):
    plan = dataclasses.replace(read_plan(path), version="1", gpu="x", stripped=True)
    assert len(plan.mismatches(dataclasses.replace(HERE, capability="sm75"), "f" * 64)) == 5


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"x")


def flip(path):
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: sidecar(p).unlink(), "engines come from `fastpix2pix build`"),
        (truncate, "599 bytes of 600: cut short"),
        (lengthen, "601 bytes of 600: not the engine of its sidecar"),
        (flip, "changed after the build"),
        (lambda p: sidecar(p).write_text(sidecar(p).read_text()[:-10]), "not the sidecar of an engine"),
        (lambda p: sidecar(p).write_text("[]"), "not the sidecar of an engine"),
        (lambda p: sidecar(p).write_text("{}"), "not the sidecar of an engine"),
        (lambda p: sidecar(p).write_bytes(b"\xff\xfe"), "not the sidecar of an engine"),
        (lambda p: sidecar(p).write_text('{"checksum": "", "format": 99}'), "format 99, this version reads 1"),
    ],
)
def test_damaged_files_are_refused_in_one_line(path, damage, said):
    damage(path)
    with pytest.raises(InputError, match=said) as error:
        read_plan(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*VALUES, "engine", "size", "latency", "builder"])
def test_a_change_of_any_field_of_the_sidecar_is_found(path, name):
    content = json.loads(sidecar(path).read_text())
    content[name] = "something else"
    sidecar(path).write_text(json.dumps(content))
    with pytest.raises(InputError, match="changed after the build"):
        read_plan(path)


def test_a_field_that_another_version_wrote_is_named(path, monkeypatch):
    from fastpix2pix.runtime import plan as module

    content = json.loads(sidecar(path).read_text())
    del content["checksum"]
    content["colour"] = "blue"
    content["checksum"] = module._checksum(content)
    sidecar(path).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"another version .*colour"):
        read_plan(path)


def test_neither_file_stays_where_the_engine_cannot_be_written(tmp_path):
    (tmp_path / "model.engine").mkdir()
    (tmp_path / "model.engine" / "something").write_text("")
    with pytest.raises(EnvironmentFailed, match=r"model.engine"):
        write_plan(tmp_path / "model.engine", b"x", **VALUES)
    assert [p.name for p in tmp_path.iterdir()] == ["model.engine"]


def test_model_hash_is_of_architecture_and_weights_not_of_the_file(tmp_path):
    net = build_generator(Generator(depth=5, ngf=4)).eval()
    save_network(tmp_path / "a.safetensors", net, direction="AtoB")
    save_network(tmp_path / "b.safetensors", net, direction="BtoA")
    first = model_hash(net)
    assert {model_hash(load_generator(tmp_path / name)[0]) for name in ("a.safetensors", "b.safetensors")} == {first}
    with torch.no_grad():
        net.up[-1].conv.bias[0] += 1e-3
    assert model_hash(net) != first
    other = build_generator(Generator(depth=5, ngf=4, dropout="none"))
    other.load_state_dict(net.state_dict())
    assert model_hash(other) != model_hash(net), "dropout is no weight, but it changes pictures"

"""What was measured is found again on the same machine with the same kernels, and nowhere else."""

import json

import pytest
import torch

from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.tuning import cache as module
from fastpix2pix.tuning.cache import PlanCache

CPU = torch.device("cpu")
SUBJECT = {"kind": "test", "batch": 1}


def test_round_trip(tmp_path):
    cache = PlanCache(CPU, tmp_path / "new")
    assert cache.load(SUBJECT) is None
    path = cache.save(SUBJECT, {"ms": 1.5})
    assert path.parent == tmp_path / "new"
    assert PlanCache(CPU, tmp_path / "new").load(SUBJECT) == {"ms": 1.5}
    assert cache.load({**SUBJECT, "batch": 2}) is None


@pytest.mark.parametrize("name", ["device", "triton", "torch", "kernels"])
def test_another_machine_or_kernel_measures_anew(tmp_path, name, monkeypatch):
    PlanCache(CPU, tmp_path).save(SUBJECT, {"ms": 1.5})
    other = {**module.machine(CPU), name: "another"}
    monkeypatch.setattr(module, "machine", lambda device: other)
    assert PlanCache(CPU, tmp_path).load(SUBJECT) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"machine": 1, "subject": 2, "record": 3}'])
def test_a_damaged_file_is_none(tmp_path, text):
    cache = PlanCache(CPU, tmp_path)
    cache.save(SUBJECT, {}).write_text(text)
    assert cache.load(SUBJECT) is None


def test_the_file_says_what_it_is(tmp_path):
    content = json.loads(PlanCache(CPU, tmp_path).save(SUBJECT, {"ms": 2}).read_text())
    assert content["subject"] == SUBJECT
    assert content["machine"]["device"] == "cpu"


def test_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPIX2PIX_CACHE", str(tmp_path))
    assert PlanCache(CPU).folder == tmp_path / "plans"


def test_a_full_or_forbidden_disk_is_the_environments(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="in the way") as found:
        PlanCache(CPU, tmp_path / "file").save(SUBJECT, {})
    assert isinstance(found.value, EnvironmentFailed) or "folder" in str(found.value)

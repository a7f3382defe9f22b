import pytest
import torch

from fastpix2pix.device import resolve_device, resolve_precision, with_index
from fastpix2pix.errors import EnvironmentFailed, InputError

CPU = torch.device("cpu")


def test_auto_is_cuda_where_there_is_one():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == resolve_device(CPU) == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cpu:0", "", "CUDA", "mps"])
def test_unknown_device_is_refused(name):
    with pytest.raises(InputError, match=r"allowed are auto, cpu, cuda and cuda:N"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_without_cuda_is_refused(name):
    with pytest.raises(EnvironmentFailed, match=rf"device = {name}: .*sees no GPU; .*or use device = cpu"):
        resolve_device(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(EnvironmentFailed, match=r"torch sees \d+ CUDA device"):
        resolve_device("cuda:99")


def test_a_device_as_its_tensors_name_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert with_index(torch.device("cuda")) == torch.device("cuda:2")
    assert with_index(torch.device("cuda:1")) == torch.device("cuda:1")
    assert with_index(CPU) == CPU


def test_precision():
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    with pytest.raises(InputError, match=r"precision = 'half': allowed are auto, fp32, bf16, fp16"):
        resolve_precision("half", CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_precision_is_half_on_cuda():
    assert resolve_precision("auto", torch.device("cuda")) in ("bf16", "fp16")

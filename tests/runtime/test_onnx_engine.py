"""An .onnx file as MODEL: pictures of any size, modes from the file, buffers of the caller, refusals."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpix2pix as f2p
from fastpix2pix.building.onnx_graph import export_onnx
from fastpix2pix.cli import main
from fastpix2pix.config import Form, Generator, Modes
from fastpix2pix.data.images import read_image, write_image
from fastpix2pix.data.synthetic import write_demo_set
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime import onnx_engine
from fastpix2pix.runtime.buffers import check_buffers
from fastpix2pix.runtime.load import BACKENDS, load
from fastpix2pix.runtime.onnx_engine import OnnxEngine

ANY = Form(batch=None, height=None, width=None)
RANDOM = Modes("image", "random", 7)


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model.safetensors, and files made of it: any.onnx, four.onnx (4 images of 32x64, uint8), random.onnx."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = build_generator(Generator(depth=5, ngf=4)).eval()
    with torch.no_grad():
        net.up[-1].conv.weight.mul_(10)
    record = {"direction": "BtoA", "size": 64}
    save_network(folder / "model.safetensors", net, **record)
    export_onnx(net, Modes(), folder / "any.onnx", ANY, record=record)
    export_onnx(
        net, Modes("running", "fixed", 3), folder / "four.onnx", Form("fp32", 4, 32, 64, "uint8"), record=record
    )
    export_onnx(net, RANDOM, folder / "random.onnx", ANY, record=record)
    return folder


@pytest.mark.parametrize("size", [(1, 1), (33, 50), (64, 64)])
def test_pictures_of_any_size_equal_torch(folder, size):
    x = picture(2, *size, 3)
    got, wanted = load(folder / "any.onnx", device="cpu")(x), load(folder / "model.safetensors", device="cpu")(x)
    assert wanted.std() > 20
    assert abs(got.astype(int) - wanted).max() <= 1
    assert (got != wanted).mean() < 0.01


def test_random_noise_is_the_same_sequence(folder):
    ours = load(folder / "random.onnx", device="cpu")
    theirs = load(folder / "model.safetensors", noise="random", seed=7, device="cpu")
    for number in range(3):
        x = torch.rand(1 + number, 3, 32, 64) * 2 - 1
        assert (ours(x) - theirs(x)).abs().max() <= 1e-5
    assert ours.count == 6


@pytest.mark.parametrize("count", [1, 4, 6])
def test_any_number_of_images_for_a_fixed_batch(folder, count):
    x = picture(count, 32, 64, 3)
    modes = {"norm_stats": "running", "noise": "fixed", "seed": 3}
    got, wanted = load(folder / "four.onnx")(x), load(folder / "model.safetensors", device="cpu", **modes)(x)
    assert abs(got.astype(int) - wanted).max() <= 1


def test_the_file_describes_itself(folder):
    g = load(folder / "any.onnx", device="cpu")
    described = g.describe()
    assert described == json.loads(json.dumps(described))
    assert described | {"backend": "onnxruntime", "device": "cpu", "precision": "fp32", "sizes": []} == described
    assert g.modes == Modes() and g.record["direction"] == "BtoA" and g.modes_source["noise"] == "record"
    assert load(folder / "four.onnx", "onnxruntime").describe()["sizes"] == [[32, 64]]


# Buffers of the caller


def test_enqueue_writes_the_callers_buffer(folder):
    engine = OnnxEngine(folder / "any.onnx")
    x = torch.rand(2, 3, 32, 64) * 2 - 1
    out = torch.full((2, 3, 32, 64), 9.0)
    address = out.data_ptr()
    engine.enqueue(x, out)
    assert out.data_ptr() == address
    assert torch.equal(out, engine.translate(x))
    four = OnnxEngine(folder / "four.onnx")
    levels, eight = torch.from_numpy(picture(4, 32, 64, 3)), torch.zeros(4, 32, 64, 3, dtype=torch.uint8)
    four.enqueue(levels, eight)
    assert np.array_equal(eight.numpy(), load(folder / "four.onnx")(levels.numpy()))
    assert eight.float().std() > 3


@pytest.mark.parametrize(
    "given, out, match",
    [
        (torch.zeros(1, 3, 32, 48), torch.zeros(1, 3, 32, 48), r"32x48 pixels: .*any.onnx takes multiples of 32"),
        (
            torch.zeros(1, 4, 32, 32),
            torch.zeros(1, 3, 32, 32),
            r"input \[1, 4, 32, 32\] torch.float32 on cpu",
        ),
        (torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32), r"output \[2, 3, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32).half(), r"output .* torch.float16"),
        (torch.zeros(1, 32, 32, 3).permute(0, 3, 1, 2), torch.zeros(1, 3, 32, 32), r"input is not contiguous"),
        (torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32), r"input of shape \[3, 32, 32\]: four axes"),
    ],
)
def test_refused_buffers(folder, given, out, match):
    with pytest.raises(InputError, match=match):
        OnnxEngine(folder / "any.onnx").enqueue(given, out)


def test_a_fixed_size_is_named_with_the_way_out(folder):
    with pytest.raises(InputError, match=r"32x32 pixels \(after padding .*takes 32x64; give that size .*fit = resize"):
        load(folder / "four.onnx")(picture(20, 20, 3))
    with pytest.raises(InputError, match=r"2 images in one call: .*takes 4"):
        OnnxEngine(folder / "four.onnx").enqueue(*(torch.zeros(2, 32, 64, 3, dtype=torch.uint8),) * 2)


# Through the commands


def test_infer_and_eval_take_the_file(folder, tmp_path):
    write_image(tmp_path / "in.png", picture(40, 50, 3))
    for model in ("any.onnx", "model.safetensors"):
        command = ["infer", str(folder / model), str(tmp_path / "in.png"), str(tmp_path / f"{model}.png")]
        assert main([*command, "--device", "cpu"]) == 0
    ours, theirs = (read_image(tmp_path / f"{m}.png").astype(int) for m in ("any.onnx", "model.safetensors"))
    assert abs(ours - theirs).max() <= 1
    write_demo_set(tmp_path / "data", train=1, val=2, size=64, seed=0)
    found, wanted = (
        f2p.evaluate(folder / m, tmp_path / "data", device="cpu") for m in ("any.onnx", "model.safetensors")
    )
    assert found.images == 2 and found.l1 == pytest.approx(wanted.l1, abs=1e-5)


# Refusals


@pytest.mark.parametrize(
    "name, options, match",
    [
        ("any.onnx", {"norm_stats": "running"}, r"norm_stats = running: .* was built with norm_stats = image"),
        ("any.onnx", {"noise": "fixed"}, r"noise = fixed: .* noise = off"),
        ("four.onnx", {"seed": 4}, r"seed = 4: .* seed = 3"),
        ("any.onnx", {"precision": "fp16"}, r"precision = fp16: .* precision = fp32; build another"),
        ("any.onnx", {"backend": "torch"}, r"backend = torch: .* is built for onnxruntime"),
        ("any.onnx", {"backend": "tensorrt"}, r"backend = tensorrt: .* is built for onnxruntime"),
        (
            "model.safetensors",
            {"backend": "onnxruntime"},
            r"model.safetensors is a network; fastpix2pix build .*model.safetensors --target onnx --out model.onnx",
        ),
        ("model.safetensors", {"backend": "tensorrt-rtx"}, r"--target tensorrt-rtx --out model\.(engine|plan)"),
        ("absent.onnx", {}, r"absent.onnx: no such file"),
    ],
)
def test_refused_options(folder, name, options, match):
    with pytest.raises(InputError, match=match):
        load(folder / name, **({"device": "cpu"} | options))


def test_the_files_own_modes_may_be_given(folder):
    given = load(folder / "four.onnx", norm_stats="running", noise="fixed", seed=3, precision="fp32")
    assert given.modes == Modes("running", "fixed", 3)


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda m: m.SerializeToString()[:3000], r"x.onnx: ONNX Runtime cannot run it on cpu"),
        (lambda m: b"no graph at all", r"x.onnx: ONNX Runtime cannot run it on cpu"),
        (lambda m: b"", r"x.onnx: ONNX Runtime cannot run it on cpu"),
        (lambda m: changed(m, None), r"without a fastpix2pix record; make one with `fastpix2pix build MODEL"),
        (lambda m: changed(m, "[]"), r"damaged record"),
        (lambda m: changed(m, "{"), r"damaged record"),
        (lambda m: changed(m, '{"format": 99}'), r"format 99, this version reads 1"),
        (lambda m: changed(m, '{"format": 1}'), r"damaged record"),
    ],
)
def test_bad_files_are_one_line(folder, tmp_path, damage, match):
    (tmp_path / "x.onnx").write_bytes(damage(onnx.load(folder / "any.onnx")))
    with pytest.raises(InputError, match=match) as error:
        load(tmp_path / "x.onnx", device="cpu")
    assert len(str(error.value).splitlines()) == 1


def changed(model, record: str | None) -> bytes:
    del model.metadata_props[:]
    if record is not None:
        onnx.helper.set_model_props(model, {"fastpix2pix": record})
    return model.SerializeToString()


def test_what_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setattr(onnx_engine, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFailed, match=r"not installed \(pip install 'fastpix2pix\[onnx\]'\)"):
        load(folder / "any.onnx", device="cpu")


def test_cuda_needs_the_other_package(monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "onnxruntime-gpu" in onnx_engine.not_supported_reasons("cuda")[0]
    assert onnx_engine.not_supported_reasons("cpu") == []


def test_cuda_without_a_number_takes_the_tensors_of_its_gpu(folder, monkeypatch):
    import onnxruntime

    class OnCuda(onnxruntime.InferenceSession):
        def __init__(self, model, options, providers):
            ((self.asked, self.place),) = providers
            super().__init__(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return [self.asked]

    monkeypatch.setattr(onnxruntime, "InferenceSession", OnCuda)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    number = torch.cuda.device_count() - 1 if torch.cuda.is_available() else 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: number)
    engine = OnnxEngine(folder / "any.onnx", torch.device("cuda"))
    assert engine._session.place["device_id"] == number
    with FakeTensorMode():
        x = torch.empty(1, 3, 32, 64, device=f"cuda:{number}")
        assert check_buffers(engine.form, x, x, (3, 3), engine.device) == (1, 32, 64)


def test_backends_are_the_options_of_infer():
    from typing import get_args, get_type_hints

    from fastpix2pix.config import Infer

    assert set(BACKENDS) == set(get_args(get_type_hints(Infer)["backend"]))


@pytest.mark.gpu
def test_cuda_equals_the_cpu(folder):
    if onnx_engine.not_supported_reasons("cuda"):
        pytest.skip("this ONNX Runtime has no CUDA")
    x = torch.rand(2, 3, 64, 32) * 2 - 1
    wanted = OnnxEngine(folder / "any.onnx").translate(x)
    got = OnnxEngine(folder / "any.onnx", torch.device("cuda")).translate(x.cuda())
    assert got.device.type == "cuda"
    assert (got.cpu() - wanted).abs().max() <= 2e-3  # its convolutions may use TF32

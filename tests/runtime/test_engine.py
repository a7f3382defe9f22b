import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix.config import Generator, Modes
from fastpix2pix.data import images
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.model import Unet, build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime import translator as translator_module
from fastpix2pix.runtime.engine import TorchEngine, latency
from fastpix2pix.runtime.load import load, resolve_modes
from fastpix2pix.runtime.translator import Translator

IMAGE, RUNNING = Modes(), Modes(norm_stats="running")
RANDOM = Modes(noise="random", seed=7)


def network(**options) -> Unet:
    """A small generator with outputs over most of [-1, 1]."""
    torch.manual_seed(0)
    net = build_generator(Generator(**({"depth": 5, "ngf": 4} | options)))
    with torch.no_grad():
        net.up[-1].conv.weight.mul_(10)
    return net.eval()


def translator(modes: Modes = IMAGE, **options) -> Translator:
    return Translator(TorchEngine(network(**options), modes))


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_network(path, network(), direction="BtoA", modes={"norm_stats": "running", "noise": "fixed"})
    return path


# Kinds, ranks and channels


def test_array_is_the_network_on_unit_range():
    net = network()
    given = picture(64, 32, 3)
    with torch.no_grad():
        x = torch.from_numpy(given).permute(2, 0, 1)[None] / 127.5 - 1
        wanted = ((net(x, IMAGE)[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    got = Translator(TorchEngine(net, IMAGE))(given)
    assert wanted.std() > 20
    assert np.array_equal(got, wanted)
    assert got.flags.c_contiguous


@pytest.mark.parametrize(
    "given, channels, returned, why",
    [
        ((40, 33, 3), (3, 3), (40, 33, 3), "colour"),
        ((2, 40, 33, 3), (3, 3), (2, 40, 33, 3), "batch"),
        ((40, 33), (3, 3), (40, 33, 3), "gray expanded; the output has colour"),
        ((40, 33), (3, 1), (40, 33), "gray to gray keeps the rank"),
        ((40, 33, 1), (3, 1), (40, 33, 1), "one channel with its axis"),
        ((40, 33, 4), (3, 3), (40, 33, 3), "alpha dropped"),
        ((40, 33), (1, 3), (40, 33, 3), "gray model"),
        ((40, 33, 2), (2, 5), (40, 33, 5), "any channels, as arrays"),
        ((1, 1, 3), (3, 3), (1, 1, 3), "a single pixel"),
    ],
)
def test_array_shapes(given, channels, returned, why):
    got = translator(in_channels=channels[0], out_channels=channels[1])(picture(*given))
    assert got.shape == returned, why
    assert got.dtype == np.uint8


def test_gray_and_alpha_arrays_equal_their_colour_form():
    g, gray, colour = translator(), picture(32, 32), picture(32, 32, 4)
    assert np.array_equal(g(gray), g(np.stack([gray] * 3, -1)))
    assert np.array_equal(g(colour), g(colour[..., :3].copy()))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (31, 33), (32, 64)])
def test_any_size_comes_back_and_equals_padding_by_hand(size):
    net = network()
    x = torch.rand(1, 3, *size) * 2 - 1
    pads = [-s % 32 for s in size]
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), *((p // 2, p - p // 2) for p in pads)], mode="reflect")
    with torch.no_grad():
        wanted = net(torch.from_numpy(padded), IMAGE)
    wanted = wanted[..., pads[0] // 2 :, pads[1] // 2 :][..., : size[0], : size[1]]
    assert torch.allclose(Translator(TorchEngine(net, IMAGE))(x), wanted, atol=1e-5)


def test_tensors_keep_rank_and_dtype_and_give_no_gradient():
    g = translator()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True) * 2 - 1
    batch = g(x)
    assert batch.shape == x.shape and batch.dtype == torch.float64 and not batch.requires_grad
    assert torch.allclose(g(x[0]), batch[0], atol=1e-5)
    torch.ones(1, requires_grad=True).mul(batch).sum().backward()  # an inference tensor would refuse


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_pil_modes(mode):
    values = picture(20, 30, 3)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert(mode)
    assert image.mode == mode
    g = translator()
    got = g(image)
    assert got.mode == "RGB" and got.size == (30, 20)
    plain = np.stack([values[..., 0]] * 3, -1) if mode == "I;16" else np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(got), g(plain))


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_output_mode(channels, mode):
    assert translator(out_channels=channels)(Image.new("RGB", (5, 7))).mode == mode


@pytest.mark.parametrize(
    "image, match",
    [
        ("photo.png", r"str given: allowed are a PIL image, a uint8 array or a float tensor"),
        (np.zeros((8, 8, 3), np.float32), r"array \[8, 8, 3\] of float32: arrays are uint8"),
        (np.zeros(8, np.uint8), r"array \[8\] of uint8: allowed are \[H, W\]"),
        (np.zeros((8, 8, 2), np.uint8), r"2 channels; the model takes 3 \(or 1, expanded, or 4, alpha dropped\)"),
        (np.zeros((3, 8, 8), np.uint8), r"8 channels; the model takes 3"),
        (np.zeros((0, 8, 3), np.uint8), r"has no pixels"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"has no pixels"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"tensor \[3, 8, 8\] of torch.uint8: tensors are float"),
        (torch.zeros(8, 8), r"tensor \[8, 8\] of torch.float32: allowed are \[C, H, W\]"),
        (torch.zeros(8, 8, 3), r"8 channels; the model takes 3, as the axis before H"),
        (torch.zeros(1, 8, 8), r"1 channels; the model takes 3"),
        (torch.zeros(3, 8, 0), r"has no pixels"),
        (Image.new("F", (8, 8)), r"floating point images are not supported"),
    ],
)
def test_refused_images(image, match):
    with pytest.raises(InputError, match=match):
        translator()(image)


def test_refused_for_a_model_that_is_not_3_to_3():
    with pytest.raises(InputError, match=r"3 channels; the model takes 1, as the last axis"):
        translator(in_channels=1)(picture(8, 8, 3))
    with pytest.raises(InputError, match=r"the model makes 5 channels, PIL has 1, 3 or 4"):
        translator(out_channels=5)(Image.new("RGB", (8, 8)))
    with pytest.raises(InputError, match=r"channels = 2: images have 1 \(gray\), 3 \(RGB\)"):
        translator(in_channels=2)(Image.new("RGB", (8, 8)))


def test_pixel_limit(monkeypatch):
    monkeypatch.setattr(translator_module, "MAX_PIXELS", 99)
    g = translator()
    g(picture(9, 11, 3))
    with pytest.raises(InputError, match=r"100 pixels; allowed are 99 per image"):
        g(picture(10, 10, 3))
    assert images.MAX_PIXELS >= 4096**2


# Modes, noise, batches


@pytest.mark.parametrize("modes", [IMAGE, RUNNING, Modes(noise="fixed"), RANDOM])
def test_a_batch_equals_its_images_one_by_one(modes):
    batch = torch.rand(3, 3, 32, 64) * 2 - 1
    together = translator(modes)(batch)
    one = translator(modes)
    apart = torch.stack([one(image) for image in batch])
    assert torch.allclose(together, apart, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_random_noise_is_a_sequence_set_by_the_seed():
    x = picture(32, 32, 3)
    g, again, other = translator(RANDOM), translator(RANDOM), translator(Modes(noise="random", seed=8))
    state = torch.get_rng_state()
    first, second = g(x), g(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.array_equal(first, second)
    assert np.array_equal(again(x), first) and np.array_equal(again(x), second)
    assert not np.array_equal(other(x), first)
    assert g.count == 2
    g.count = 0
    assert np.array_equal(g(x), first)


def test_noise_off_and_fixed_repeat():
    x = picture(32, 32, 3)
    off, fixed = translator(), translator(Modes(noise="fixed"))
    assert np.array_equal(off(x), off(x)) and np.array_equal(fixed(x), fixed(x))
    assert not np.array_equal(off(x), fixed(x))


RECORD = {"modes": {"norm_stats": "running", "noise": "random"}}


@pytest.mark.parametrize(
    "record, given, wanted, source",
    [
        ({}, {}, Modes(), ("default", "default")),
        ({"modes": None}, {}, Modes(), ("default", "default")),
        (RECORD, {}, Modes("running", "random"), ("record", "record")),
        (RECORD, {"noise": "off"}, Modes("running", "off"), ("record", "given")),
        (RECORD, {"norm_stats": "image", "seed": 3}, Modes("image", "random", 3), ("given", "record")),
        ({"modes": {"noise": "fixed"}}, {}, Modes("image", "fixed"), ("default", "record")),
    ],
)
def test_order_of_modes(record, given, wanted, source):
    assert resolve_modes(record, **given) == (wanted, dict(zip(("norm_stats", "noise"), source, strict=True)))


def test_load_takes_the_record_and_describes_itself(model):
    g = load(model, device="cpu")
    assert g.modes == Modes("running", "fixed")
    assert g.record["direction"] == "BtoA"
    described = g.describe()
    assert described == json.loads(json.dumps(described))
    assert described | {"backend": "torch", "device": "cpu", "precision": "fp32", "multiple": 32} == described
    assert described["modes_source"] == {"norm_stats": "record", "noise": "record"}
    x = picture(32, 32, 3)
    given = load(str(model), "torch", norm_stats="running", noise="fixed", seed=0, device="cpu")
    assert np.array_equal(given(x), g(x))
    assert given.modes_source == {"norm_stats": "given", "noise": "given"}
    assert not np.array_equal(load(model, device="cpu", norm_stats="image")(x), g(x))


def test_refused_options(model, tmp_path):
    with pytest.raises(InputError, match=r"backend = 'tensorflow': allowed are auto, torch"):
        load(model, "tensorflow")
    with pytest.raises(InputError, match=r"norm_stats = 'batch': allowed are image, running"):
        load(model, norm_stats="batch")
    with pytest.raises(InputError, match=r"noise = 'on': allowed are off, fixed, random"):
        load(model, noise="on")
    with pytest.raises(InputError, match=r"seed = -1: must be in"):
        load(model, seed=-1)
    with pytest.raises(InputError, match=r"precision = 'int8': allowed are auto, fp32"):
        load(model, precision="int8", device="cpu")
    with pytest.raises(InputError, match=r"device = 'tpu'"):
        load(model, device="tpu")
    with pytest.raises(InputError, match=r"nothing.safetensors"):
        load(tmp_path / "nothing.safetensors")
    instance = tmp_path / "instance.safetensors"
    save_network(instance, network(norm="instance"))
    with pytest.raises(InputError, match=r"norm_stats = running: a generator with instance norm"):
        load(instance, norm_stats="running", device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_refused(model):
    with pytest.raises(EnvironmentFailed, match=r"sees no GPU"):
        load(model, device="cuda")


# The engine itself


def test_bf16_is_close_to_fp32_and_not_it():
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    full, half = (TorchEngine(network(), IMAGE, precision=p).translate(x) for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().mean() < 0.02


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_kernels_are_narrowed_once_to_what_autocast_makes_of_them(precision, dtype):
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", dtype):
        wanted = network()(x, IMAGE).float()
    engine = TorchEngine(network(), IMAGE, precision=precision)
    assert torch.equal(engine.translate(x), wanted)
    assert {p.dtype for p in engine._net.parameters() if p.ndim == 4} == {dtype}
    assert {p.dtype for name, p in engine._net.named_parameters() if ".norm." in name} == {torch.float32}


def test_engine_is_channels_last_in_eval_mode_without_gradients():
    net = network().train()
    engine = TorchEngine(net, IMAGE)
    y = engine.translate(torch.zeros(2, 3, 32, 32))
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.down[1].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_enqueue_writes_the_callers_buffer():
    engine, x = TorchEngine(network(), RANDOM), torch.rand(2, 3, 32, 64) * 2 - 1
    y = torch.full((2, 3, 32, 64), 9.0)
    address = y.data_ptr()
    engine.enqueue(x, y, first=4)
    assert y.data_ptr() == address
    assert torch.equal(y, engine.translate(x, 4))
    assert not torch.equal(y, engine.translate(x, 5))


def test_latency_is_measured_after_a_warm_up():
    calls = []

    class Counted(TorchEngine):
        def translate(self, batch, first=0):
            calls.append(tuple(batch.shape))
            return super().translate(batch, first)

    found = latency(Counted(network(), IMAGE), 2, 32, 64)
    assert found | {"runs": 5, "batch": 2, "size": [32, 64], "gpu": None} == found
    assert 0 < found["ms"] < 60_000
    assert calls == [(2, 3, 32, 64)] * 10

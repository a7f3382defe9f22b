import copy
import math

import onnx
import pytest
import torch
from onnx import numpy_helper

from fastpix2pix.building.gate import TOLERANCES, ImageParity, Parity, Tolerance, compare, tolerance
from fastpix2pix.building.onnx_graph import export_onnx
from fastpix2pix.building.stand_in import stand_in
from fastpix2pix.config import Form, Generator, Modes
from fastpix2pix.errors import CheckFailed
from fastpix2pix.model import build_generator

IMAGE = Modes()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = build_generator(Generator(depth=5, ngf=4))
    with torch.no_grad():
        net.up[-1].conv.weight.mul_(10)
    return net.eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return [(f"image {i}", torch.randint(0, 256, (3, 64, 32), dtype=torch.uint8)) for i in range(5)]


def run_of(net, modes=IMAGE):
    def run(batch, first):
        with torch.no_grad():
            return net(batch, modes, first)

    return run


def parity_of(net, other, images, precision="fp32", modes=IMAGE):
    return compare(net, modes, run_of(other, modes), "PyTorch", images, tolerance(precision))


def test_the_generator_itself_passes_with_no_difference(net, images):
    found = parity_of(net, net, images)
    found.check()
    assert found.worst() == {"max": 0, "mean": 0, "psnr": math.inf, "ssim": 1}
    assert found.as_dict()["worst"]["psnr"] is None
    assert [i.name for i in found.images] == [name for name, _ in images]


def test_figures_are_those_of_the_8_bit_pictures(net, images):
    def brighter(batch, first):
        return run_of(net)(batch, first).clamp(-1, 1 - 6 / 127.5) + 3 / 127.5

    base = compare(net, IMAGE, brighter, "x", images[:1], tolerance("bf16")).images[0]
    with torch.no_grad():
        y = net(images[0][1][None] / 127.5 - 1, IMAGE)
    levels = [((p + 1) * 127.5).round() for p in (y.clamp(-1, 1 - 6 / 127.5) + 3 / 127.5, y)]
    wanted = (levels[0] - levels[1]).abs()
    assert base.max == wanted.max()
    assert base.mean == pytest.approx(float(wanted.mean()), rel=1e-6)
    mse = float((wanted / 255).square().mean())
    assert base.psnr == pytest.approx(10 * math.log10(1 / mse), abs=1e-3)
    assert 0 < base.ssim < 1


@pytest.mark.parametrize("precision", sorted(TOLERANCES))
def test_a_damaged_model_is_rejected_at_every_precision(net, images, precision):
    """One convolution of the ten has its sign turned."""
    damaged = copy.deepcopy(net)
    with torch.no_grad():
        damaged.up[3].conv.weight.neg_()
    with pytest.raises(CheckFailed, match=r"5 of 5 images differ too much.*PyTorch") as error:
        parity_of(net, damaged, images, precision).check()
    assert "Nothing was written" in str(error.value)


def test_a_damaged_file_is_rejected(net, images, tmp_path):
    """One number in one weight of the exported graph, as a flipped bit of its exponent leaves it."""
    path = tmp_path / "g.onnx"
    export_onnx(net, IMAGE, path, Form("fp16", 1, 64, 32), record={})
    run, ran = stand_in(path)
    compare(net, IMAGE, run, ran, images, tolerance("fp16")).check()
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == "up.3.weight")
    weight = numpy_helper.to_array(tensor).copy()
    weight.flat[0] = 4096
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, path)
    run, ran = stand_in(path)
    with pytest.raises(CheckFailed, match="5 of 5 images"):
        compare(net, IMAGE, run, ran, images, tolerance("fp16")).check()


@pytest.mark.parametrize("precision", sorted(TOLERANCES))
def test_a_picture_that_is_not_finite_is_rejected(net, images, precision):
    def run(batch, first):
        y = run_of(net)(batch, first).clone()
        if first == 2:
            y[0, 0, 0, 0] = math.nan
        return y

    found = compare(net, IMAGE, run, "x", images, tolerance(precision))
    assert [i.name for i in found.failed] == ["image 2"]
    with pytest.raises(CheckFailed, match=r"1 of 5 images.*image 2: max difference nan"):
        found.check()


def test_one_bad_pixel_is_rejected_though_the_means_are_good(net, images):
    def run(batch, first):
        y = run_of(net)(batch, first).clone()
        y[0, 0, 0, 0] = -y[0, 0, 0, 0].sign()
        return y

    with pytest.raises(CheckFailed, match="max difference"):
        compare(net, IMAGE, run, "x", images, tolerance("fp16")).check()


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_a_batch_is_compared_image_by_image(net, images, batch):
    sizes = []

    def run(x, first):
        sizes.append((first, tuple(x.shape[2:]), len(x)))
        y = run_of(net)(x, first).clone()
        y[-1] = -y[-1]
        return y

    mixed = [*images[:3], ("wide", images[3][1].transpose(1, 2)), images[4]]
    found = compare(net, IMAGE, run, "x", mixed, tolerance("int8"), batch)
    assert [i.name for i in found.images] == [name for name, _ in mixed]
    assert sum(n for *_, n in sizes) == 5
    assert max(n for *_, n in sizes) == min(batch, 3)
    wrong = [mixed[first + n - 1][0] for first, _, n in sizes]
    assert sorted(i.name for i in found.failed) == sorted(wrong), "the last of each batch, and no other"


def test_random_noise_is_the_same_on_both_sides(net, images):
    random = Modes(noise="random", seed=4)
    parity_of(net, net, images, modes=random).check()
    shifted = compare(net, random, lambda x, i: run_of(net, random)(x, i + 1), "x", images, tolerance("int8"))
    assert len(shifted.failed) == len(images)


def test_the_worst_three_are_named_the_worst_first():
    rows = tuple(ImageParity(f"i{n}", 9, float(n), 60, 1) for n in range(5))
    with pytest.raises(CheckFailed, match=r"4 of 5 .*: i4: mean .*; i3: .*; i2: .*; and 1 more"):
        Parity("x", rows, Tolerance(9, 0.5, 50, 0.9)).check()


def test_tolerances_asked_for_replace_the_table():
    assert tolerance("fp16") == TOLERANCES["fp16"]
    assert tolerance("fp16", mean_difference=2.0) == Tolerance(255, 2.0, 0, -1)
    assert tolerance("fp16", 3.0, 2.0) == Tolerance(3.0, 2.0, 0, -1)

"""int8 and fp8: where the nodes are, what the scales are, how good the pictures are."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fastpix2pix.building.onnx_graph import export_onnx
from fastpix2pix.building.samples import Samples, samples
from fastpix2pix.building.stand_in import stand_in
from fastpix2pix.config import Build, Form, Generator, Modes

FP8 = onnx.TensorProto.FLOAT8E4M3FN


def exported(net, path, precision, images, modes=None, **form):
    shape = {"batch": None, "height": images[0].shape[2], "width": images[0].shape[3]} | form
    export_onnx(net, modes or Modes(), path, Form(precision, **shape), record={}, calibration=images)
    return onnx.load(path)


@pytest.fixture(scope="module")
def facades_in() -> Samples:
    """Painted facades as the inputs of a generator, 64x64."""
    return samples(Build(calibration_images=4, gate_images=4), Generator(depth=5), "AtoB", ((64, 64),), True)


@pytest.mark.parametrize("precision, kind, largest", [("int8", onnx.TensorProto.INT8, 127), ("fp8", FP8, 448)])
def test_nodes_and_scales(network, facades_in, tmp_path, precision, kind, largest):
    """Input and weight of every convolution but the first and the last; symmetric; a scale per output channel."""
    net = network()
    images = facades_in.calibration
    model = exported(net, tmp_path / "x.onnx", precision, images)
    tensors = {i.name: i for i in model.graph.initializer}
    made_by = {out: node for node in model.graph.node for out in node.output}
    convolutions = [n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose")]
    assert len(convolutions) == 10
    for node in (convolutions[0], convolutions[-1]):
        assert tensors[node.input[1]].data_type == onnx.TensorProto.FLOAT16
        assert getattr(made_by.get(node.input[0]), "op_type", "") != "DequantizeLinear"
    blocks = [*net.down, *net.up]
    for block, node in list(zip(blocks, convolutions, strict=True))[1:-1]:
        given, weight = (made_by[name] for name in node.input[:2])
        assert (given.op_type, weight.op_type) == ("DequantizeLinear",) * 2
        assert made_by[given.input[0]].op_type == "QuantizeLinear"
        for dequantise in (given, weight):
            zero = tensors[dequantise.input[2]]
            assert zero.data_type == kind
            assert not numpy_helper.to_array(zero).astype(np.float32).any()
        axis = onnx.helper.get_node_attr_value(weight, "axis")
        assert axis == (0 if node.op_type == "Conv" else 1)
        steps = numpy_helper.to_array(tensors[weight.input[1]]).astype(np.float32)
        others = tuple(d for d in range(4) if d != axis)
        real = block.conv.weight.detach().numpy()
        np.testing.assert_allclose(steps, np.abs(real).max(others) / largest, rtol=2e-3)
        shape = [-1 if d == axis else 1 for d in range(4)]
        levels = numpy_helper.to_array(tensors[weight.input[0]]).astype(np.float32)
        # half a step of int8 and what fp16 adds; of fp8 half a step of 3 bits, or of the least numbers
        allowed = 0.6 if precision == "int8" else 2**-4 * np.abs(real) / steps.reshape(shape) * 1.01 + 2**-10
        assert (np.abs(levels - real / steps.reshape(shape)) <= allowed).all()


def test_activation_scales_cover_what_was_seen(network, tmp_path):
    """The largest magnitude on the calibration images, here of the one layer that is known without running the net."""
    net = network()
    seen = [torch.full((1, 3, 32, 32), level) for level in (-0.25, 0.5)]
    model = exported(net, tmp_path / "x.onnx", "int8", seen)
    first = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    scale = next(numpy_helper.to_array(i) for i in model.graph.initializer if i.name == first.input[1])
    with torch.no_grad():
        largest = max(torch.nn.functional.leaky_relu(net.down[0](x), 0.2).abs().max().item() for x in seen)
    assert float(scale) == pytest.approx(largest / 127, rel=2e-3)


@pytest.mark.parametrize(
    "precision, modes, form, least, why",
    [
        ("int8", Modes("image"), {}, 30, "norms between"),
        (
            "int8",
            Modes("running", "random"),
            {"pixels": "uint8", "height": None, "width": None},
            30,
            "folded; masks and 8-bit images to calibrate on",
        ),
        ("int8", Modes("running", "fixed"), {"batch": 2}, 30, "a fixed batch"),
        ("fp8", Modes("running"), {}, 23, "3 bits of mantissa"),
    ],
)
def test_pictures_are_near_the_generators(network, facades_in, tmp_path, precision, modes, form, least, why):
    """PSNR over images that were not calibrated on, in dB of the range of 2."""
    net = network(ngf=8)
    exported(net, tmp_path / "x.onnx", precision, facades_in.calibration, modes, **form)
    run, _ = stand_in(tmp_path / "x.onnx")
    x = torch.stack([image for _, image in facades_in.gate]) / 127.5 - 1
    with torch.no_grad():
        wanted = net(x, modes)
    got = run(x, 0)
    psnr = 10 * torch.log10(4 / (got - wanted).square().mean())
    assert wanted.std() > 0.1
    assert least <= psnr < 60, why  # the upper bound: something was quantised


def test_channels_that_are_zero_or_tiny_stay_finite(network, facades_in, tmp_path):
    """A dead channel has no largest magnitude; a tiny one's scale is below what fp16 holds."""
    net = network()
    with torch.no_grad():
        net.down[2].conv.weight[0] = 0
        net.up[1].conv.weight[:, 1] = 1e-7
    for precision in ("int8", "fp8"):
        model = exported(net, tmp_path / "x.onnx", precision, facades_in.calibration)
        scales = [numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith("_scale")]
        assert len(scales) == 16 and all((s > 0).all() and np.isfinite(s).all() for s in scales)
        run, _ = stand_in(tmp_path / "x.onnx")
        assert run(facades_in.calibration[0], 0).isfinite().all()

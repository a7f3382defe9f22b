"""The graph that is exported is the generator, for every architecture, mode and form. Nothing is exported here."""

import pytest
import torch
import torch.nn.functional as F

from fastpix2pix.building.exportable import Exportable, transposed_as_conv
from fastpix2pix.config import Form, Modes
from fastpix2pix.data.images import to_uint8, to_unit
from fastpix2pix.errors import InputError
from fastpix2pix.runtime.masks import Masks

ANY = Form(batch=None, height=None, width=None)
ARCHITECTURES = [
    ({}, "batch norm, transposed convolutions"),
    ({"norm": "instance"}, "convolutions with a bias that the norm takes out"),
    ({"norm": "none", "dropout": "none"}, "nothing to fold"),
    ({"kind": "encoder_decoder"}, "no skips"),
    ({"up": "resize"}, "nearest and 3x3 convolution"),
    ({"up": "resize", "norm": "instance", "kind": "encoder_decoder"}, "all of them"),
    ({"depth": 7, "dropout": "junyanz"}, "two blocks with dropout, not the first"),
    ({"in_channels": 1, "out_channels": 4}, "gray to four"),
    ({"in_channels": 4, "out_channels": 2, "ngf": 6}, "odd numbers of channels"),
]


@pytest.mark.parametrize("noise", ["off", "fixed", "random"])
@pytest.mark.parametrize("norm_stats", ["image", "running"])
@pytest.mark.parametrize("options, why", ARCHITECTURES)
def test_fp32_is_the_generator(network, pictures, options, why, norm_stats, noise):
    net, modes = network(**options), Modes(norm_stats, noise, seed=5)
    if options.get("norm") == "instance" and norm_stats == "running":
        with pytest.raises(InputError, match="has no running statistics"):
            Exportable(net, modes, ANY)
        return
    side = net.config.multiple
    x = pictures(2, net.config.in_channels, side, 2 * side)
    with torch.no_grad():
        wanted = net(x, modes, 3)
        for form in (ANY, Form(batch=None, height=side, width=2 * side)):
            masks = Masks(net.config, modes, form)
            given = [masks(name, 2, side, 2 * side, 3) for name in masks.names]
            got = Exportable(net, modes, form).eval()(x, *given)
            assert (got - wanted).abs().max() <= 1e-5, why
    assert wanted.std() > 0.02


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
def test_a_transposed_convolution_is_a_convolution_and_depth_to_space(size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 4, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    got = F.pixel_shuffle(F.conv2d(x, transposed_as_conv(weight), padding=1), 2)
    torch.testing.assert_close(got, F.conv_transpose2d(x, weight, stride=2, padding=1), rtol=0, atol=1e-12)


def test_running_statistics_are_folded_before_rounding(network):
    """A channel whose raw weight is below the smallest fp16 number, and whose folded one is not."""
    net = network(norm="batch")
    block = net.down[1]
    with torch.no_grad():
        block.conv.weight[0] = 1e-9
        block.norm.running_var[0], block.norm.weight[0] = 0.0, 1.0
    folded = Exportable(net, Modes("running"), Form("fp16")).down[1].weight[0]
    wanted = 1e-9 / (1e-5**0.5)
    assert block.conv.weight[0].half().count_nonzero() == 0
    torch.testing.assert_close(folded.float(), torch.full_like(folded, wanted).float(), rtol=0.1, atol=0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("norm_stats", ["image", "running"])
def test_half_is_about_as_good_as_torch_autocast(network, pictures, precision, norm_stats):
    """The two-error rule: no further from fp32 than twice what autocast's half generator is."""
    net, modes = network(), Modes(norm_stats)
    x, dtype = pictures(2, 3, 64, 64), {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    with torch.no_grad():
        wanted = net(x, modes)
        with torch.autocast("cpu", dtype=dtype):
            half = net(x, modes).float()
        got = Exportable(net, modes, Form(precision, None, 64, 64)).eval()(x)
    allowed = (half - wanted).abs()
    assert allowed.max() > 0
    assert (got - wanted).abs().max() <= 2 * allowed.max() + 1e-5
    assert (got - wanted).abs().mean() <= 2 * allowed.mean() + 1e-6


def test_uint8_rounds_as_the_pictures_of_infer(network, pictures):
    net, modes = network(), Modes()
    x = pictures(2, 3, 64, 32)
    with torch.no_grad():
        wanted = to_uint8(net(x, modes)).permute(0, 2, 3, 1)
        given = to_uint8(x).permute(0, 2, 3, 1)
        got = Exportable(net, modes, Form(batch=2, height=64, width=32, pixels="uint8")).eval()(given)
    assert got.dtype == torch.uint8 and got.shape == (2, 64, 32, 3)
    assert torch.equal(to_unit(to_uint8(x)), x)
    assert (got != wanted).float().mean() < 1e-3  # a value on the border of two levels
    assert (got.int() - wanted.int()).abs().max() <= 1


def test_the_network_is_left_alone(network):
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    graph = Exportable(net, Modes("running"), Form("fp16"))
    for buffer in graph.buffers():
        buffer.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

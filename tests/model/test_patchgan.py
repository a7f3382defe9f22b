"""The discriminator: the paper's numbers, receptive fields by gradient, refusals."""

import pytest
import torch
from torch import nn

from fastpix2pix.config import Discriminator
from fastpix2pix.errors import InputError
from fastpix2pix.model import PatchGAN, build_discriminator
from fastpix2pix.model.patchgan import output_size
from fastpix2pix.model.unet import parameter_count

RECEPTIVE_FIELDS = {0: 1, 1: 16, 2: 34, 3: 70, 4: 142, 5: 286}
OUTPUT_SIZES_AT_256 = {0: 256, 1: 126, 2: 62, 3: 30, 4: 14, 5: 6}


def _meta(config):
    with torch.device("meta"):
        return PatchGAN(config)


def test_patchgan_70_is_the_papers():
    net = _meta(Discriminator())
    assert parameter_count(net) == 2_768_705
    assert len(net.state_dict()) == 22
    convs = [block.conv for block in net.blocks]
    assert [c.out_channels for c in convs] == [64, 128, 256, 512, 1]
    assert [c.stride[0] for c in convs] == [2, 2, 2, 1, 1]
    assert [c.bias is not None for c in convs] == [True, False, False, False, True]
    assert [isinstance(block.norm, nn.BatchNorm2d) for block in net.blocks] == [False, True, True, True, False]


@pytest.mark.parametrize("n", range(6))
def test_output_sizes(n):
    net = _meta(Discriminator(n_layers=n))
    side = OUTPUT_SIZES_AT_256[n]
    assert output_size(n, 256) == side
    assert net(torch.zeros(1, 6, 256, 256, device="meta")).shape == (1, 1, side, side)
    for size in (131, 200, 257):  # odd sizes
        shape = net(torch.zeros(2, 6, size, 256, device="meta")).shape
        assert shape == (2, 1, output_size(n, size), side)


@pytest.mark.parametrize("n", range(6))
def test_receptive_field_by_gradient(n):
    """The pixels one logit depends on, without a norm: image statistics would make it depend on all."""
    torch.manual_seed(0)
    net = PatchGAN(Discriminator(in_channels=1, ndf=1, n_layers=n, norm="none")).double()
    x = torch.rand(1, 1, 512, 512, dtype=torch.float64, requires_grad=True)
    logits = net(x)
    centre = logits.shape[2] // 2
    logits[0, 0, centre, centre].backward()
    rows, columns = x.grad[0, 0].nonzero().unbind(1)
    for side in (rows, columns):
        assert side.max() - side.min() + 1 == RECEPTIVE_FIELDS[n]
        assert side.min() > 0
        assert side.max() < 511


@pytest.mark.parametrize(
    ("n", "norm", "biases"),
    [
        (0, "batch", [True, False, False]),
        (0, "instance", [True, True, True]),
        (1, "none", [True, False, True]),
        (2, "instance", [True, True, True, True]),
        (5, "batch", [True] + [False] * 5 + [True]),
    ],
)
def test_biases_and_channels(n, norm, biases):
    net = _meta(Discriminator(in_channels=3, ndf=8, n_layers=n, norm=norm))
    assert [block.conv.bias is not None for block in net.blocks] == biases
    widths = [8, 16, 1] if n == 0 else [8 * min(2**i, 8) for i in range(n + 1)] + [1]
    assert [block.conv.out_channels for block in net.blocks] == widths
    if n == 0:
        assert all(block.conv.kernel_size == (1, 1) for block in net.blocks)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_logits_train_and_eval(norm):
    torch.manual_seed(0)
    net = build_discriminator(Discriminator(ndf=4, n_layers=2, norm=norm))
    x = torch.rand(2, 6, 32, 32) * 2 - 1
    logits = net(x)
    assert logits.shape == (2, 1, 6, 6)
    assert logits.std() > 0
    logits.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert (net.eval()(x) - logits).abs().max() > 1e-4 if norm == "batch" else torch.equal(net.eval()(x), logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16


def test_features_stay_channels_last():
    net, seen = build_discriminator(Discriminator(ndf=4)), []
    for block in net.blocks[:-1]:
        block.register_forward_hook(lambda m, i, o: seen.append(o.is_contiguous(memory_format=torch.channels_last)))
    net(torch.zeros(2, 6, 64, 64))
    assert seen == [True] * 4


@pytest.mark.parametrize(("n", "least"), [(0, 1), (1, 6), (2, 12), (3, 24), (4, 48), (5, 96)])
def test_least_size(n, least):
    net = _meta(Discriminator(n_layers=n)).eval()
    assert net(torch.zeros(1, 6, least, least, device="meta")).shape == (1, 1, 1, 1)
    with pytest.raises(
        InputError, match=f"of {least - 1} pixels: .* n_layers = {n} needs at least {least}; use a larger"
    ):
        net(torch.zeros(1, 6, 256, least - 1, device="meta"))
    with pytest.raises(InputError, match="needs at least"):
        output_size(n, least - 1)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (6, 64, 64)])
def test_bad_inputs_are_refused(shape):
    with pytest.raises(InputError, match=r"takes \[N, 6, H, W\]"):
        _meta(Discriminator())(torch.zeros(shape, device="meta"))


def test_repr_names_the_architecture():
    text = repr(_meta(Discriminator(n_layers=1)))
    assert "PatchGAN(" in text
    assert "n_layers=1" in text
    assert "Conv2d(6, 64, kernel_size=(4, 4)" in text

import pytest
import torch

from fastpix2pix.config import Form, Generator, Modes
from fastpix2pix.model import build_generator
from fastpix2pix.runtime.masks import Masks, mask_inputs, mask_shape

ANY_SIZE = Form(height=None, width=None)


@pytest.mark.parametrize(
    "options, modes, form, blocks, why",
    [
        ({}, Modes(), ANY_SIZE, [], "no noise"),
        ({}, Modes(noise="fixed"), Form(), [], "baked into a graph of fixed size"),
        ({}, Modes(noise="fixed"), ANY_SIZE, [0, 1, 2], "paper"),
        ({}, Modes(noise="random"), Form(), [0, 1, 2], "random is never baked"),
        ({"dropout": "junyanz", "depth": 8}, Modes(noise="random"), Form(), [1, 2, 3], "junyanz"),
        ({"dropout": "junyanz"}, Modes(noise="random"), Form(), [], "junyanz has none at depth 5"),
        ({"dropout": "none"}, Modes(noise="random"), Form(), [], "no dropout"),
    ],
)
def test_which_inputs_there_are(options, modes, form, blocks, why):
    config = Generator(**{"depth": 5, "ngf": 4, **options})
    assert list(mask_inputs(config, modes, form).values()) == blocks, why


@pytest.mark.parametrize("noise", ["fixed", "random"])
@pytest.mark.parametrize("kind", ["unet", "encoder_decoder"])
def test_masks_are_those_the_network_multiplies_with(noise, kind):
    """Each block's output, with the mask, is its output without noise times the mask: hooks see both."""
    torch.manual_seed(0)
    net = build_generator(Generator(kind=kind, depth=5, ngf=4)).eval()
    modes = Modes(noise=noise, seed=3)
    masks = Masks(net.config, modes, ANY_SIZE)
    seen = {}
    for block in net.up:
        if block.dropout is not None:
            block.dropout.register_forward_hook(
                lambda module, given, out: seen.__setitem__(module.block, (given[0].clone(), out.clone()))
            )
    with torch.no_grad():
        net(torch.rand(2, 3, 64, 96) * 2 - 1, modes, 5)
    assert sorted(seen) == sorted(masks.names.values()) == [0, 1, 2]
    for name, block in masks.names.items():
        mask = masks(name, 2, 64, 96, 5)
        given, out = seen[block]
        assert tuple(mask.shape) == ((2 if noise == "random" else 1), *mask_shape(net.config, block, 64, 96))
        assert mask.dtype == torch.uint8
        assert mask.is_contiguous()
        assert torch.equal(given * mask, out)
        assert set(mask.unique().tolist()) == {0, 2}


def test_fixed_masks_are_made_once_and_random_ones_by_number():
    config = Generator(depth=5, ngf=4)
    fixed = Masks(config, Modes(noise="fixed"), ANY_SIZE)
    assert fixed("mask_0", 1, 64, 64, 0) is fixed("mask_0", 3, 64, 64, 9)
    drawn = Masks(config, Modes(noise="random"), ANY_SIZE)
    both = drawn("mask_0", 2, 64, 64, 4)
    assert torch.equal(both[1:], drawn("mask_0", 1, 64, 64, 5))
    assert not torch.equal(both[:1], both[1:])

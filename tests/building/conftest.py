"""A small generator of any architecture, and pictures for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastpix2pix.config import Generator
from fastpix2pix.model import Unet, build_generator


def make_network(**options) -> Unet:
    """Uneven gamma and beta, running statistics as after some training, outputs over most of [-1, 1] in both modes."""
    torch.manual_seed(0)
    net = build_generator(Generator(**({"depth": 5, "ngf": 4} | options)))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        net.up[-1].conv.weight.mul_(10)
        if net.config.norm == "none":  # what a norm would make of the activations
            for block in (*net.down, *net.up):
                block.conv.weight.mul_(5)
        side = 2 * net.config.multiple
        for i in range(20):
            net(make_pictures(2, net.config.in_channels, side, side, seed=100 + i))
    return net.eval()


def make_pictures(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """[count, channels, height, width] fp32: 8-bit levels in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, height, width), generator=generator) / 127.5 - 1


@pytest.fixture
def network() -> Callable[..., Unet]:
    return make_network


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    return make_pictures

"""A small generator of any architecture, and pictures for it."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastpix2pix.building.onnx_graph import OnnxFile, export_onnx
from fastpix2pix.config import Form, Generator, Modes
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


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Callable[..., OnnxFile]:
    """`exports(form, modes, **options)` of make_network(**options), each made once; int8 and fp8 see two pictures."""
    made: dict[str, OnnxFile] = {}

    def get(form: Form, modes: Modes | None = None, **options) -> OnnxFile:
        modes = modes or Modes()
        key = repr((dataclasses.astuple(form), dataclasses.astuple(modes), sorted(options.items())))
        if key not in made:
            net, path = make_network(**options), tmp_path_factory.mktemp("exports") / "g.onnx"
            side = form.height or net.config.multiple
            seen = make_pictures(2, net.config.in_channels, side, form.width or side).split(1)
            calibration = seen if form.precision in ("int8", "fp8") else ()
            made[key] = export_onnx(net, modes, path, form, record={}, calibration=calibration)
        return made[key]

    return get

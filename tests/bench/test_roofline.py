"""The roofline against numbers found in other ways: by counting, by torch's own counter, and by a published draft."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import roofline
from bench.roofline import (
    DEVICES,
    FULL,
    NODE_US,
    inference_work,
    layer_costs,
    live_weights,
    named_device,
    training_work,
)
from fastpix2pix.config import train_config
from fastpix2pix.model import PatchGAN, Unet
from fastpix2pix.training.layers import discriminator_layers, generator_layers

ODD = {"depth": 5, "ngf": 4, "ndf": 6, "n_layers": 2, "crop_size": 96, "in_channels": 1, "up": "resize"}
PAPER = train_config()


@pytest.mark.parametrize(
    "options", [{}, ODD, {"crop_size": 32, "depth": 5, "n_layers": 1}], ids=["paper", "odd", "small"]
)
def test_forward_operations_are_those_torch_counts(options):
    config = train_config(**options)
    size, images = config.data.crop_size, 2
    for net, layers, channels in (
        (Unet(config.generator), generator_layers(config, images), config.generator.in_channels),
        (PatchGAN(config.discriminator()), discriminator_layers(config, images), config.discriminator().in_channels),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.to("meta")(torch.empty(images, channels, size, size, device="meta"))
        assert sum(layer_costs(layer)["forward"].flops for layer in layers) == counter.get_total_flops()


@pytest.mark.parametrize("options", [ODD, {"crop_size": 32, "depth": 5, "ngf": 4, "n_layers": 1}], ids=["odd", "small"])
def test_useful_operations_and_live_weights_are_found_by_convolving_ones(options):
    """With ones everywhere an output is the number of its products; a dead tap's gradient is 0."""
    config = train_config(**options)
    for layer in [*generator_layers(config, 1), *discriminator_layers(config, 1)]:
        x, w = torch.ones(layer.x, dtype=torch.float64), torch.ones(layer.w, dtype=torch.float64, requires_grad=True)
        if layer.node.kind == "resize":
            x = F.interpolate(x, scale_factor=2.0)
        product = F.conv_transpose2d if layer.node.kind == "transposed" else F.conv2d
        y = product(x, w, stride=layer.node.stride, padding=layer.node.padding)
        assert tuple(y.shape) == layer.y
        y.sum().backward()
        for cost in layer_costs(layer).values():
            assert cost.useful == 2 * y.sum().item()
        assert live_weights(layer) == int((w.grad != 0).sum())


def test_bytes_of_one_layer_by_hand():
    """generator.down.1 of the paper at batch 2: 64 x 128 x 128 in, 128 x 64 x 64 out, 4x4, normalised."""
    layer = generator_layers(PAPER, 2)[1]
    x, y, w = 2 * 64 * 128 * 128, 2 * 128 * 64 * 64, 128 * 64 * 16
    costs = layer_costs(layer)
    assert costs["forward"].bytes == 2 * (x + y + w)
    assert costs["dgrad"].bytes == 2 * (2 * y + 2 * x + w)
    assert costs["wgrad"].bytes == 2 * (2 * y + x) + 4 * w
    assert layer_costs(layer, FULL)["forward"].bytes == 4 * (x + y + w)


def test_dead_taps_of_the_innermost_layers():
    layers = generator_layers(PAPER, 1)
    dead = {layer.name: torch.Size(layer.w).numel() - live_weights(layer) for layer in layers}
    assert {name: count for name, count in dead.items() if count} == {
        "generator.down.7": 3_145_728,
        "generator.up.0": 3_145_728,
    }


@pytest.mark.parametrize(
    ("batch", "maps", "kernels", "update", "total"),
    [(1, 190, 226, 1730, 2146), (16, 3038, 226, 1730, 4994), (64, 12150, 226, 1730, 14106)],
)
def test_megabytes_of_a_step(batch, maps, kernels, update, total):
    work = training_work(PAPER, batch)
    found = [work.activation_bytes, work.weight_bytes, work.update_bytes, work.bytes]
    assert [b / 1e6 for b in found] == pytest.approx([maps, kernels, update, total], abs=1)


def test_operations_of_a_step():
    assert training_work(PAPER, 1).flops / 1e9 == pytest.approx(87.7, abs=0.05)
    assert inference_work(PAPER, 1).flops / 1e9 == pytest.approx(12.10, abs=0.005)
    assert training_work(PAPER, 16).flops == 16 * training_work(PAPER, 1).flops
    l1 = training_work(train_config(objective="l1"), 1)
    assert not any("discriminator" in cost.layer for cost in l1.products)
    assert l1.flops < training_work(PAPER, 1).flops / 2


@pytest.mark.parametrize(
    ("card", "batch", "floor", "with_launches"),
    [
        ("A100", 1, 1.208, 1.227),
        ("A100", 64, 19.965, 19.966),
        ("H100", 1, 0.661, 0.707),
        ("H100", 64, 7.240, 7.246),
        ("H200", 1, 0.480, 0.538),
        ("H200", 64, 6.597, 6.605),
    ],
)
def test_floors_of_a_step(card, batch, floor, with_launches):
    work = training_work(PAPER, batch)
    assert work.floor_ms(DEVICES[card]) == pytest.approx(floor, abs=0.0006)
    assert work.floor_ms(DEVICES[card], NODE_US) == pytest.approx(with_launches, abs=0.0006)


@pytest.mark.parametrize(
    ("card", "batch", "floor", "with_launches"),
    [("A100", 1, 0.0748, 0.0775), ("H100", 16, 0.2334, 0.2361), ("H200", 1, 0.0280, 0.0371)],
)
def test_floors_of_a_translation(card, batch, floor, with_launches):
    work = inference_work(PAPER, batch)
    assert work.floor_ms(DEVICES[card]) == pytest.approx(floor, abs=0.0001)
    assert work.floor_ms(DEVICES[card], NODE_US) == pytest.approx(with_launches, abs=0.0001)


def test_other_sizes_and_networks_scale_as_they_must():
    big, small = inference_work(train_config(crop_size=512), 1), inference_work(PAPER, 4)
    assert big.flops == small.flops  # four times the pixels are four images
    assert big.activation_bytes == small.activation_bytes
    narrow = inference_work(train_config(ngf=32), 1)
    assert 3.8 < inference_work(PAPER, 1).flops / narrow.flops < 4
    without = training_work(train_config(kind="encoder_decoder"), 1)
    assert without.other_bytes == 0 and without.flops < training_work(PAPER, 1).flops


def test_cards_are_found_by_what_the_driver_calls_them():
    for name, key in (
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
    ):
        assert named_device(name) is DEVICES[key]
    for name in ("NVIDIA L40S", "Tesla T4", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert named_device(name) is None
    assert all(device.source for device in DEVICES.values())


def test_tables(capsys):
    assert roofline.main(["--devices", "L4,Orin", "--batches", "1,4", "--size", "64", "--depth", "6", "--layers"]) == 0
    out = capsys.readouterr().out
    assert "| training step | 4 |" in out and "AGX Orin us" in out
    assert out.count("| generator.") == 3 * 12 and out.count("| discriminator.") == 3 * 5
    with pytest.raises(SystemExit):
        roofline.main(["--devices", "H100,TPU"])
    assert "--devices TPU: allowed are A100" in capsys.readouterr().err

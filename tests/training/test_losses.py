"""The adversarial losses against the formulas, in float64."""

import math

import pytest
import torch

from fastpix2pix.training.losses import gan_loss, seen_by_discriminator

LOGITS = torch.tensor([[[[-3.0, -0.5], [0.0, 40.0]]], [[[1e-3, 2.0], [-40.0, 7.0]]]])


@pytest.mark.parametrize("real", [True, False])
def test_bce_is_minus_log_probability(real):
    # -log sigmoid(z) = log(1 + e^-z), and for fake -log(1 - sigmoid(z)) = log(1 + e^z)
    sign = -1 if real else 1
    expected = sum(math.log1p(math.exp(sign * z)) for z in LOGITS.double().flatten().tolist()) / LOGITS.numel()
    assert gan_loss(LOGITS, real).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("real", [True, False])
def test_lsgan_is_the_squared_distance(real):
    expected = sum((z - real) ** 2 for z in LOGITS.double().flatten().tolist()) / LOGITS.numel()
    assert gan_loss(LOGITS, real, "lsgan").item() == pytest.approx(expected, rel=1e-6)


def test_half_logits_give_an_fp32_loss():
    assert gan_loss(LOGITS.bfloat16(), True).dtype == torch.float32


def test_condition_comes_first():
    x, image = torch.zeros(1, 3, 2, 2), torch.ones(1, 2, 2, 2)
    assert seen_by_discriminator(x, image, True)[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1]
    assert seen_by_discriminator(x, image, False) is image

"""Normalisation, test-time noise and initialisation."""

import pytest
import torch
from torch import nn

from fastpix2pix.config import Discriminator, Generator, Modes
from fastpix2pix.model import Unet, build_discriminator, build_generator
from fastpix2pix.model.layers import CACHED_MASKS, Dropout, image_norm, init_weights, noise_mask

LAST = torch.channels_last


def _image(*shape, dtype=torch.float32, scale=3.0, shift=5.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)


def _train_norm(x, weight, bias):
    """What train-mode BatchNorm makes of each image alone."""
    rows = [nn.functional.batch_norm(i[None], None, None, weight, bias, training=True, eps=1e-5) for i in x]
    return torch.cat(rows)


SHAPES = [
    ((1, 8, 2, 2), "the innermost up-block"),
    ((1, 3, 5, 7), "odd"),
    ((4, 16, 9, 4), "a batch: images must not mix"),
    ((2, 1, 64, 64), "one channel"),
]


@pytest.mark.parametrize("shape", [s for s, _ in SHAPES], ids=[why for _, why in SHAPES])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_image_norm_is_train_batchnorm_at_batch_1(shape, memory_format):
    x = _image(*shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight, bias = _image(shape[1], dtype=torch.float64), _image(shape[1], dtype=torch.float64) - 7
    y = image_norm(x, weight, bias)
    torch.testing.assert_close(y, _train_norm(x, weight, bias), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(image_norm(x, None, None), nn.functional.instance_norm(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_image_norm_keeps_dtype_and_computes_in_fp32(dtype):
    # Around 5000 with a spread of 3000: fp16 sums of these overflow, half statistics would be far off.
    x = _image(2, 4, 32, 32, dtype=dtype, scale=3000.0, shift=5000.0).contiguous(memory_format=LAST)
    weight, bias = torch.full((4,), 1.5), torch.full((4,), 0.25)
    y = image_norm(x, weight, bias)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=LAST)
    exact = _train_norm(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(y, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_image_norm_gradient():
    x = _image(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.rand(3, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(image_norm, (x, weight, bias))


def test_noise_mask_is_pinned():
    """These numbers are part of the contract: the same model, seed and image give the same picture everywhere."""
    mask = noise_mask((2, 2, 4), 0, 1)
    assert mask.dtype == torch.uint8
    assert mask.shape == (1, 2, 2, 4)
    assert mask.flatten().tolist() == [2, 2, 2, 0, 2, 2, 2, 0, 0, 0, 0, 2, 0, 2, 0, 0]


def test_noise_mask_depends_on_the_whole_key_and_is_fair():
    keys = [(0, 1), (1, 1), (0, 2), (2**32, 1), (0, 1, 0), (0, 1, 1)]
    masks = [noise_mask((64, 8, 8), *key) for key in keys]
    for i, mask in enumerate(masks):
        assert set(mask.unique().tolist()) == {0, 2}
        assert abs(mask.float().mean().item() - 1.0) < 5 / 64  # 5 standard deviations of 4096 draws
        assert torch.equal(mask, noise_mask((64, 8, 8), *keys[i]))
        for other in masks[:i]:
            assert 0.45 < (mask == other).float().mean() < 0.55


def test_noise_draws_leave_the_global_generator_alone():
    layer, x = Dropout(0).eval(), _image(2, 4, 3, 3)
    before = torch.get_rng_state()
    layer(x, Modes(noise="fixed"))
    layer(x, Modes(noise="random"))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_modes():
    layer, x = Dropout(2).eval(), torch.ones(3, 16, 4, 4).contiguous(memory_format=LAST)
    assert layer(x, Modes(noise="off")) is x
    fixed = layer(x, Modes(noise="fixed", seed=7))
    assert torch.equal(fixed[0], fixed[2])
    assert set(fixed.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(fixed, layer(x, Modes(noise="fixed", seed=8)))
    random = layer(x, Modes(noise="random", seed=7), 10)
    assert not torch.equal(random[0], random[1])
    assert torch.equal(random[2:], layer(x[:1], Modes(noise="random", seed=7), 12))
    for y in (fixed, random):
        assert y.is_contiguous(memory_format=LAST)
    layer.train()
    torch.manual_seed(3)
    drawn = layer(x, Modes(noise="off"))
    torch.manual_seed(3)
    assert torch.equal(drawn, nn.functional.dropout(x, 0.5))


def test_fixed_masks_are_cached_bounded_and_not_state():
    layer = Dropout(0).eval()
    for size in range(2, 2 + 2 * CACHED_MASKS):
        layer(torch.ones(1, 2, size, size), Modes(noise="fixed"))
    assert len(layer.fixed) == CACHED_MASKS
    assert not layer.state_dict()
    newest = next(reversed(layer.fixed.values()))
    layer(torch.ones(1, 2, size, size), Modes(noise="fixed"))
    assert next(reversed(layer.fixed.values())) is newest


def test_masks_made_under_inference_mode_serve_gradients_later():
    layer, x = Dropout(0).eval(), torch.ones(1, 4, 8, 8, requires_grad=True)
    with torch.inference_mode():
        layer(x, Modes(noise="fixed"))
    layer(x, Modes(noise="fixed")).sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}


def _check_init(net):
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            mean, spread = 0.0, 0.02
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            mean, spread = 1.0, 0.02
        else:
            continue
        count = module.weight.numel()
        assert abs(module.weight.mean().item() - mean) < 5 * spread / count**0.5
        assert abs(module.weight.std().item() - spread) < 5 * spread / (2 * count) ** 0.5
        assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("kind", ["generator", "discriminator", "resize", "sync"])
def test_init_statistics(kind):
    torch.manual_seed(0)
    config = Generator(depth=5, ngf=16, up="resize" if kind == "resize" else "transposed")
    net = build_discriminator(Discriminator(ndf=16)) if kind == "discriminator" else build_generator(config)
    if kind == "sync":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        assert sum(isinstance(m, nn.SyncBatchNorm) for m in net.modules()) == 7
        for p in net.parameters():
            nn.init.constant_(p, 9.0)
        init_weights(net)
    _check_init(net)


def test_init_is_drawn_from_the_generator_and_the_same_for_sync_batchnorm():
    config = Generator(depth=5, ngf=4)
    plain, sync = Unet(config), nn.SyncBatchNorm.convert_sync_batchnorm(Unet(config))
    plain.down[1].norm.running_mean.fill_(3.0)
    before = torch.get_rng_state()
    first = init_weights(plain, torch.Generator().manual_seed(5)).state_dict()
    second = init_weights(sync, torch.Generator().manual_seed(5)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not first["down.1.norm.running_mean"].any()
    other = init_weights(Unet(config), torch.Generator().manual_seed(6)).state_dict()
    assert not torch.equal(first["down.0.conv.weight"], other["down.0.conv.weight"])

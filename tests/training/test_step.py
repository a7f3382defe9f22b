"""One training step against the paper's formulas, written out by hand in float64."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fastpix2pix.config import Train, train_config
from fastpix2pix.training.state import LOSSES, State
from fastpix2pix.training.step import build_state

CPU = torch.device("cpu")
OBJECTIVES = ("l1", "gan", "cgan", "l1+gan", "l1+cgan")


def make(**options) -> tuple[Train, State, Tensor, Tensor]:
    base = {"depth": 5, "ngf": 8, "ndf": 8, "n_layers": 2, "crop_size": 32, "dropout": "none"}
    config = train_config(**{**base, **options})
    draws = torch.Generator().manual_seed(5)
    channels = config.generator.in_channels, config.generator.out_channels
    x, y = (torch.rand(2, c, 32, 32, generator=draws) * 2 - 1 for c in channels)
    return config, build_state(config, CPU), x, y


def softplus(z: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0)


def adversarial(z: Tensor, real: bool, kind: str) -> Tensor:
    if kind == "lsgan":
        return ((z - float(real)) ** 2).mean()
    return softplus(-z if real else z).mean()


def adam_once(net: nn.Module, loss: Tensor, config: Train) -> dict[str, Tensor]:
    """Adam's first step by hand; returns the gradients."""
    named = dict(net.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))
    with torch.no_grad():
        for name, p in named.items():
            g = gradients[name]
            m, v = (1 - config.beta1) * g, (1 - config.beta2) * g * g
            p -= config.lr * (m / (1 - config.beta1)) / ((v / (1 - config.beta2)).sqrt() + 1e-8)
    return gradients


@pytest.mark.parametrize("kind", ["bce", "lsgan"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_updates_of_every_ablation(objective, kind):
    config, state, x, y = make(objective=objective, gan_loss=kind, in_channels=2)
    g = deepcopy(state.generator).double()
    d = deepcopy(state.discriminator).double() if state.discriminator else None
    xd, yd = x.double(), y.double()

    def seen(image: Tensor) -> Tensor:
        return torch.cat((xd, image), 1) if "cgan" in objective else image

    fake = g(xd)
    expected = dict.fromkeys(LOSSES, 0.0)
    total = 0.0
    if d is not None:
        d_fake = adversarial(d(seen(fake.detach())), False, kind)
        d_real = adversarial(d(seen(yd)), True, kind)
        d_gradients = adam_once(d, (d_fake + d_real) / 2, config)
        g_gan = adversarial(d(seen(fake)), True, kind)  # through the updated discriminator
        expected |= {"d_fake": d_fake.item(), "d_real": d_real.item(), "g_gan": g_gan.item()}
        total = total + g_gan
    l1 = (yd - fake).abs().mean()
    expected["g_l1"] = l1.item()
    if "l1" in objective:
        total = total + 100 * l1
    g_gradients = adam_once(g, total, config)

    found = dict(zip(LOSSES, state.step(x, y, 0, config.lr).tolist(), strict=True))
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert_parameters_agree(state.generator, g, g_gradients)
    if d is not None:
        assert_parameters_agree(state.discriminator, d, d_gradients)
        found_buffers = dict(state.discriminator.named_buffers())
        for name, buffer in d.named_buffers():  # fake, then real, then fake again through the updated weights
            torch.testing.assert_close(found_buffers[name].double(), buffer.double(), rtol=1e-5, atol=1e-6)
        assert {b.item() for n, b in state.discriminator.named_buffers() if "tracked" in n} == {3}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_large_weights_in_nchw_change_no_number(monkeypatch, ema):
    options = {"objective": "l1+cgan", "norm": "batch", "ema": ema}
    config, plain, x, y = make(**options)
    monkeypatch.setattr("fastpix2pix.training.module_step.LARGE", 2000)
    _, mixed, _, _ = make(**options)
    nets = [(plain.generator, mixed.generator), (plain.discriminator, mixed.discriminator), (plain.model, mixed.model)]
    for _, net in nets:
        formats = {
            conv.weight.is_contiguous()
            for conv in net.modules()
            if isinstance(conv, nn.Conv2d) and conv.weight.shape[1] > 1
        }
        assert formats == {True, False}

    for number in range(3):
        losses = [state.step(x, y, number, config.lr) for state in (plain, mixed)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for net in (mixed.generator, mixed.discriminator):
        assert all(p.grad.stride() == p.stride() for p in net.parameters())
    for one, other in nets:
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0.5 * config.lr, msg=name)


def assert_parameters_agree(net: nn.Module, expected: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Adam divides a gradient by its own size: where it is rounding noise, the first update is noise of size lr."""
    compared = 0
    for (name, p), q in zip(net.named_parameters(), expected.parameters(), strict=True):
        size = gradients[name].abs()
        clear = (size > 1e-4 * size.max()) | (size == 0)  # exactly 0: taps that never touch a pixel
        torch.testing.assert_close(p.double()[clear], q[clear], rtol=1e-5, atol=2e-6)
        compared += int(clear.sum())
    assert compared > 0.8 * sum(p.numel() for p in net.parameters())


def test_without_l1_its_weight_changes_nothing():
    states = []
    for weight in (0.0, 100.0):
        config, state, x, y = make(objective="cgan", lambda_l1=weight)
        state.step(x, y, 0, config.lr)
        states.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*(s.generator.parameters() for s in states), strict=True))


def test_generator_step_leaves_no_gradient_in_the_discriminator():
    config, state, x, y = make()
    _, alone, _, _ = make()
    state.step(x, y, 0, config.lr)
    alone.discriminator_step(x, y, alone.generator(x).detach(), 0, config.lr)
    assert all(p.requires_grad for p in state.discriminator.parameters())
    for p, q in zip(state.discriminator.parameters(), alone.discriminator.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_ema_follows_its_formula():
    config, state, x, y = make(ema=0.9)
    start = {k: v.clone() for k, v in state.generator.named_parameters()}
    state.step(x, y, 0, config.lr)
    for name, kept in state.average.named_parameters():
        new = dict(state.generator.named_parameters())[name]
        torch.testing.assert_close(kept, 0.9 * start[name] + 0.1 * new)
    assert state.model is state.average
    stats = dict(state.generator.named_buffers())
    assert all(torch.equal(b, stats[n]) for n, b in state.average.named_buffers())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(precision):
    config, state, x, y = make(precision=precision)
    _, reference, _, _ = make()
    for step in range(5):
        half, full = (s.step(x, y, step, config.lr) for s in (state, reference))
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.02)
    assert not torch.equal(half, full)  # it really ran in half precision
    assert all(p.dtype == torch.float32 for p in state.generator.parameters())


def test_fp16_overflow_moves_nothing_and_halves_the_scale():
    config, state, x, y = make(precision="fp16")
    before = [p.detach().clone() for p in state.generator.parameters()]
    scale = state.scaler.get_scale()
    state.step(x * 1e30, y, 0, config.lr)
    assert all(torch.equal(a, b) for a, b in zip(before, state.generator.parameters(), strict=True))
    assert state.scaler.get_scale() == scale / 2


def test_same_seed_same_weights_other_seed_other_weights():
    _, a, _, _ = make(seed=1)
    _, b, _, _ = make(seed=1)
    _, c, _, _ = make(seed=2)
    first = [next(iter(s.generator.parameters())) for s in (a, b, c)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_networks_and_gradients_are_channels_last():
    config, state, x, y = make()
    state.step(x, y, 0, config.lr)
    for p in state.generator.parameters():
        if p.ndim == 4 and p.shape[1] > 1:
            assert p.is_contiguous(memory_format=torch.channels_last)
            assert p.grad.is_contiguous(memory_format=torch.channels_last)


def test_four_pairs_can_be_learned_by_heart():
    config, state, x, y = make(ngf=16, batch=4, lr=2e-3)
    x, y = x.repeat(2, 1, 1, 1), torch.nn.functional.avg_pool2d(y, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    y = torch.cat((y, y.flip(3)))
    x = torch.cat((x[:2], x[2:].flip(3)))
    first = state.step(x, y, 0, config.lr)[3].item()
    for step in range(1, 150):
        last = state.step(x, y, step, config.lr)[3].item()
    assert last < 0.15 * first, (first, last)

"""The explicit passes against the modules and autograd, in float64."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from fastpix2pix.config import Discriminator, Generator
from fastpix2pix.kernels.philox import Noise, dropout_mask
from fastpix2pix.model import build_discriminator, build_generator
from fastpix2pix.training import functions, stages
from fastpix2pix.training.arena import Gradients
from fastpix2pix.training.convolution import aten_backward, rows
from fastpix2pix.training.discriminator_pass import discriminator_backward, discriminator_forward
from fastpix2pix.training.generator_pass import generator_backward, generator_forward
from fastpix2pix.training.stages import How

HOW = How(impl="reference")
COUNTERS = torch.tensor([1234567890123, 7, 40])  # seed, step, first image

GENERATORS = [
    (Generator(depth=5, ngf=4), 2, "the paper's layout, dropout on"),
    (Generator(depth=6, ngf=3, dropout="junyanz", in_channels=1, out_channels=2), 1, "odd channels, batch 1"),
    (Generator(depth=5, ngf=4, norm="instance", dropout="none"), 3, "a group per image, biases in front of norms"),
    (Generator(depth=5, ngf=4, norm="none", dropout="none"), 2, "nothing but convolutions"),
    (Generator(depth=5, ngf=4, kind="encoder_decoder"), 2, "no skips"),
    (Generator(depth=5, ngf=4, up="resize"), 2, "resize and 3x3 up-blocks"),
]
DISCRIMINATORS = [(Discriminator(in_channels=6, ndf=4, n_layers=n, norm=norm), f"n{n} {norm}") for n in (0, 1, 3) for norm in ("batch", "instance", "none")]  # fmt: skip  # noqa: E501


class CounterDropout(nn.Module):
    """The passes' dropout inside a module."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x, modes, first):
        n, c, h, w = x.shape
        mask = dropout_mask(Noise(COUNTERS, self.block), n, h * w, c)
        return x * 2 * mask.view(n, h, w, c).permute(0, 3, 1, 2)


def randomised(net):
    """Weights large enough that every path matters."""
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draws, dtype=torch.float64) * 0.3 + (p.ndim == 1))
    return net.double().train()


def assert_gradients(net: nn.Module, found: dict, expected: dict) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-7, atol=1e-9 * gradient.abs().max().item() + 1e-12, msg=name
        )


@pytest.mark.parametrize(("config", "batch", "why"), GENERATORS, ids=[g[2] for g in GENERATORS])
@pytest.mark.parametrize("accumulate", [False, True])
def test_generator(config, batch, why, accumulate):
    net = randomised(build_generator(config))
    reference = deepcopy(net)
    for block in reference.up:
        if block.dropout is not None:
            block.dropout = CounterDropout(block.dropout.block)
    side = 2 * config.multiple if batch == 1 else config.multiple
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, side, config.multiple, generator=draws, dtype=torch.float64)
    dy = torch.randn(batch, config.out_channels, side, config.multiple, generator=draws, dtype=torch.float64)
    y = reference(x)
    y.backward(dy)

    params = dict(net.named_parameters())
    start = 1.0 if accumulate else torch.nan
    biased = {
        k
        for k in params
        if "conv.bias" in k and net.get_submodule(k.rsplit(".", 2)[0]).norm.__class__ is not nn.Identity
    }
    gradients = {k: torch.full_like(p, 0.0 if k in biased else start) for k, p in params.items()}
    with torch.no_grad():
        found, saved = generator_forward(net, params, x.contiguous(memory_format=torch.channels_last), COUNTERS, HOW)
        torch.testing.assert_close(found, y, rtol=1e-9, atol=1e-11)
        d_raw = rows(dy * (1 - found**2))
        generator_backward(net, params, Gradients(gradients, accumulate), saved, d_raw, HOW)
    expected = {k: p.grad + (start if accumulate and k not in biased else 0) for k, p in reference.named_parameters()}
    for k in biased:
        assert expected.pop(k).abs().max() < 1e-9
        assert not gradients[k].any()
    assert_gradients(net, gradients, expected)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(dict(net.named_buffers())[name], buffer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("config", "why"), DISCRIMINATORS, ids=[d[1] for d in DISCRIMINATORS])
@pytest.mark.parametrize("batch", [1, 2])
def test_discriminator_on_translated_and_real_joined(config, why, batch):
    net = randomised(build_discriminator(config))
    reference = deepcopy(net)
    draws = torch.Generator().manual_seed(1)
    fake, real = (torch.randn(batch, 6, 40, 36, generator=draws, dtype=torch.float64) for _ in range(2))
    x = torch.cat((fake, real)).requires_grad_()
    logits = torch.cat([reference(part).flatten() for part in x.chunk(2)])  # two passes, fake first
    d_logits = torch.randn(logits.shape, generator=draws, dtype=torch.float64)
    logits.backward(d_logits)

    params = dict(net.named_parameters())
    gradients = {k: torch.zeros_like(p) for k, p in params.items()}
    with torch.no_grad():
        found, saved = discriminator_forward(
            net, params, x.detach().contiguous(memory_format=torch.channels_last), 2, HOW
        )
        torch.testing.assert_close(found, logits.detach(), rtol=1e-9, atol=1e-11)
        dx = discriminator_backward(params, Gradients(gradients), saved, d_logits, HOW, need_dx=True)
        again = discriminator_backward(params, None, saved, d_logits, HOW, need_dx=True)
        assert torch.equal(dx, again)  # the parameters' gradients are independent of it
        assert discriminator_backward(params, Gradients(gradients), saved, d_logits, HOW).numel() == 0
    torch.testing.assert_close(dx, x.grad, rtol=1e-7, atol=1e-10)
    expected = {k: p.grad for k, p in reference.named_parameters()}
    unseen = {k for k in expected if k.endswith("conv.bias") and not gradients[k].any()}
    assert all(expected.pop(k).abs().max() < 1e-8 for k in unseen)
    assert_gradients(net, gradients, expected)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(dict(net.named_buffers())[name], buffer, rtol=1e-6, atol=1e-7)


def gradients_of(net: nn.Module) -> dict:
    return {name: p.grad for name, p in net.named_parameters()}


def test_wrapped_generator_gives_the_gradients_of_the_module():
    net = randomised(build_generator(Generator(depth=5, ngf=4, dropout="none")))
    reference = deepcopy(net)
    draws = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(2, 3, 32, 32, generator=draws, dtype=torch.float64) for _ in range(2))
    y = functions.generator(net, x, COUNTERS, HOW)
    y.backward(dy)
    expected = reference(x)
    expected.backward(dy)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    assert_gradients(
        net, {k: p.grad for k, p in net.named_parameters()}, {k: p.grad for k, p in reference.named_parameters()}
    )
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        y = functions.generator(net, x, COUNTERS, HOW)
        (g,) = torch.autograd.grad(y.sum(), [net.down[0].conv.weight], create_graph=True)
        g.sum().backward()


@pytest.mark.parametrize("need_dx", [True, False])
def test_wrapped_discriminator_gives_the_gradients_of_the_module(need_dx):
    net = randomised(build_discriminator(Discriminator(ndf=4, n_layers=2)))
    reference = deepcopy(net)
    draws = torch.Generator().manual_seed(1)
    x, other = (
        torch.randn(2, 6, 32, 32, generator=draws, dtype=torch.float64).requires_grad_(need_dx) for _ in range(2)
    )
    other.data.copy_(x.data)
    functions.discriminator(net, x, 1, HOW).square().sum().backward()
    reference(other).square().sum().backward()
    assert_gradients(
        net, {k: p.grad for k, p in net.named_parameters()}, {k: p.grad for k, p in reference.named_parameters()}
    )
    if need_dx:
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-7, atol=1e-10)


def test_joined_and_separate_translated_images_are_the_same_network():
    """groups = 2 at batch 1 has the statistics of two batches of one, not of one batch of two."""
    net = randomised(build_discriminator(Discriminator(ndf=4, n_layers=2)))
    x = torch.randn(2, 6, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    params = dict(net.named_parameters())
    with torch.no_grad():
        joined, _ = discriminator_forward(net, params, x, 2, HOW)
        one, _ = discriminator_forward(net, params, x[:1], 1, HOW)
        together, _ = discriminator_forward(net, params, x, 1, HOW)
    torch.testing.assert_close(joined[: len(one)], one)
    assert not torch.allclose(joined, together)


def test_dgrad_alone_shows_the_library_an_input_of_its_format(monkeypatch):
    """cuDNN's dgrad first brings the gradient into the memory format of the input, which nothing reads."""
    seen = []

    def backward(dy, x, w, *rest):
        seen.append(x.is_contiguous(memory_format=torch.channels_last) and dy.shape[0] == x.shape[0])
        return aten_backward(dy, x, w, *rest)

    monkeypatch.setattr(stages, "aten_backward", backward)
    net = build_discriminator(Discriminator(in_channels=6, ndf=4, n_layers=2)).train()
    params = {name: p.detach() for name, p in net.named_parameters()}
    x = torch.randn(2, 6, 32, 32).to(memory_format=torch.channels_last)
    logits, saved = discriminator_forward(net, params, x, 1, HOW)
    discriminator_backward(params, None, saved, torch.ones_like(logits), HOW, need_dx=True)
    assert seen == [True] * len(net.blocks)

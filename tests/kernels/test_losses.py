"""The losses against float64 and autograd: values, gradients, extremes, and sums that repeat to the bit."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastpix2pix.kernels import losses
from fastpix2pix.kernels.dispatch import NotSupported, recorded
from fastpix2pix.kernels.losses import BLOCK, GAN_KINDS, gan_loss, l1_tanh_loss
from tests.kernels.common import DEVICE, DTYPES, IMPLEMENTATIONS, needs_triton

GUARD = 64
FIGURE = 2e-6  # relative: a figure is one sum of fp32 numbers


def normal(n: int, seed: int, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * std).to(DEVICE)


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """An output of NaN inside a longer array of NaN."""
    return like.new_full((len(like) + 2 * GUARD,), math.nan)[GUARD:-GUARD]


def guarded(x: torch.Tensor) -> torch.Tensor:
    inside = poisoned(x)
    inside.copy_(x)
    return inside


def assert_guards_hold(x: torch.Tensor) -> None:
    whole = x.as_strided((len(x) + 2 * GUARD,), (1,), x.storage_offset() - GUARD)
    assert whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all()
    assert not x.isnan().any()


def assert_two_errors(fast, same, exact, dtype) -> None:
    """|fast - float64| <= 2 |reference in the same types - float64| + roundings of the stored type and of fp32."""
    roundings = torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    roundings += torch.finfo(dtype).smallest_normal
    excess = (fast.double() - exact).abs() - 2 * (same.double() - exact).abs() - roundings
    assert excess.max() <= 0, f"off by {excess.max().item():.2g} more than allowed"


GROUPS = [
    (1, (1.0,), "one patch, one group"),
    (36, (1.0,), "the 286-pixel discriminator"),
    (900, (0.0, 1.0), "fake and real of the 70-pixel one, less than a block each"),
    (BLOCK, (0.0, 1.0), "whole blocks"),
    (2 * BLOCK + 1, (1.0, 0.0), "a last block of one, groups straddle blocks"),
    (2 * 900, (0.9, 0.1), "smoothed labels"),
]


def autograd_gan(logits, targets, weight, kind, scale):
    """Value and gradient in float64, by autograd from torch's own loss."""
    z = logits.double().view(len(targets), -1).requires_grad_()
    label = torch.tensor(targets, dtype=torch.float64, device=z.device)[:, None].expand_as(z)
    loss = F.binary_cross_entropy_with_logits if kind == "bce" else F.mse_loss
    means = loss(z, label, reduction="none").mean(1)
    (means.sum() * weight * scale).backward()
    return means.detach(), z.grad.view(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GAN_KINDS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "targets", "reason"), GROUPS, ids=[row[-1] for row in GROUPS])
def test_gan_loss(n, targets, reason, impl, kind, dtype):
    logits = normal(n * len(targets), seed=n, std=4).to(dtype)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    means, slope = autograd_gan(logits, targets, 0.5, kind, scale)
    same, fast = torch.empty_like(logits), poisoned(logits)
    on_device = torch.tensor(scale, device=DEVICE) if dtype == torch.float16 else None
    gan_loss(logits, targets, 0.5, same, kind=kind, scale=on_device, impl="reference")
    values = gan_loss(guarded(logits), targets, 0.5, fast, kind=kind, scale=on_device, impl=impl)
    assert values.shape == (len(targets),) and values.dtype == torch.float32
    torch.testing.assert_close(values.double(), means, rtol=FIGURE, atol=0)
    assert_two_errors(fast, same, slope, dtype)
    assert_guards_hold(fast)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_bce_of_extreme_logits(impl, label):
    logits = torch.tensor([-1e4, -100.0, -20.0, -1e-6, -0.0, 0.0, 1e-6, 20.0, 88.8, 100.0, 1e4], device=DEVICE)
    for z in logits.split(1):  # one by one: a mean would hide the small ones
        mean, slope = autograd_gan(z, (label,), 1.0, "bce", 1.0)
        gradient = poisoned(z)
        value = gan_loss(z, (label,), 1.0, gradient, impl=impl)
        # torch's loss and sigmoid - label cancel where the answer is right; the kernel does not
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-38 if impl == "triton" else 3e-9)
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-6, atol=1e-38 if impl == "triton" else 6e-8)


@needs_triton
@pytest.mark.parametrize("wrong", [{"targets": (1.0, 0.0)}, {"weight": 0.5001}, {"scale": None}, {"kind": "lsgan"}])
def test_gan_comparison_notices(wrong):
    logits = normal(2 * 1100, seed=1)
    right = {"targets": (0.0, 1.0), "weight": 0.5, "kind": "bce", "scale": torch.tensor(8.0, device=DEVICE)}
    _, slope = autograd_gan(logits, right["targets"], 0.5, "bce", 8.0)
    same, fast = torch.empty_like(logits), torch.empty_like(logits)
    gan_loss(logits, gradient=same, impl="reference", **right)
    gan_loss(logits, gradient=fast, impl="triton", **right | wrong)
    with pytest.raises(AssertionError, match="more than allowed"):
        assert_two_errors(fast, same, slope, torch.float32)


PIXELS = [
    (1, True, 100.0, "one number"),
    (3 * 5 * 7, True, 100.0, "less than a block"),
    (3 * 64 * 64, True, 100.0, "whole blocks"),
    (3 * BLOCK + 1, False, 100.0, "L1 alone, a last block of one"),
    (3 * BLOCK - 1, True, 0.0, "L1 as a figure only"),
]


def autograd_l1(fake, target, from_gan, weight, scale):
    """Value and gradient in float64: autograd of L1, joined with the adversarial gradient, through tanh' = 1 - y^2."""
    y = fake.double().requires_grad_()
    mean = (y - target.double()).abs().mean()
    (mean * weight * scale).backward()
    g = y.grad if from_gan is None else y.grad + from_gan.double()
    return mean.detach(), g * (1 - fake.double() ** 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "gan", "weight", "reason"), PIXELS, ids=[row[-1] for row in PIXELS])
def test_l1_tanh_loss(n, gan, weight, reason, impl, dtype):
    fake, target = normal(n, seed=n).tanh().to(dtype), normal(n, seed=n + 1).tanh()
    target[::5] = fake[::5].float()  # where they are equal, L1 has no gradient
    from_gan = normal(n, seed=n + 2, std=1e-3).to(dtype) if gan else None
    scale = 1024.0 if dtype == torch.float16 else 1.0
    on_device = torch.tensor(scale, device=DEVICE) if dtype == torch.float16 else None
    mean, slope = autograd_l1(fake, target, from_gan, weight, scale)
    same, fast = torch.empty_like(fake), poisoned(fake)
    l1_tanh_loss(fake, target, from_gan, weight, same, scale=on_device, impl="reference")
    arguments = [None if t is None else guarded(t) for t in (fake, target, from_gan)]
    value = l1_tanh_loss(*arguments, weight, fast, scale=on_device, impl=impl)
    assert value.shape == () and value.dtype == torch.float32
    torch.testing.assert_close(value.double(), mean, rtol=FIGURE, atol=0)
    assert_two_errors(fast, same, slope, dtype)
    assert_guards_hold(fast)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_l1_reads_levels_and_gradients_that_lie_apart(impl):
    """As the explicit step gives them: the same numbers as of fp32 units and of a gradient in one piece."""
    rows = BLOCK // 2 + 5
    fake, wide = normal(3 * rows, seed=1).tanh(), normal(6 * rows, seed=2, std=1e-3).view(rows, 6)
    levels = (normal(3 * rows, seed=3).tanh() * 127 + 128).to(torch.uint8)
    units, apart = levels.float() / 127.5 - 1, wide[:, 3:]
    plain, fast = torch.empty_like(fake), poisoned(fake)
    wanted = l1_tanh_loss(fake, units, apart.reshape(-1), 100.0, plain, impl=impl)
    assert torch.equal(l1_tanh_loss(fake, levels, apart, 100.0, fast, impl=impl), wanted)
    assert torch.equal(fast, plain)


@needs_triton
def test_l1_comparison_notices_a_lost_factor():
    fake, target = normal(1100, seed=1).tanh(), normal(1100, seed=2).tanh()
    _, slope = autograd_l1(fake, target, None, 100.0, 1.0)
    same, fast = torch.empty_like(fake), torch.empty_like(fake)
    l1_tanh_loss(fake, target, None, 100.0, same, impl="reference")
    for from_gan, weight in ((None, 100.01), (torch.full_like(fake, 1e-4), 100.0)):
        l1_tanh_loss(fake, target, from_gan, weight, fast, impl="triton")
        with pytest.raises(AssertionError, match="more than allowed"):
            assert_two_errors(fast, same, slope, torch.float32)


@needs_triton
@pytest.mark.parametrize("blocks", [1, BLOCK, 2 * BLOCK + 3])
def test_means_of_many_partials(blocks):
    partials = guarded(normal(2 * blocks, seed=3) + 5).view(2, blocks)
    means = losses._means(partials, 1024 * blocks)
    torch.testing.assert_close(means.double(), partials.double().sum(1) / (1024 * blocks), rtol=FIGURE, atol=0)


@needs_triton
def test_figures_repeat_to_the_bit_and_launches_are_two():
    logits, gradient = normal(2 * 5000, seed=4), torch.empty(2 * 5000, device=DEVICE)
    with recorded() as tape:
        values = [gan_loss(logits, (0.0, 1.0), 0.5, gradient, impl="triton") for _ in range(3)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert [entry.kernel for entry in tape] == ["_gan_loss_kernel", "_mean_kernel"] * 3
    assert tape[0].read == 40_000 and tape[0].written == 40_000 + 2 * 5 * 4
    torch.testing.assert_close(
        values[0].double(), autograd_gan(logits, (0.0, 1.0), 0.5, "bce", 1)[0], rtol=FIGURE, atol=0
    )


def test_refusals():
    x = torch.zeros(12, device=DEVICE)
    with pytest.raises(ValueError, match=r"kind = 'wgan': allowed are bce, lsgan"):
        gan_loss(x, (0.0, 1.0), 1.0, x.clone(), kind="wgan")
    with pytest.raises(NotSupported, match="3 groups; one or two are allowed"):
        gan_loss(x, (0.0, 1.0, 1.0), 1.0, x.clone(), impl="triton")
    with pytest.raises(NotSupported, match=r"logits with strides \(2,\) is not contiguous; 5 logits are not 2 groups"):
        gan_loss(x[:10:2], (0.0, 1.0), 1.0, torch.empty_like(x[:5]), impl="triton")
    with pytest.raises(NotSupported, match=r"target \(4,\) is not shaped like fake; from_gan is torch.float64"):
        l1_tanh_loss(x, x[:4], x.double(), 1.0, x.clone(), impl="triton")
    with pytest.raises(NotSupported, match=r"from_gan \(3, 4\) with strides \(1, 3\); rows of 12 numbers"):
        l1_tanh_loss(x, x, x.view(4, 3).T, 1.0, x.clone(), impl="triton")


def test_reference_takes_any_number_of_groups():
    logits = normal(12, seed=5)
    values = gan_loss(logits, (0.0, 1.0, 1.0), 1.0, torch.empty_like(logits), impl="reference")
    torch.testing.assert_close(values.double(), autograd_gan(logits, (0.0, 1.0, 1.0), 1.0, "bce", 1)[0])

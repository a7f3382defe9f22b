"""One training step: discriminator, then generator (arXiv 1611.07004, section 3.3).

In fp32 and bf16 nothing here waits for the device; fp16's loss scaling does, once per optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Train
from ..device import resolve_precision
from ..model import PatchGAN, Unet
from ..model.weights import init_weights
from .losses import gan_loss, seen_by_discriminator
from .pool import ImagePool

LOSSES = ("d_fake", "d_real", "g_gan", "g_l1")
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class State:
    """Everything a step reads and changes."""

    config: Train
    precision: str  # fp32, bf16 or fp16: "auto" resolved for the device
    generator: Unet
    discriminator: PatchGAN | None
    adam_g: torch.optim.Adam
    adam_d: torch.optim.Adam | None
    scaler: torch.amp.GradScaler
    pool: ImagePool
    average: Unet | None  # exponential moving average of the generator

    @property
    def model(self) -> Unet:
        """The network that is validated and saved as the model."""
        return self.average or self.generator


def build_state(config: Train, device: torch.device) -> State:
    """Networks with seeded weights on `device`, and their optimisers."""
    torch.manual_seed(config.seed)  # dropout; the weights have a generator of their own
    draws = torch.Generator().manual_seed(config.seed)
    generator = init_weights(Unet(config.generator), draws).to(device).train()
    discriminator = None
    if config.adversarial:
        discriminator = init_weights(PatchGAN(config.discriminator()), draws).to(device).train()

    def adam(net: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(net.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), fused=True)

    precision = resolve_precision(config.precision, device)
    return State(
        config=config,
        precision=precision,
        generator=generator,
        discriminator=discriminator,
        adam_g=adam(generator),
        adam_d=adam(discriminator) if discriminator else None,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        pool=ImagePool(config.pool, config.seed),
        average=deepcopy(generator).eval().requires_grad_(False) if config.ema else None,
    )


def train_step(
    state: State,
    x: Tensor,  # [N, Ci, H, W] fp32 in [-1, 1], condition, channels-last
    y: Tensor,  # [N, Co, H, W] fp32 in [-1, 1], target, channels-last
    step: int,  # 0, 1, 2, ...: keys the image pool's decisions
    lr: float,
) -> Tensor:  # [4] fp32 on the device, detached, in the order of LOSSES
    """D: 0.5 (BCE(D(x, G(x)), 0) + BCE(D(x, y), 1)); then, through the updated D, G: BCE(D(x, G(x)), 1) + lambda L1.

    D stays in training mode throughout, so its running statistics see fake, real and fake again.
    """
    config = state.config
    with _autocast(state, x.device):
        fake = state.generator(x)
    d_fake = d_real = g_gan = torch.zeros((), device=x.device)
    if state.discriminator is not None:
        d_fake, d_real = _discriminator_step(state, x, y, fake.detach(), step, lr)
        with _autocast(state, x.device), _frozen(state.discriminator):
            g_gan = gan_loss(
                state.discriminator(seen_by_discriminator(x, fake, config.conditional)), True, config.gan_loss
            )
    g_l1 = F.l1_loss(fake.float(), y)
    loss = g_gan + config.lambda_l1 * g_l1 if "l1" in config.objective else g_gan
    _update(state, state.adam_g, loss, lr)
    state.scaler.update()
    _update_average(state)
    return torch.stack((d_fake, d_real, g_gan, g_l1)).detach()


def _discriminator_step(
    state: State, x: Tensor, y: Tensor, fake: Tensor, step: int, lr: float
) -> tuple[Tensor, Tensor]:  # [] [] fp32: loss on translated and on real images
    config = state.config
    assert state.discriminator is not None and state.adam_d is not None
    shown = state.pool.query(seen_by_discriminator(x, fake.float(), config.conditional), step)
    with _autocast(state, x.device):
        d_fake = gan_loss(state.discriminator(shown), False, config.gan_loss)
        d_real = gan_loss(state.discriminator(seen_by_discriminator(x, y, config.conditional)), True, config.gan_loss)
    _update(state, state.adam_d, 0.5 * (d_fake + d_real), lr)
    return d_fake, d_real


def _update(state: State, adam: torch.optim.Adam, loss: Tensor, lr: float) -> None:
    for group in adam.param_groups:
        group["lr"] = lr
    adam.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.step(adam)


def _update_average(state: State) -> None:
    if state.average is None:
        return
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.generator.parameters()), 1 - state.config.ema)
        for kept, new in zip(state.average.buffers(), state.generator.buffers(), strict=True):
            kept.copy_(new)


def _autocast(state: State, device: torch.device) -> torch.autocast:
    half = _HALF.get(state.precision)
    return torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None)


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """No gradients for `net`'s own parameters; gradients still pass through it."""
    net.requires_grad_(False)
    try:
        yield
    finally:
        net.requires_grad_(True)

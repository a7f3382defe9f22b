"""The plain step: modules, autograd, torch's Adam. The reference of the explicit one.

In fp32 and bf16 nothing here waits for the device; fp16's loss scaling does, once per optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Train
from ..kernels.levels import units
from .losses import gan_loss, seen_by_discriminator
from .processes import ALONE, Group, through_one
from .state import COMPUTE, State

LARGE = 2**20  # numbers of a weight: more are laid out by large_weights_nchw


class ModuleStep(State):
    """Networks as modules under autocast, gradients by autograd, one fused torch.optim.Adam each."""

    def __init__(self, config: Train, device: torch.device, group: Group = ALONE) -> None:
        super().__init__(config, device, group)
        if device.type == "cpu":
            for net in filter(None, (self.generator, self.discriminator, self.average)):
                large_weights_nchw(net)
        self.adam_g = self._adam(self.generator)
        self.adam_d = self._adam(self.discriminator) if self.discriminator else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    def step(self, x: Tensor, y: Tensor, number: int, lr: float) -> Tensor:
        config = self.config
        x, y = (units(t, torch.float32, impl="reference") for t in (x, y))
        with self._autocast():
            fake = self.generator(x)
        d_fake = d_real = g_gan = torch.zeros((), device=x.device)
        if self.discriminator is not None:
            d_fake, d_real = self.discriminator_step(x, y, fake.detach(), number, lr)
            with self._autocast(), _frozen(self.discriminator):
                logits = self.discriminator(seen_by_discriminator(x, fake, config.conditional))
                g_gan = gan_loss(logits, True, config.gan_loss)
        g_l1 = F.l1_loss(fake.float(), y)
        loss = g_gan + config.lambda_l1 * g_l1 if "l1" in config.objective else g_gan
        self._update(self.adam_g, loss, lr)
        self.scaler.update()
        self.update_average()
        return torch.stack((d_fake, d_real, g_gan, g_l1)).detach()

    def discriminator_step(
        self, x: Tensor, y: Tensor, fake: Tensor, number: int, lr: float
    ) -> tuple[Tensor, Tensor]:  # [] [] fp32: loss on translated and on real images
        """The first half of `step`. fake: [N, Co, H, W], detached."""
        config = self.config
        assert self.discriminator is not None and self.adam_d is not None
        shown = self.pool.query(seen_by_discriminator(x, fake.float(), config.conditional), number)
        with self._autocast():
            d_fake = gan_loss(self.discriminator(shown), False, config.gan_loss)
            d_real = gan_loss(
                self.discriminator(seen_by_discriminator(x, y, config.conditional)), True, config.gan_loss
            )
        self._update(self.adam_d, 0.5 * (d_fake + d_real), lr)
        return d_fake, d_real

    def tensors(self) -> dict[str, Tensor]:
        found = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            found["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        for name, adam, net in self._optimisers():
            for key, parameter in net.named_parameters():
                found |= {f"{name}/{key}/{moment}": t for moment, t in adam.state[parameter].items()}
        if self.precision == "fp16":
            scaler = self.scaler.state_dict()
            found["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        return found

    def load_tensors(self, tensors: dict[str, Tensor], number: int) -> None:
        torch.set_rng_state(tensors["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)
        for name, adam, net in self._optimisers():
            for key, parameter in net.named_parameters():
                # moments take the parameter's own layout: the fused Adam walks all of them in storage order
                saved = {moment: tensors[f"{name}/{key}/{moment}"] for moment in ("exp_avg", "exp_avg_sq")}
                moments = {moment: torch.empty_like(parameter).copy_(t) for moment, t in saved.items()}
                adam.state[parameter] = {"step": tensors[f"{name}/{key}/step"].to(self.device), **moments}
        if self.precision == "fp16" and "scaler" in tensors:  # saved by steps in fp16
            scale, growth = tensors["scaler"].tolist()
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(growth)})

    def weights_replaced(self) -> None:
        """Nothing is: the modules compute with the weights themselves."""

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        betas = self.config.beta1, self.config.beta2
        return torch.optim.Adam(net.parameters(), lr=self.config.lr, betas=betas, fused=True)

    def _optimisers(self) -> list[tuple[str, torch.optim.Adam, nn.Module]]:
        found: list[tuple[str, torch.optim.Adam, nn.Module]] = [("adam_g", self.adam_g, self.generator)]
        if self.adam_d is not None and self.discriminator is not None:
            found.append(("adam_d", self.adam_d, self.discriminator))
        return found

    def _update(self, adam: torch.optim.Adam, loss: Tensor, lr: float) -> None:
        for group in adam.param_groups:
            group["lr"] = lr
        adam.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.group.size > 1:
            through_one([p.grad for p in adam.param_groups[0]["params"]], self.group.reduce)
        self.scaler.step(adam)

    def _autocast(self) -> torch.autocast:
        half = self.precision != "fp32"
        dtype = COMPUTE[self.precision] if half else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=half)


def large_weights_nchw(net: nn.Module) -> None:
    """For a CPU: the convolutions with large weights in NCHW, in place; the others stay channels-last.

    oneDNN gives every weight's gradient in NCHW, and autograd copies it into the weight's own format. Of a large
    weight, as the inner layers of unet_256 have, that copy costs more than channels-last saves.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > LARGE:
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """No gradients for `net`'s own parameters; gradients still pass through it."""
    net.requires_grad_(False)
    try:
        yield
    finally:
        net.requires_grad_(True)

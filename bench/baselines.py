"""What the explicit step is measured against, each written as plainly as its users would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpix2pix.config import Train
from fastpix2pix.model import PatchGAN, Unet
from fastpix2pix.training.graph import GraphedBody
from fastpix2pix.training.losses import gan_loss
from fastpix2pix.training.module_step import ModuleStep


class StandardStep(ModuleStep):
    """Eager fp32 in NCHW, as the standard implementation trains: a backward pass and a default Adam for each network.

    `read`: the four losses are read on the host after every step (`.item()`), which waits for the device.
    """

    def __init__(self, config: Train, device: torch.device, *, read: bool) -> None:
        super().__init__(config, device)
        assert self.discriminator is not None
        self.read = read
        for net in (self.generator, self.discriminator):
            net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def step(self, x: Tensor, y: Tensor, number: int, lr: float) -> Tensor:
        net_d = self.discriminator
        assert net_d is not None and self.adam_d is not None
        fake = _generator(self.generator, x)

        net_d.requires_grad_(True)
        self.adam_d.zero_grad()
        d_fake = gan_loss(_discriminator(net_d, torch.cat((x, fake), 1).detach()), False)
        d_real = gan_loss(_discriminator(net_d, torch.cat((x, y), 1)), True)
        ((d_fake + d_real) * 0.5).backward()
        self._rate(self.adam_d, lr)
        self.adam_d.step()

        net_d.requires_grad_(False)
        self.adam_g.zero_grad()
        g_gan = gan_loss(_discriminator(net_d, torch.cat((x, fake), 1)), True)
        g_l1 = F.l1_loss(fake, y)
        (g_gan + self.config.lambda_l1 * g_l1).backward()
        self._rate(self.adam_g, lr)
        self.adam_g.step()

        if self.read:
            return torch.tensor([loss.item() for loss in (d_fake, d_real, g_gan, g_l1)])
        return torch.stack((d_fake, d_real, g_gan, g_l1)).detach()

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(net.parameters(), lr=self.config.lr, betas=(self.config.beta1, self.config.beta2))

    def _rate(self, adam: torch.optim.Adam, lr: float) -> None:
        adam.param_groups[0]["lr"] = lr


def _generator(net: Unet, x: Tensor) -> Tensor:
    """`Unet.forward` without its memory format."""
    h = x
    skips: list[Tensor] = []
    for block in net.down:
        h = block(F.leaky_relu(h, 0.2) if skips else h)
        skips.append(h)
    h = F.relu(skips.pop())
    for number, block in enumerate(net.up):
        h = block(h)
        if number + 1 < len(net.up):
            h = F.relu(torch.cat((skips.pop(), h), 1))
    return torch.tanh(h)


def _discriminator(net: PatchGAN, x: Tensor) -> Tensor:
    """`PatchGAN.forward` without its memory format."""
    h = net.blocks[0](x)
    for block in net.blocks[1:]:
        h = block(F.leaky_relu(h, 0.2))
    return h


class CompiledStep(ModuleStep):
    """The plain step (bf16, channels-last, fused Adam) with both networks under torch.compile."""

    def __init__(self, config: Train, device: torch.device, backend: str) -> None:
        super().__init__(config, device)
        for net in (self.generator, self.discriminator):
            if net is not None:
                net.compile(backend=backend, dynamic=False, fullgraph=True)


class CompiledGraphStep(CompiledStep):
    """The same with all of the step, optimisers included, in one CUDA graph; the rate is a device tensor."""

    def __init__(self, config: Train, device: torch.device, backend: str) -> None:
        self.lr = torch.full((), config.lr, device=device)
        super().__init__(config, device, backend)
        self.graph = GraphedBody(self._body)

    def step(self, x: Tensor, y: Tensor, number: int, lr: float) -> Tensor:
        self.lr.fill_(lr)
        return self.graph(x, y, number)

    def _body(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        return super().step(x, y, number, self.lr)  # type: ignore[arg-type]

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        betas = self.config.beta1, self.config.beta2
        return torch.optim.Adam(net.parameters(), lr=self.lr, betas=betas, fused=True, capturable=True)

"""Everything a training step reads and changes: networks, optimisers, average, image pool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from ..config import Train
from ..device import resolve_precision
from ..model import PatchGAN, Unet
from ..model.layers import Net, init_weights
from .pool import ImagePool
from .processes import ALONE, Group

LOSSES = ("d_fake", "d_real", "g_gan", "g_l1")
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class State(ABC):
    """Networks with seeded weights on a device. Subclasses bring the step and its optimisers."""

    def __init__(self, config: Train, device: torch.device, group: Group = ALONE) -> None:
        self.config, self.device, self.group = config, device, group
        self.precision = resolve_precision(config.precision, device)  # fp32, bf16 or fp16
        # the modules' dropout, another in every process; the weights have a generator of their own
        torch.manual_seed(config.seed + group.rank)
        draws = torch.Generator().manual_seed(config.seed)
        self.generator = _initial(partial(Unet, config.generator), draws).to(device)
        self.discriminator: PatchGAN | None = None
        if config.adversarial:
            self.discriminator = _initial(partial(PatchGAN, config.discriminator()), draws).to(device)
        for net in filter(None, (self.generator, self.discriminator)):
            group.broadcast(net.state_dict().values())  # equal already, by the seed: to be sure
        self.average: Unet | None = None  # exponential moving average of the generator
        if config.ema:
            self.average = deepcopy(self.generator).eval().requires_grad_(False)
        self.pool = ImagePool(config.pool, config.seed, group.rank)

    @property
    def model(self) -> Unet:
        """The network that is validated and saved as the model."""
        return self.average or self.generator

    @abstractmethod
    def step(
        self,
        x: Tensor,  # [N, Ci, H, W] uint8, or fp32 in [-1, 1]: condition, channels-last
        y: Tensor,  # [N, Co, H, W] likewise: target
        number: int,  # of this step, from 0
        lr: float,
    ) -> Tensor:  # [4] fp32 on the device, detached, in the order of LOSSES
        """One update of the discriminator and one of the generator (arXiv 1611.07004, section 3.3).

        D: 0.5 (BCE(D(x, G(x)), 0) + BCE(D(x, y), 1)); then, through the updated D, G: BCE(D(x, G(x)), 1) + lambda L1.
        D stays in training mode throughout, so its running statistics see fake, real and fake again.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a bit-exact continuation needs beside the weights: moments, loss scale, random state."""

    @abstractmethod
    def load_tensors(self, tensors: dict[str, Tensor], number: int) -> None:
        """Take over what `tensors` gave after `number` steps; the weights are loaded. KeyError: not all is there.

        A loss scale is not missed, as steps in another precision have none: it begins anew.
        """

    @abstractmethod
    def weights_replaced(self) -> None:
        """To be called after the networks' weights were written in place: what is derived from them is made anew."""

    def update_average(self) -> None:
        """average = ema * average + (1 - ema) * generator; running statistics are the generator's."""
        if self.average is None:
            return
        with torch.no_grad():
            mine: list[Tensor] = list(self.average.parameters())
            theirs: list[Tensor] = list(self.generator.parameters())
            torch._foreach_lerp_(mine, theirs, 1 - self.config.ema)
            for kept, new in zip(self.average.buffers(), self.generator.buffers(), strict=True):
                kept.copy_(new)


def _initial(build: Callable[[], Net], draws: torch.Generator) -> Net:
    """A network in training mode with pix2pix's initial weights, on the CPU. Torch's own, which would be overwritten,
    take nearly as long: so it is built without memory first."""
    with torch.device("meta"):
        net = build()
    return init_weights(net.to_empty(device="cpu"), draws)

"""The explicit step: passes written out, parameters in arenas, every changing number on the device.

Nothing in it waits for the device, depends on the data's values or reads a changing number from the host, so that all
of it can be one CUDA graph (graph.py), or several, between which processes average their gradients. Translated and
real images go through the discriminator joined.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..config import Train
from ..errors import InputError
from ..kernels.adam import adam, advance, found_inf_
from ..kernels.levels import side_by_side, units
from ..kernels.losses import gan_loss, l1_tanh_loss
from .arena import Arena, Gradients, Segment
from .convolution import image, rows
from .discriminator_pass import discriminator_backward, discriminator_forward
from .generator_pass import generator_backward, generator_forward, idle_border
from .graph import GraphedBody, use_graph
from .processes import ALONE, Group
from .stages import How
from .state import COMPUTE, State

_FIRST_SCALE, _GROWTH, _BACKOFF, _GROWTH_INTERVAL = 65536.0, 2.0, 0.5, 2000  # torch.amp.GradScaler's defaults


class ExplicitStep(State):
    """generator_forward .. generator_backward around one-pass kernels and a flat Adam.

    Dropout's masks come from (seed, step, image), so there is no random state to save; images are counted over all
    processes.
    """

    def __init__(
        self,
        config: Train,
        device: torch.device,
        how: How,
        group: Group = ALONE,  # reduces each flat gradient before its update
        skip_idle: bool = True,  # leave taps alone that never meet a pixel, where that changes nothing
        at_once: bool = True,  # update a kernel as soon as the library has its gradient, where nothing is to be awaited
    ) -> None:
        super().__init__(config, device, group)
        self.how = how
        required = config.graph == "on"
        self.graph = GraphedBody(self.body, required) if use_graph(config, device) else None
        self.dtype = COMPUTE[self.precision]
        self.arena_g = Arena(self.generator, self.dtype)
        self.arena_d = Arena(self.discriminator, self.dtype) if self.discriminator else None
        self.skip_idle = skip_idle
        self.idle = self._idle()
        self.at_once = at_once and updates_at_once(self.precision, group.size)
        self.lr = torch.zeros((), device=device)
        self.counters = torch.tensor(self._counted(0), device=device)  # seed, step, first image: Philox
        self.updates = {n: torch.ones((), dtype=torch.int64, device=device) for n in ("g", "d")}  # next update's number
        half = self.precision == "fp16"
        self.scale = torch.full((), _FIRST_SCALE, device=device) if half else None
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf = {n: torch.zeros((), device=device) for n in ("g", "d")} if half else {}

    def step(self, x: Tensor, y: Tensor, number: int, lr: float) -> Tensor:
        size = self.config.data.crop_size
        if x.shape[2:] != (size, size):  # another size would wake taps that are not updated
            raise InputError(f"a batch of {x.shape[2]}x{x.shape[3]} pixels: crop_size = {size} is what this step takes")
        for given in (x, y):
            if given.dtype not in (torch.uint8, torch.float32):
                raise InputError(f"a batch of {given.dtype}: uint8 levels or float32 units are what this step takes")
        self.lr.fill_(lr)
        with torch.no_grad():
            return (self.graph or self.body)(x, y, number)

    def body(
        self,
        x: Tensor,  # [N, Ci, H, W] uint8 or fp32, channels-last
        y: Tensor,  # [N, Co, H, W] uint8 or fp32, channels-last
        number: int,  # only the image pool looks at it
    ) -> Tensor:  # [4] fp32, LOSSES
        """`step` but for what the host changes: the rate, and the tensors' contents."""
        config, impl = self.config, self.how.impl
        condition, target = units(x, self.dtype, impl=impl), rows(y)
        fake, saved = generator_forward(self.generator, self.arena_g.compute, condition, self.counters, self.how)
        losses = torch.zeros(4, device=x.device)
        from_gan = None
        if self.arena_d is not None:
            shared = rows(condition) if config.conditional else None
            joined = image(side_by_side(shared, rows(fake), target, impl=impl), 2 * len(x), *x.shape[2:])
            seen, real = joined.chunk(2)
            if config.pool:
                joined = torch.cat((self.pool.query(seen, number), real)).contiguous(memory_format=torch.channels_last)
            losses[:2] = self._discriminator(joined)
            losses[2:3], from_gan = self._through_discriminator(seen)
        d_raw = torch.empty_like(rows(fake))
        weight = config.lambda_l1 if "l1" in config.objective else 0.0
        losses[3] = l1_tanh_loss(
            rows(fake).view(-1),
            target.view(-1),
            from_gan,
            weight,
            d_raw.view(-1),
            scale=self.scale,
            impl=impl,
        )
        arena = self.arena_g
        gradients, taken = self._gradients("g", arena)
        generator_backward(self.generator, arena.compute, gradients, saved, d_raw, self.how)
        self._update("g", arena, taken)
        self._update_scale()
        images = len(x) * self.group.size
        advance(self.counters, self.updates["g"], images, self.found_inf.get("g"), impl=self.how.impl)
        self.update_average()
        return losses

    def _discriminator(self, joined: Tensor) -> Tensor:  # [2]: loss on translated, on real
        assert self.discriminator is not None and self.arena_d is not None
        arena = self.arena_d
        logits, saved = discriminator_forward(self.discriminator, arena.compute, joined, 2, self.how)
        gradient = torch.empty_like(logits)
        kind, impl = self.config.gan_loss, self.how.impl
        found = gan_loss(logits, (0.0, 1.0), 0.5, gradient, kind=kind, scale=self.scale, impl=impl)
        gradients, taken = self._gradients("d", arena)
        discriminator_backward(arena.compute, gradients, saved, gradient, self.how)
        self._update("d", arena, taken)
        self.updates["d"] += 1 if not self.found_inf else (self.found_inf["d"] == 0).to(torch.int64)
        return found

    def _through_discriminator(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(loss [1], gradient of the translated images: rows [N * H * W, Co] of a wider array), through the updated
        discriminator."""
        assert self.discriminator is not None and self.arena_d is not None
        params = self.arena_d.compute
        logits, saved = discriminator_forward(self.discriminator, params, seen, 1, self.how)
        gradient = torch.empty_like(logits)
        kind, impl = self.config.gan_loss, self.how.impl
        loss = gan_loss(logits, (1.0,), 1.0, gradient, kind=kind, scale=self.scale, impl=impl)
        dx = discriminator_backward(params, None, saved, gradient, self.how, need_dx=True)
        channels = self.config.generator.out_channels
        return loss, rows(dx)[:, -channels:]

    def _gradients(self, name: str, arena: Arena) -> tuple[Gradients, set[str]]:
        """(where a backward pass leaves them, the kernels that it will have updated): the library's gradients are not
        copied into the arena, and are still in the cache when Adam reads them."""
        taken: set[str] = set()

        def take(weight: str, gradient: Tensor) -> None:
            self._adam(name, arena.update_of(weight, gradient, self.idle[name]))
            taken.add(weight)

        return Gradients(arena.gradients, take=take if self.at_once else None), taken

    def _update(self, name: str, arena: Arena, taken: set[str]) -> None:
        """Of all that is not `taken`."""
        found_inf = self.found_inf.get(name)
        if self.group.size > 1:
            average = partial(self._average, arena)
            self.graph.between(average) if self.graph else average()
        if found_inf is not None:
            found_inf.zero_()
            for segment in arena.segments:
                found_inf_(segment.g, found_inf, impl=self.how.impl)
        for segment in arena.updates(self.idle[name], taken):
            self._adam(name, segment)

    def _average(self, arena: Arena) -> None:
        for segment in arena.segments:
            self.group.reduce(segment.g)

    def _adam(self, name: str, segment: Segment) -> None:
        adam(
            segment.p,
            segment.m,
            segment.v,
            segment.g,
            segment.half,
            self.lr,
            self.updates[name],
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            scale=self.scale,
            found_inf=self.found_inf.get(name),
            impl=self.how.impl,
        )

    def _idle(self) -> dict[str, list[str]]:
        """Kernels of which only the middle taps are updated.

        A tap without pixels has gradient 0; while its moments are 0 too, its update is exactly 0 and can be left out.
        """
        kernels = idle_border(self.config) if self.skip_idle else []
        return {"g": kernels if self.arena_g.border_is_at_rest(kernels) else [], "d": []}

    def _update_scale(self) -> None:
        if self.scale is not None:
            found = torch.maximum(self.found_inf["g"], self.found_inf["d"])
            torch._amp_update_scale_(self.scale, self.growth, found, _GROWTH, _BACKOFF, _GROWTH_INTERVAL)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"updates/{name}": t for name, t in self.updates.items()}
        for name, arena in self._arenas():
            for key, (first, second) in arena.moments.items():
                found |= {f"{name}/{key}/exp_avg": first, f"{name}/{key}/exp_avg_sq": second}
        if self.scale is not None:
            found |= {"scale": self.scale, "growth": self.growth}
        return found

    def load_tensors(self, tensors: dict[str, Tensor], number: int) -> None:
        for name, updates in self.updates.items():
            updates.copy_(tensors[f"updates/{name}"])
        self.weights_replaced()
        for name, arena in self._arenas():
            for key, moments in arena.moments.items():
                for moment, into in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                    into.copy_(tensors[f"{name}/{key}/{moment}"])
        self.idle = self._idle()
        if self.graph is not None:
            self.graph.forget()
        if self.scale is not None and "scale" in tensors:  # saved by steps in fp16
            self.scale.copy_(tensors["scale"])
            self.growth.copy_(tensors["growth"])
        self.counters.copy_(torch.tensor(self._counted(number)))

    def weights_replaced(self) -> None:
        for _, arena in self._arenas():
            arena.check_addresses()
            arena.refresh()

    def _counted(self, number: int) -> list[int]:
        """The counters before step `number`; of every step's images, each process takes its slice."""
        return [self.config.seed, number, (number * self.group.size + self.group.rank) * self.config.batch]

    def _arenas(self) -> list[tuple[str, Arena]]:
        return [("adam_g", self.arena_g)] + ([("adam_d", self.arena_d)] if self.arena_d else [])


def updates_at_once(precision: str, processes: int) -> bool:
    """Whether an update may begin before all gradients are there: no overflow to look for, none to wait for."""
    return precision != "fp16" and processes == 1

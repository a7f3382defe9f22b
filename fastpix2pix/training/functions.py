"""The explicit passes as differentiable functions, for eager use and for tests: thin autograd.Functions around them.

Hooks, DistributedDataParallel and checkpointing do not see inside. Double backward is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model import PatchGAN, Unet
from .arena import Gradients, Parameters
from .convolution import rows
from .discriminator_pass import discriminator_backward, discriminator_forward
from .generator_pass import generator_backward, generator_forward
from .stages import How


def generator(
    net: Unet,
    x: Tensor,  # [N, in, H, W] float, channels-last; its gradient is not computed
    counters: Tensor,  # [3] int64 on the device of x: seed, step, first image (kernels/philox.py)
    how: How,
) -> Tensor:  # [N, out, H, W] dtype of x
    """`net` in training mode, with gradients for its parameters."""
    return _Generator.apply(net, x, counters, how, *net.parameters())


def discriminator(
    net: PatchGAN,
    x: Tensor,  # [groups * N, C, H, W] float, channels-last
    groups: int,
    how: How,
) -> Tensor:  # [groups * N * h * w] logits, dtype of x
    """`net` in training mode on joined groups of images, with gradients for its parameters and for x."""
    return _Discriminator.apply(net, x, groups, how, *net.parameters())


class _Generator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, net: Unet, x: Tensor, counters: Tensor, how: How, *parameters: Tensor) -> Tensor:
        ctx.net, ctx.how, ctx.params = net, how, _compute(net, parameters, x.dtype)
        y, ctx.saved = generator_forward(net, ctx.params, x, counters, how)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        gradients = _zeros(ctx.net)
        d_raw = rows(dys[0] * (1 - y * y))
        generator_backward(ctx.net, ctx.params, Gradients(gradients), ctx.saved, d_raw, ctx.how)
        return None, None, None, None, *gradients.values()


class _Discriminator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, net: PatchGAN, x: Tensor, groups: int, how: How, *parameters: Tensor) -> Tensor:
        ctx.net, ctx.how, ctx.params = net, how, _compute(net, parameters, x.dtype)
        logits, ctx.saved = discriminator_forward(net, ctx.params, x, groups, how)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        gradients = _zeros(ctx.net)
        need_dx = ctx.needs_input_grad[1]
        d_logits = dys[0].contiguous()
        dx = discriminator_backward(ctx.params, Gradients(gradients), ctx.saved, d_logits, ctx.how, need_dx=need_dx)
        return None, dx if need_dx else None, None, None, *gradients.values()


def _compute(net: nn.Module, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> Parameters:
    """By name: kernels in the compute dtype, vectors as they are."""
    named = zip((name for name, _ in net.named_parameters()), parameters, strict=True)
    return {name: p.detach().to(dtype) if p.ndim == 4 else p.detach() for name, p in named}


def _zeros(net: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in net.named_parameters()}

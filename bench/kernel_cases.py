"""Which kernels are checked, and on what: every shape that training meets, in bf16, fp16 and fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastpix2pix.kernels.dispatch import environment_reasons
from fastpix2pix.kernels.losses import GAN_KINDS
from fastpix2pix.training.layers import Layer, discriminator_layers, generator_layers

from .devices import Setting
from .kernel_checks import (
    Outs,
    check_adam,
    check_bias_act,
    check_counting,
    check_gan_loss,
    check_l1_tanh_loss,
    check_levels,
    check_norm_act,
)
from .report import Report, Values

PART = "kernels"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Case = tuple[str, Callable[[], Values]]


def run(report: Report, at: Setting) -> None:
    """All cases, the type that training uses first."""
    if reasons := environment_reasons(at.device.type):
        report.add(PART, "all", "skipped", "; ".join(reasons))
        return
    for dtype in DTYPES:
        for batch in at.batches:
            seen = set()
            for name, function in cases(at, batch, dtype):
                if name not in seen:
                    seen.add(name)
                    report.run(PART, f"{str(dtype)[6:]} batch {batch} {name}", function)


def cases(at: Setting, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """(name with the shape, check) for one batch size; equal names are equal cases."""
    config = at.config(batch)
    levels = config.generator.depth
    for number, layer in enumerate(generator_layers(config, batch)):
        inner = number in (levels - 1, 2 * levels - 1)
        if number == 2 * levels - 1:
            outs: Outs = [("tanh", "")]
        elif number >= levels:
            outs = [("relu", "right")]
        else:
            outs = [("relu", "")] if inner else [("leaky", ""), ("relu", "left")]
        yield _activation(layer, outs, 1, batch, dtype, at.device)
        if layer.norm:
            yield _activation(layer, outs, batch, batch, dtype, at.device)  # instance norm
    for images, groups in ((2 * batch, 2), (batch, 1)):  # joined, and the generator's pass through it
        layers = discriminator_layers(config, images)
        for layer in layers:
            outs = [("none" if layer is layers[-1] else "leaky", "")]
            yield _activation(layer, outs, groups, images, dtype, at.device)
            if layer.norm:
                yield _activation(layer, outs, images, images, dtype, at.device)
    logits = discriminator_layers(config, batch)[-1].rows[0]
    for kind in GAN_KINDS:
        for targets in ((0.0, 1.0), (1.0,)):
            name = f"gan_loss {kind} {len(targets)} x {logits}"
            yield name, partial(check_gan_loss, logits, targets, kind, dtype, at.device)
    pixels, channels = generator_layers(config, batch)[-1].rows
    yield f"l1_tanh_loss {pixels * channels}", partial(check_l1_tanh_loss, pixels * channels, dtype, at.device)
    name = f"units and side_by_side {pixels} x {channels}"
    yield name, partial(check_levels, pixels, config.generator.in_channels, channels, dtype, at.device)
    if batch == at.batches[0]:
        yield "adam generator", partial(check_adam, at, "generator", dtype)
        yield "adam discriminator", partial(check_adam, at, "discriminator", dtype)
        yield "found_inf_ and advance", partial(check_counting, dtype, at.device)


def _activation(layer: Layer, outs: Outs, groups: int, images: int, dtype: torch.dtype, device: torch.device) -> Case:
    shape = "{} x {}".format(*layer.rows)
    what = " + ".join(f"{activation}{' ' + half if half else ''}" for activation, half in outs)
    if not layer.norm:
        bias = ", bias" if layer.bias else ""
        return f"bias_act {shape} {what}{bias}", partial(check_bias_act, layer, outs, dtype, device)
    noise = "" if layer.drop is None else f", dropout {layer.drop}"
    check = partial(check_norm_act, layer, outs, groups, images, dtype, device)
    return f"norm_act {shape} {what}, groups {groups}{noise}", check

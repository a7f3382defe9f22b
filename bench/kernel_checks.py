"""Each op once: its Triton kernels against float64, its reference in the same types and NaN around its outputs.

Gradients are zeroed where the float64 pre-activation is next to a kink: either slope is right there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpix2pix.kernels.adam import adam, advance, found_inf_
from fastpix2pix.kernels.bias_act import bias_act, bias_act_backward
from fastpix2pix.kernels.levels import side_by_side, units
from fastpix2pix.kernels.losses import gan_loss, l1_tanh_loss
from fastpix2pix.kernels.norm_act import Output, Running, norm_act
from fastpix2pix.kernels.norm_act_backward import hidden, norm_act_backward
from fastpix2pix.kernels.philox import Noise
from fastpix2pix.model import PatchGAN, Unet
from fastpix2pix.training.arena import Arena
from fastpix2pix.training.layers import Layer

from .compare import Poisoned, check
from .devices import Setting
from .report import Mismatch, Values

KINK = 1e-4
Outs = list[tuple[str, str]]  # activation, and which half of a concatenation it is written to: left, right or neither


def _draws(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(17)


def _randn(*shape: int, draws: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draws, device=draws.device)


def _wide(t: Tensor | None, to: torch.dtype | None) -> Tensor | None:
    return t if t is None or to is None else t.to(to)


def _gradients(h: Tensor, outs: Outs, dtype: torch.dtype, draws: torch.Generator) -> list[Tensor]:
    """One [M, K] per output, 0 where h is next to 0."""
    clear = h.abs() > KINK
    return [(_randn(*h.shape, draws=draws) * clear).to(dtype) for _ in outs]


def check_norm_act(
    layer: Layer, outs: Outs, groups: int, images: int, dtype: torch.dtype, device: torch.device
) -> Values:
    """Forward and backward, statistics, running statistics and affine gradients."""
    (m, c), draws = layer.rows, _draws(device)
    x = (_randn(m, c, draws=draws) * 0.7 + 2 * _randn(c, draws=draws)).to(dtype)
    gamma, beta = 1 + 0.5 * _randn(c, draws=draws), 0.3 * _randn(c, draws=draws)
    gamma[::5] *= -1
    counters = torch.tensor([7, 3, 11], device=device)
    noise = None if layer.drop is None else Noise(counters, layer.drop)
    tracked = groups <= 2  # more groups are an instance norm's, which has no running statistics
    poisoned: dict[str, Poisoned] = {}
    gradients: list[Tensor] = []

    def compute(impl: str, to: torch.dtype | None) -> dict[str, Tensor]:
        kind = to or dtype
        x_, (g_, b_) = x.to(kind), (_wide(t, to) for t in (gamma, beta))
        written = [Poisoned(m, c, kind, device, half) for _, half in outs]
        dx = Poisoned(m, c, kind, device)
        vector = torch.float32 if to is None else to
        running = None
        if tracked:
            start = (torch.zeros(c, dtype=vector, device=device), torch.ones(c, dtype=vector, device=device))
            running = Running(*start, torch.zeros((), dtype=torch.int64, device=device))
        outputs = [Output(p.array, activation) for p, (activation, _) in zip(written, outs, strict=True)]
        stats = norm_act(x_, g_, b_, outputs, groups=groups, running=running, images=images, noise=noise, impl=impl)
        if not gradients:  # the float64 run is the first
            gradients.extend(_gradients(hidden(x_, g_, b_, stats, images, None), outs, dtype, draws))
        dgamma, dbeta = (torch.full((c,), torch.nan, dtype=vector, device=device) for _ in range(2))
        given = [Output(g.to(kind), activation) for g, (activation, _) in zip(gradients, outs, strict=True)]
        norm_act_backward(given, x_, g_, b_, stats, dx.array, dgamma, dbeta, images=images, noise=noise, impl=impl)
        poisoned.clear()
        poisoned.update({f"y{i}": p for i, p in enumerate(written)}, dx=dx)
        found = {name: p.array for name, p in poisoned.items()}
        found |= {"mean": stats.mean, "rstd": stats.rstd, "dgamma": dgamma, "dbeta": dbeta}
        if running is not None:
            found |= {"running mean": running.mean, "running var": running.var, "batches": running.batches}
        return found

    return check(compute, ("mean", "rstd", "dgamma", "dbeta", "running mean", "running var"), lambda: poisoned)


def check_bias_act(layer: Layer, outs: Outs, dtype: torch.dtype, device: torch.device) -> Values:
    """Forward, backward and the bias's gradient."""
    (m, c), draws = layer.rows, _draws(device)
    x = (_randn(m, c, draws=draws) * 0.8).to(dtype)
    bias = 0.3 * _randn(c, draws=draws) if layer.bias else None
    h = x.double() if bias is None else x.double() + bias
    gradients = _gradients(h, outs, dtype, draws)
    poisoned: dict[str, Poisoned] = {}

    def compute(impl: str, to: torch.dtype | None) -> dict[str, Tensor]:
        kind = to or dtype
        x_, b_ = x.to(kind), _wide(bias, to)
        written = [Poisoned(m, c, kind, device, half) for _, half in outs]
        dx = Poisoned(m, c, kind, device)
        vector = torch.float32 if to is None else to
        dbias = torch.full((c,), torch.nan, dtype=vector, device=device) if bias is not None else None
        names = [activation for activation, _ in outs]
        bias_act(x_, b_, [Output(p.array, n) for p, n in zip(written, names, strict=True)], impl=impl)
        given = [Output(g.to(kind), n) for g, n in zip(gradients, names, strict=True)]
        bias_act_backward(given, x_, b_, dx.array, dbias, impl=impl)
        poisoned.clear()
        poisoned.update({f"y{i}": p for i, p in enumerate(written)}, dx=dx)
        found = {name: p.array for name, p in poisoned.items()}
        return found if dbias is None else found | {"dbias": dbias}

    return check(compute, ("dbias",), lambda: poisoned)


def check_gan_loss(n: int, targets: tuple[float, ...], kind: str, dtype: torch.dtype, device: torch.device) -> Values:
    """Means and gradient; with a loss scale in fp16, where training has one."""
    logits = (3 * _randn(n * len(targets), draws=_draws(device))).to(dtype)
    scale = torch.tensor(1024.0, device=device) if dtype == torch.float16 else None
    poisoned: dict[str, Poisoned] = {}

    def compute(impl: str, to: torch.dtype | None) -> dict[str, Tensor]:
        gradient = poisoned["gradient"] = Poisoned(1, len(logits), to or dtype, device)
        arguments = logits.to(to or dtype), targets, 0.5, gradient.array[0]
        means = gan_loss(*arguments, kind=kind, scale=_wide(scale, to), impl=impl)
        return {"means": means, "gradient": gradient.array}

    return check(compute, ("means",), lambda: poisoned)


def check_l1_tanh_loss(n: int, dtype: torch.dtype, device: torch.device) -> Values:
    """Mean and gradient, joined with an adversarial one."""
    draws = _draws(device)
    fake, target = _randn(n, draws=draws).tanh().to(dtype), _randn(n, draws=draws).tanh()
    target[::7] = fake[::7].float()  # equal: no gradient
    from_gan = (_randn(n, draws=draws) * 1e-3).to(dtype)
    scale = torch.tensor(1024.0, device=device) if dtype == torch.float16 else None
    poisoned: dict[str, Poisoned] = {}

    def compute(impl: str, to: torch.dtype | None) -> dict[str, Tensor]:
        kind = to or dtype
        gradient = poisoned["gradient"] = Poisoned(1, n, kind, device)
        given = fake.to(kind), target if to is None else target.to(to), from_gan.to(kind)
        mean = l1_tanh_loss(*given, 100.0, gradient.array[0], scale=_wide(scale, to), impl=impl)
        return {"mean": mean, "gradient": gradient.array}

    return check(compute, ("mean",), lambda: poisoned)


def check_levels(rows: int, before: int, channels: int, dtype: torch.dtype, device: torch.device) -> Values:
    """Equal to plain torch to the bit, but where bf16 is cut off (the interpreter)."""
    draws = torch.Generator(device).manual_seed(17)
    x, target = (
        torch.randint(256, (rows, c), generator=draws, device=device, dtype=torch.uint8) for c in (before, channels)
    )
    fake = _randn(rows, channels, draws=draws).tanh()

    def compute(impl: str, to: torch.dtype | None) -> dict[str, Tensor]:
        condition = units(x, to or dtype, impl=impl)
        return {"condition": condition, "seen": side_by_side(condition, fake.to(to or dtype), target, impl=impl)}

    return check(compute)


def check_adam(at: Setting, which: str, dtype: torch.dtype) -> Values:
    """Steps 1 and 2 of both segments of the network's arena, with random gradients."""
    config, device, draws = at.config(1), at.device, _draws(at.device)
    net = Unet(config.generator) if which == "generator" else PatchGAN(config.discriminator())
    arena = Arena(net.to(device), dtype)
    scale = torch.tensor(1024.0, device=device) if dtype == torch.float16 else None
    found: Values = {}
    for name in ("weights", "vectors"):
        segment = getattr(arena, name)
        gradients = [(_randn(len(segment.p), draws=draws) * 1e-3).to(segment.g.dtype) for _ in range(2)]
        start = segment.p.clone()

        def compute(
            impl: str,
            to: torch.dtype | None,
            start: Tensor = start,
            gradients: list[Tensor] = gradients,
            half: Tensor | None = segment.half,
        ) -> dict[str, Tensor]:
            p = start.clone() if to is None else start.to(to)
            m, v = torch.zeros_like(p), torch.zeros_like(p)
            copy = None if half is None else torch.full_like(half, torch.nan, dtype=to)
            lr = torch.tensor(config.lr, device=device)
            for number, g in enumerate(gradients, start=1):
                step = torch.tensor(number, device=device)
                given = g if to is None else g.to(to)
                adam(p, m, v, given, copy, lr, step, beta1=config.beta1, beta2=config.beta2, scale=scale, impl=impl)
            results = {"update": p - (start if to is None else start.to(to)), "m": m, "v": v, "p": p}
            return results if copy is None else results | {"half": copy}

        # "update" is p's change, 1e-2 of p, so p's own rounding is what the largest error may be
        found |= {f"{name} {key}": share for key, share in check(compute, ("update",)).items()}
    return found


def check_counting(dtype: torch.dtype, device: torch.device) -> Values:
    """The overflow flag at every place it can hide, and the counters with and without it."""
    wrong = []
    for value, at in ((0.0, 0), (torch.inf, 0), (-torch.inf, 4000), (torch.nan, 4999)):
        g = torch.ones(5000, dtype=dtype, device=device)
        g[at] = value if value else 1.0
        flag = torch.zeros((), device=device)
        found_inf_(g, flag, impl="triton")
        if bool(flag) != bool(value):
            wrong.append(f"found_inf_ says {flag.item()} for {value} at {at}")
        counters, step = torch.tensor([5, 7, 9], device=device), torch.tensor(3, device=device)
        advance(counters, step, 16, flag, impl="triton")
        if (*counters.tolist(), int(step)) != (5, 8, 25, 3 if value else 4):
            wrong.append(f"advance gives {counters.tolist()}, {int(step)} with found_inf = {flag.item()}")
    if wrong:
        raise Mismatch("; ".join(wrong))
    return {}

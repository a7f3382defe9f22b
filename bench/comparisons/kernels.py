"""The explicit step's kernels (Triton on a GPU, their references on a CPU) against what plain torch does there.

Warm: one set of arrays, which a cache may hold. Cold: as many sets as no cache holds, taken in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpix2pix.kernels.adam import adam
from fastpix2pix.kernels.bias_act import bias_act, bias_act_backward
from fastpix2pix.kernels.losses import gan_loss, l1_tanh_loss
from fastpix2pix.kernels.norm_act import Output, Running, norm_act
from fastpix2pix.kernels.norm_act_backward import norm_act_backward
from fastpix2pix.model import Unet
from fastpix2pix.training.arena import Arena
from fastpix2pix.training.layers import Layer, discriminator_layers, generator_layers

from ..comparison import Comparison, require_close
from ..devices import Setting
from ..roofline import Device, memory_us
from ..timing import Run, rotating

OURS, PLAIN = "kernel", "plain torch"
CPU_CACHE = 64 << 20  # bytes: more than the last-level cache of most
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}  # of the largest value
Results = list[Tensor]
Built = tuple[Run, Callable[[], Results]]  # one call, and what it has written


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    name: str
    ours: Callable[[], Built]
    plain: Callable[[], Built]
    bytes: int  # that the op has to read and write at least


def comparisons(at: Setting) -> Iterator[Comparison]:
    """Every op at its largest shape, norm_act at its deepest too."""
    dtype = torch.bfloat16 if at.device.type == "cuda" else torch.float32
    config = at.config(at.batches[-1])
    layers = generator_layers(config, config.batch)
    normed = [layer for layer in layers[: config.generator.depth] if layer.norm]
    first = discriminator_layers(config, config.batch)[0]
    logits = discriminator_layers(config, config.batch)[-1].rows[0]
    pixels = layers[-1].rows[0] * layers[-1].rows[1]
    for cache in ("warm", "cold"):
        cases = [
            _norm_act(normed[0], dtype, at.device),
            *([_norm_act(normed[-1], dtype, at.device)] if cache == "warm" else []),
            _norm_act_backward(normed[0], dtype, at.device),
            _bias_act(first, dtype, at.device),
            _l1_tanh_loss(pixels, dtype, at.device),
        ]
        if cache == "warm":
            cases += [_gan_loss(logits, dtype, at.device), _adam(at, dtype)]
        for case in cases:
            yield _comparison(case, cache, at)


def _comparison(case: Case, cache: str, at: Setting) -> Comparison:
    copies = 1 if cache == "warm" else min(32, 2 * _cache_bytes(at.device) // case.bytes + 2)
    dtype = torch.bfloat16 if at.device.type == "cuda" else torch.float32

    def ours() -> Run:
        run, results = case.ours()
        run()
        plain, wanted = case.plain()
        plain()
        require_close(case.name, results(), wanted(), CLOSE[dtype])
        return run if copies == 1 else rotating(lambda: case.ours()[0], copies)

    def plain() -> Run:
        return rotating(lambda: case.plain()[0], copies)

    def floor_ms(device: Device) -> float:
        return memory_us(case.bytes, device) / 1e3

    ways = {OURS: ours, PLAIN: plain}
    # what a cache holds may be faster than memory: no floor for warm calls
    return Comparison(
        "kernels", f"{case.name}, {cache}", ways, OURS, PLAIN, floor_ms=None if cache == "warm" else floor_ms
    )


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE


def _draws(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(23)


def _randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=_draws(device), device=device).to(dtype)


def _image(rows: Tensor, layer: Layer) -> Tensor:
    """[N * H * W, C] seen as channels-last [N, C, H, W]."""
    n, c, h, w = layer.y
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _shape(layer: Layer) -> str:
    return "{}x{}".format(*layer.rows)


def _norm_act(layer: Layer, dtype: torch.dtype, device: torch.device) -> Case:
    """Batch norm, leaky for the next block and relu for the skip: in one pass, or one after the other."""
    m, c = layer.rows

    def arrays() -> tuple[Tensor, ...]:
        x = _randn(m, c, dtype=dtype, device=device) * 0.7 + 0.3
        gamma, beta = torch.linspace(0.5, 1.5, c, device=device), torch.linspace(-0.3, 0.3, c, device=device)
        mean, var = torch.zeros(c, device=device), torch.ones(c, device=device)
        return x, gamma, beta, mean, var, torch.empty_like(x), torch.empty_like(x)

    def ours() -> Built:
        x, gamma, beta, mean, var, leaky, relu = arrays()
        batches = torch.zeros((), dtype=torch.int64, device=device)
        outputs, running = [Output(leaky, "leaky"), Output(relu, "relu")], Running(mean, var, batches)
        return partial(norm_act, x, gamma, beta, outputs, running=running), lambda: [leaky, relu]

    def plain() -> Built:
        x, gamma, beta, mean, var, leaky, relu = arrays()
        image = _image(x, layer)

        def run() -> None:
            h = F.batch_norm(image, mean, var, gamma, beta, training=True)
            leaky.copy_(F.leaky_relu(h, 0.2).permute(0, 2, 3, 1).reshape(m, c))
            relu.copy_(F.relu(h).permute(0, 2, 3, 1).reshape(m, c))

        return run, lambda: [leaky, relu]

    return Case(f"norm_act {_shape(layer)}", ours, plain, 3 * m * c * dtype.itemsize)


def _norm_act_backward(layer: Layer, dtype: torch.dtype, device: torch.device) -> Case:
    """Gradients of input, gamma and beta from those of both outputs."""
    m, c = layer.rows

    def arrays() -> tuple[Tensor, ...]:
        x = _randn(m, c, dtype=dtype, device=device)
        gamma, beta = torch.linspace(0.5, 1.5, c, device=device), torch.linspace(-0.3, 0.3, c, device=device)
        return x, gamma, beta, _randn(m, c, dtype=dtype, device=device), _randn(m, c, dtype=dtype, device=device)

    def ours() -> Built:
        x, gamma, beta, for_leaky, for_relu = arrays()
        outs = [Output(torch.empty_like(x), "leaky"), Output(torch.empty_like(x), "relu")]
        statistics = norm_act(x, gamma, beta, outs)
        dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
        given = [Output(for_leaky, "leaky"), Output(for_relu, "relu")]
        run = partial(norm_act_backward, given, x, gamma, beta, statistics, dx, dgamma, dbeta)
        return run, lambda: [dx, dgamma, dbeta]

    def plain() -> Built:
        x, gamma, beta, for_leaky, for_relu = arrays()
        leaves = [t.requires_grad_() for t in (x, gamma, beta)]
        h = F.batch_norm(_image(x, layer), None, None, gamma, beta, training=True)
        outputs = [F.leaky_relu(h, 0.2), F.relu(h)]
        given = [_image(for_leaky, layer), _image(for_relu, layer)]
        last: Results = []

        def run() -> None:
            last[:] = torch.autograd.grad(outputs, leaves, given, retain_graph=True)

        return run, lambda: last

    return Case(f"norm_act_backward {_shape(layer)}", ours, plain, 4 * m * c * dtype.itemsize)


def _bias_act(layer: Layer, dtype: torch.dtype, device: torch.device) -> Case:
    """Bias and leaky, forward and backward with the bias's gradient."""
    m, c = layer.rows

    def arrays() -> tuple[Tensor, ...]:
        bias = torch.linspace(-1, 1, c, device=device)
        return _randn(m, c, dtype=dtype, device=device), bias, _randn(m, c, dtype=dtype, device=device).flip(0)

    def ours() -> Built:
        x, bias, dy = arrays()
        y, dx, dbias = torch.empty_like(x), torch.empty_like(x), torch.empty_like(bias)

        def run() -> None:
            bias_act(x, bias, [Output(y, "leaky")])
            bias_act_backward([Output(dy, "leaky")], x, bias, dx, dbias)

        return run, lambda: [y, dx, dbias]

    def plain() -> Built:
        x, bias, dy = arrays()
        x.requires_grad_()
        bias.requires_grad_()
        last: Results = []

        def run() -> None:
            y = F.leaky_relu(x + bias.to(dtype), 0.2)
            last[:] = [y, *torch.autograd.grad(y, [x, bias], dy)]

        return run, lambda: last

    return Case(f"bias_act and backward {_shape(layer)}", ours, plain, 5 * m * c * dtype.itemsize)


def _gan_loss(n: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Losses of translated and real patches, and the gradient of their half sum."""

    def ours() -> Built:
        logits = 3 * _randn(2 * n, dtype=dtype, device=device)
        gradient = torch.empty_like(logits)
        last: Results = []

        def run() -> None:
            last[:] = [gan_loss(logits, (0.0, 1.0), 0.5, gradient), gradient]

        return run, lambda: last

    def plain() -> Built:
        logits = (3 * _randn(2 * n, dtype=dtype, device=device)).requires_grad_()
        last: Results = []

        def run() -> None:
            fake, real = logits[:n].float(), logits[n:].float()
            a = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
            b = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
            last[:] = [torch.stack((a, b)), *torch.autograd.grad(0.5 * (a + b), [logits])]

        return run, lambda: last

    return Case(f"gan_loss 2x{n}", ours, plain, 4 * n * dtype.itemsize)


def _l1_tanh_loss(n: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The L1 figure and the gradient of the generator's raw output, joined with the discriminator's."""

    def arrays() -> tuple[Tensor, ...]:
        raw = _randn(n, dtype=dtype, device=device)
        return raw, raw.flip(0).tanh().float(), (raw * 1e-6).roll(1)

    def ours() -> Built:
        raw, target, from_gan = arrays()
        fake, gradient = raw.tanh(), torch.empty_like(raw)
        last: Results = []

        def run() -> None:
            last[:] = [l1_tanh_loss(fake, target, from_gan, 100.0, gradient).view(()), gradient]

        return run, lambda: last

    def plain() -> Built:
        raw, target, from_gan = arrays()
        fake = raw.requires_grad_().tanh()
        last: Results = []

        def run() -> None:
            l1 = F.l1_loss(fake.float(), target)
            last[:] = [l1, *torch.autograd.grad([100 * l1, fake], [raw], [None, from_gan], retain_graph=True)]

        return run, lambda: last

    return Case(f"l1_tanh_loss {n}", ours, plain, n * (3 * dtype.itemsize + 4))


def _adam(at: Setting, dtype: torch.dtype) -> Case:
    """One update of the generator from its gradients: one flat array, or torch's fused Adam over all tensors."""
    config, device = at.config(1), at.device

    def net() -> Unet:
        torch.manual_seed(3)
        return Unet(config.generator).to(device)

    def gradients(own: Unet) -> None:
        draws = _draws(device)
        for parameter in own.parameters():
            drawn = torch.randn(parameter.shape, generator=draws, device=device) * 1e-3
            parameter.grad = torch.empty_like(parameter).copy_(drawn)

    def ours() -> Built:
        own = net()
        gradients(own)
        given = {name: parameter.grad for name, parameter in own.named_parameters()}
        arena = Arena(own, dtype)
        for name, gradient in given.items():
            arena.gradients[name].copy_(gradient)  # type: ignore[arg-type]
        lr = torch.tensor(2e-4, device=device)
        step = torch.ones((), dtype=torch.int64, device=device)

        def run() -> None:
            for s in arena.segments:
                adam(s.p, s.m, s.v, s.g, s.half, lr, step, beta1=config.beta1, beta2=config.beta2)

        return run, lambda: [p.detach().clone() for p in own.parameters()]

    def plain() -> Built:
        own = net()
        gradients(own)
        optimiser = torch.optim.Adam(own.parameters(), lr=2e-4, betas=(config.beta1, config.beta2), fused=True)
        return optimiser.step, lambda: [p.detach().clone() for p in own.parameters()]

    with torch.device("meta"):
        numbers = sum(p.numel() for p in Unet(config.generator).parameters())
    return Case(f"adam {numbers}", ours, plain, numbers * (28 + (dtype.itemsize if dtype != torch.float32 else 0)))

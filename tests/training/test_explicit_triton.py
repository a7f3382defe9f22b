"""The explicit step on Triton's interpreter (or, on a GPU, compiled) against its plain twin and float64."""

import pytest
import torch

from fastpix2pix.config import Discriminator, Generator, train_config
from fastpix2pix.kernels.dispatch import recorded
from fastpix2pix.model import build_discriminator, build_generator
from fastpix2pix.training import functions
from fastpix2pix.training.stages import How
from fastpix2pix.training.step import build_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNTERS = torch.tensor([99, 3, 0], device=DEVICE)
BASE = {
    **{"depth": 5, "ngf": 4, "ndf": 4, "n_layers": 1, "crop_size": 32, "batch": 2},
    **{"step": "explicit", "graph": "off", "precision": "fp32"},
}
ONE_ULP = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2**-7}  # the interpreter truncates bf16 stores


def inputs(batch: int, channels: int, count: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(5)
    made = [(torch.rand(batch, 32, 32, channels, generator=draws) * 2 - 1).permute(0, 3, 1, 2) for _ in range(count)]
    return [t.to(DEVICE) for t in made]


def run(network: str, config, dtype: torch.dtype, impl: str) -> dict[str, torch.Tensor]:
    """Output, gradients and running statistics of a wrapped pass, as float64."""
    torch.manual_seed(0)
    build = build_generator if network == "generator" else build_discriminator
    net = build(config).train().to(DEVICE)
    with torch.no_grad():  # larger than the initial weights, so that nothing is lost in rounding
        for p in net.parameters():
            p.mul_(6 if p.ndim == 4 else 1)
    if dtype == torch.float64:
        net = net.double()
    x, d = inputs(2, config.in_channels, 2)
    if network == "generator":
        y = functions.generator(net, x.to(dtype), COUNTERS, How(impl=impl))
        (y.double() * d[:, : y.shape[1]].double()).sum().backward()
    else:
        y = functions.discriminator(net, x.to(dtype), 2, How(impl=impl))
        (y.double() * d.flatten()[: y.numel()].double()).sum().backward()
    found = {"output": y.detach()} | {f"grad of {k}": p.grad for k, p in net.named_parameters()}
    found |= {k: b for k, b in net.named_buffers() if b.is_floating_point()}
    return {k: t.double() for k, t in found.items()}


CASES = [
    ("generator", Generator(depth=5, ngf=4), "batch norm, skips, dropout"),
    ("generator", Generator(depth=5, ngf=3, norm="instance", kind="encoder_decoder"), "a group per image, no skips"),
    ("discriminator", Discriminator(ndf=4, n_layers=2), "joined groups"),
    ("discriminator", Discriminator(ndf=5, n_layers=1, norm="instance"), "odd channels"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("network", "config", "why"), CASES, ids=[c[2] for c in CASES])
def test_whole_network_by_the_two_error_rule(network, config, why, dtype):
    """|fast - truth| <= 2 |plain in the same dtype - truth| + a little, by the norm of each tensor."""
    truth = run(network, config, torch.float64, "reference")
    plain = run(network, config, dtype, "reference")
    fast = run(network, config, dtype, "triton")
    for name, exact in truth.items():
        size = exact.norm()
        allowed = 2 * (plain[name] - exact).norm() + (1e-6 + 8 * ONE_ULP[dtype]) * size + 1e-7
        assert (fast[name] - exact).norm() <= allowed, name


def test_training_with_both_implementations_agrees_for_dozens_of_steps():
    fast, plain = (build_state(train_config(**BASE, impl=impl), DEVICE) for impl in ("triton", "reference"))
    (x,) = inputs(2, 3, 1)
    curve = []
    for number in range(24):
        found, expected = (s.step(x, x.flip(1), number, 1e-3) for s in (fast, plain))
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
        curve.append(found[3].item())
    assert curve[-1] < 0.97 * curve[0]  # it learned something
    for (name, b), c in zip(fast.generator.named_buffers(), plain.generator.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=0.05, atol=2e-3, msg=name)


def persistent(state) -> dict[int, str]:
    """Addresses that outlive a step."""
    found = {state.lr.data_ptr(): "lr", state.counters.data_ptr(): "counters"}
    found |= {t.data_ptr(): f"updates {k}" for k, t in state.updates.items()}
    for name, arena in (("g", state.arena_g), ("d", state.arena_d)):
        for segment in arena.segments:
            for field in ("p", "m", "v", "g", "half"):
                tensor = getattr(segment, field)
                if tensor is not None:
                    found[tensor.data_ptr()] = f"{name} {field}"
        found |= {t.data_ptr(): f"{name} {key}" for key, t in arena.compute.items()}
    return found


def tape_of(state, number: int, lr: float) -> list[tuple]:
    """The step's launches; addresses by name where they outlive the step."""
    names = persistent(state)
    x, y = inputs(2, 3, 2)
    with recorded() as tape:
        state.step(x, y, number, lr)
    rows = []
    for launch in tape:
        arguments = [(names.get(a[0]), *a[1:]) if isinstance(a, tuple) else a for a in launch.arguments]
        rows.append((launch.kernel, launch.grid, tuple(map(str, arguments)), launch.read, launch.written))
    return rows


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"objective": "l1+gan", "norm": "instance"}], ids=str)
def test_tapes_of_two_steps_are_identical(options):
    """What a CUDA graph needs: no launch depends on the step, the rate or the data."""
    state = build_state(train_config(**{**BASE, **options}, impl="triton"), DEVICE)
    state.step(*inputs(2, 3, 2), 0, 2e-4)
    first, second = tape_of(state, 1, 2e-4), tape_of(state, 2, 1e-5)
    assert len(first) > 30
    assert first == second
    assert any("'counters'" in a for row in first for a in row[2])
    assert any("'lr'" in a for row in first for a in row[2])


def test_every_byte_is_accounted_for():
    state = build_state(train_config(**BASE, impl="triton"), DEVICE)
    with recorded() as tape:
        state.step(*inputs(2, 3, 2), 0, 2e-4)
    assert all(launch.read > 0 and launch.written > 0 for launch in tape)
    adam = [launch for launch in tape if "adam" in launch.kernel]
    numbers = sum(len(s.p) for arena in (state.arena_g, state.arena_d) for s in arena.segments)
    idle = 2 * 12 * 32 * 32  # taps of the two innermost kernels that never meet a pixel
    assert sum(launch.read for launch in adam) == 16 * (numbers - idle)  # p, m, v, g
    assert sum(launch.written for launch in adam) == 12 * (numbers - idle)  # p, m, v

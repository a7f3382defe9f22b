"""Whole networks whose convolutions are the project's own, the library's, or both, against float64 and plain torch."""

import random

import pytest
import torch

from fastpix2pix.config import Discriminator, Generator
from fastpix2pix.kernels._triton import triton
from fastpix2pix.kernels.conv_plan import Problem, conv_plan
from fastpix2pix.kernels.dispatch import recorded
from fastpix2pix.kernels.geometry import Map
from fastpix2pix.kernels.wgrad_plan import wgrad_plan
from fastpix2pix.model import build_discriminator, build_generator
from fastpix2pix.training import functions
from fastpix2pix.training.convolution import Plans, node_of
from fastpix2pix.training.stages import How

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNTERS = torch.tensor([99, 3, 5], device=DEVICE)
CUT = 2**-4 if DEVICE.type == "cpu" else 0.0  # of bf16: the interpreter cuts off where hardware rounds
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")


def plans_of(net: torch.nn.Module, images: int, side: int, groups: int, kind: str) -> dict:
    """A plan for each product that the kernels can compute, from the shapes that a pass meets.

    own: the static plans; split: every sum in parts; mixed: some products are the library's, none of them twice alike.
    """
    draws, found = random.Random(4), {}

    def hook(name: str):
        def meet(conv, inputs, y) -> None:
            node = node_of(conv, f"{name}.conv.weight")
            if node.kind == "resize":
                return
            (_, c, *size), (_, k, *out), geometry = inputs[0].shape, y.shape, node.geometry
            x, z = Map(images, *size), Map(images, *out)
            forward = conv_plan(Problem(geometry.forward(), x, z, groups, (c,), k, True))
            dgrad = conv_plan(Problem(geometry.dgrad(), z, x, groups, (k,), c, True))
            plans = [p._replace(block_m=256) for p in (forward, dgrad)]  # fewer programs to interpret
            if kind == "split":
                plans = [p if c <= 8 else p._replace(tap_splits=2) for p, c in zip(plans, (c, k), strict=True)]
            wgrad = wgrad_plan(geometry, x, tuple(conv.weight.shape), 132)
            plans.append(wgrad._replace(splits=3) if kind == "split" else wgrad)
            if kind == "mixed":
                plans = [plan if draws.random() < 0.6 else None for plan in plans]
            found[node.weight, images] = Plans(*plans)

        return meet

    handles = [m.conv.register_forward_hook(hook(n)) for n, m in net.named_modules() if hasattr(m, "conv")]
    with torch.no_grad():
        net.eval()(torch.zeros(images, *_channels(net), side, side, device=DEVICE))
    for handle in handles:
        handle.remove()
    return found


def _channels(net: torch.nn.Module) -> tuple[int]:
    return (next(net.parameters()).shape[1],)


def run(config, images: int, side: int, kind: str, dtype: torch.dtype, impl: str) -> dict[str, torch.Tensor]:
    """Output, every `.grad` and the running statistics of a wrapped pass, as float64."""
    torch.manual_seed(0)
    generator = isinstance(config, Generator)
    net = (build_generator(config) if generator else build_discriminator(config)).to(DEVICE)
    with torch.no_grad():  # larger than the initial weights, so that nothing is lost in rounding
        for p in net.parameters():
            p.mul_(6 if p.ndim == 4 else 1)
    groups = 1 if generator else 2
    how = How({} if kind == "library" else plans_of(net, images, side, groups, kind), impl)
    net = net.train().double() if dtype == torch.float64 else net.train()
    draws = torch.Generator().manual_seed(5)
    x = (torch.rand(images, side, side, *_channels(net), generator=draws) * 2 - 1).permute(0, 3, 1, 2).to(DEVICE, dtype)
    x.requires_grad_(not generator)
    y = functions.generator(net, x, COUNTERS, how) if generator else functions.discriminator(net, x, groups, how)
    (y.double() * torch.randn(y.shape, generator=draws).to(DEVICE)).sum().backward()
    found = {"output": y.detach()} | {f"grad of {k}": p.grad for k, p in net.named_parameters()}
    if not generator:
        found["grad of the input"] = x.grad
    found |= {k: b for k, b in net.named_buffers() if b.is_floating_point()}
    return {k: t.double() for k, t in found.items()}


WIDE = Generator(depth=5, ngf=4)
CASES = [  # network, images, side, kind, dtype, why
    (WIDE, 4, 32, "own", torch.float32, "maps that readers normalise, dropout, skips read where they lie"),
    (WIDE, 1, 32, "own", torch.bfloat16, "bf16, batch 1"),
    (Generator(depth=5, ngf=3, norm="instance"), 3, 32, "mixed", torch.float32, "a group per image, odd channels"),
    (Generator(depth=5, ngf=4, kind="encoder_decoder"), 1, 32, "split", torch.float32, "no skips, every sum in parts"),
    (Generator(depth=5, ngf=4, up="resize"), 1, 32, "own", torch.float32, "up-blocks that are the library's"),
    (Discriminator(ndf=4, n_layers=2), 2, 32, "own", torch.float32, "joined at batch 1"),
    (Discriminator(ndf=5, n_layers=1, norm="instance"), 2, 16, "split", torch.float32, "joined, a group per image"),
    (Discriminator(ndf=4, n_layers=0), 2, 16, "mixed", torch.float32, "a pixel discriminator"),
]
SUMS = 2**-18  # of a tensor's norm: roundings of sums over all rows, whose terms cancel


@needs_triton
@pytest.mark.parametrize(("config", "images", "side", "kind", "dtype", "why"), CASES, ids=[c[-1] for c in CASES])
def test_whole_network_by_the_two_error_rule(config, images, side, kind, dtype, why):
    """|own - truth| <= 2 |plain in the same dtype - truth| + a little, by the norm of each tensor."""
    truth = run(config, images, side, "library", torch.float64, "reference")
    plain = run(config, images, side, "library", dtype, "reference")
    with recorded() as tape:
        own = run(config, images, side, kind, dtype, "triton")
    assert {"_conv_kernel", "_conv_wgrad_kernel"} <= {launch.kernel for launch in tape}
    if why.startswith("maps that readers"):
        assert "_finalise_kernel" in {launch.kernel for launch in tape}
    assert truth.keys() == own.keys()
    for name, exact in truth.items():
        size = exact.norm()
        allowed = 2 * (plain[name] - exact).norm() + (SUMS + CUT * (dtype == torch.bfloat16)) * size + 1e-7
        assert (own[name] - exact).norm() <= allowed, name


@pytest.mark.parametrize("kind", ["own", "mixed"])
def test_references_of_the_products_make_the_same_network(kind):
    """float64 through the plain twins: what fuses and what does not is the same function."""
    truth = run(WIDE, 2, 64, "library", torch.float64, "reference")
    for name, found in run(WIDE, 2, 64, kind, torch.float64, "reference").items():
        torch.testing.assert_close(found, truth[name], rtol=1e-6, atol=1e-7 * truth[name].abs().max().item(), msg=name)

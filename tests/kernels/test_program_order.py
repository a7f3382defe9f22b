"""Programs of a launch run in any order on a GPU: the results must not depend on it, to the bit.

Triton's interpreter runs them one after the other; here it does so backwards and shuffled as well.
"""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpix2pix import kernels
from fastpix2pix.kernels._triton import interpreted, jit, tl, triton
from fastpix2pix.kernels.adam import BLOCK, adam, advance, found_inf_
from fastpix2pix.kernels.bias_act import bias_act, bias_act_backward
from fastpix2pix.kernels.conv import Norm, conv, conv_dgrad
from fastpix2pix.kernels.conv_plan import ConvPlan
from fastpix2pix.kernels.conv_wgrad import conv_wgrad
from fastpix2pix.kernels.dispatch import launch, recorded
from fastpix2pix.kernels.finalise import finalise
from fastpix2pix.kernels.geometry import Geometry, Map, Source
from fastpix2pix.kernels.levels import side_by_side, units
from fastpix2pix.kernels.losses import gan_loss, l1_tanh_loss
from fastpix2pix.kernels.merge import merge_sums, merge_tiles
from fastpix2pix.kernels.norm_act import Output, Running, Statistics, norm_act, norm_act_backward
from fastpix2pix.kernels.philox import Noise
from fastpix2pix.kernels.rows import Sums, Tiles
from fastpix2pix.kernels.wgrad_plan import WgradPlan
from tests.kernels.common import BOTH, normal

pytestmark = pytest.mark.skipif(not interpreted, reason="the order of programs is the interpreter's to choose")
SEED = 0  # shuffles two programs, too


def norm_act_forward(rows: int, channels: int, groups: int) -> list[Tensor]:
    x, (gamma, beta, mean, var) = normal(groups * rows, channels), normal(4, channels, seed=1).unbind()
    y = x.new_empty(2, *x.shape)
    running = Running(mean, var.abs(), torch.tensor(5))
    noise = Noise(torch.tensor([2**40, 4, 9]), 2)
    outputs = [Output(rows, name) for rows, name in zip(y, BOTH, strict=True)]
    statistics = norm_act(x, gamma, beta, outputs, groups=groups, noise=noise, running=running, impl="triton")
    return [y, *statistics, *running[:3]]


def norm_act_back(rows: int, channels: int, groups: int) -> list[Tensor]:
    x, (gamma, beta, dgamma, dbeta) = normal(groups * rows, channels), normal(4, channels, seed=1).unbind()
    gradients = [Output(rows, name) for rows, name in zip(normal(2, *x.shape, seed=2), BOTH, strict=True)]
    statistics = Statistics(normal(groups, channels, seed=3), normal(groups, channels, seed=4).abs())
    dx = torch.empty_like(x)
    options = {"noise": Noise(torch.tensor([2**40, 4, 9]), 2), "accumulate": True, "impl": "triton"}
    norm_act_backward(gradients, x, gamma, beta, statistics, dx, dgamma, dbeta, **options)
    return [dx, dgamma, dbeta]


def bias_act_both(rows: int, channels: int) -> list[Tensor]:
    x, (bias, dbias) = normal(rows, channels), normal(2, channels, seed=1).unbind()
    y, dx = x.new_empty(2, *x.shape), torch.empty_like(x)
    bias_act(x, bias, [Output(rows, name) for rows, name in zip(y, BOTH, strict=True)], impl="triton")
    gradients = [Output(rows, name) for rows, name in zip(normal(2, *x.shape, seed=2), BOTH, strict=True)]
    bias_act_backward(gradients, x, bias, dx, dbias, accumulate=True, impl="triton")
    return [y, dx, dbias]


def losses() -> list[Tensor]:
    logits, fake, target, from_gan = normal(4, 3 * BLOCK + 2)
    gradients = logits.new_empty(2, len(logits))
    gan = gan_loss(logits, (0.0, 1.0), 0.5, gradients[0], impl="triton")
    return [gan, l1_tanh_loss(fake.tanh(), target, from_gan, 100.0, gradients[1], impl="triton"), gradients]


def pair() -> list[Tensor]:
    rows = BLOCK + 1
    levels, fake = (normal(rows, 3) * 60 + 128).to(torch.uint8), normal(rows, 3, seed=1)
    condition = units(levels, torch.float32, impl="triton")
    return [condition, side_by_side(condition, fake, levels, impl="triton")]


def optimiser(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[Tensor]:
    whole = normal(5, 8 * BLOCK)
    state = [t.as_strided(shape, strides, t.storage_offset()) for t in (*whole[:2], whole[2].abs_(), *whole[3:])]
    half = state[4].half()
    half = torch.empty(8 * BLOCK, dtype=torch.half).as_strided(shape, strides).copy_(half)
    adam(*state[:4], half, torch.tensor(1e-3), torch.tensor(3), beta1=0.5, beta2=0.999, impl="triton")
    return [whole, half]


def overflow_and_counters() -> list[Tensor]:
    found, counters, step = torch.zeros(()), torch.tensor([7, 0, 0]), torch.tensor(1)
    g = torch.zeros(4 * BLOCK)
    g[[5, 2 * BLOCK]] = math.inf  # two programs of four raise the flag
    found_inf_(g, found, impl="triton")
    advance(counters, step, 2, found, impl="triton")
    return [found, counters, step]


def product(geometry: Geometry, inputs: int, splits: int = 1) -> list[Tensor]:
    """A forward product with statistics and what is made of them; the gradients of input and kernel."""
    size, channels, options = Map(2, 4, 4), 24, {"impl": "triton"}
    rows = 2 * geometry.output(4) ** 2
    shape = (inputs, channels) if geometry.transposed else (channels, inputs)
    w = normal(shape[0], geometry.kernel, geometry.kernel, shape[1], seed=1).permute(0, 3, 1, 2)
    x, g, y = Source(normal(size.rows, inputs), "relu"), normal(rows, channels, seed=2), torch.empty(rows, channels)
    plan = ConvPlan(16, 32, 16, splits, 1, 4, 2)
    made = conv([x], w, geometry, size, y, groups=2, statistics=True, plan=plan, **options).tiles
    dx, dw = torch.empty(size.rows, inputs), torch.empty_like(w)
    before = Statistics(normal(2, inputs, seed=3), normal(2, inputs, seed=4).abs())
    norm = Norm(normal(size.rows, inputs, seed=5), None, None, before, "leaky")
    sums = conv_dgrad(g, w, geometry, size, dx, norm=norm, groups=2, plan=plan, **options).sums
    conv_wgrad([x], g, dw, geometry, size, plan=WgradPlan(16, 16, 32, splits, 4, 2), **options)
    finished = () if made is None else finalise(made, None, None, rows=rows // 2, **options)
    return [y, dx, dw, *(() if sums is None else sums), *(t for part in finished for t in part)]


def merged() -> list[Tensor]:
    tiles = Tiles(normal(2, 200, 40), normal(2, 200, 40, seed=1).abs(), 4)
    return [*merge_tiles(tiles, 800, impl="triton")[:2], *merge_sums(Sums(tiles.mean, tiles.m2), impl="triton")]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "norm_act, tiles merged": lambda: norm_act_forward(300, 40, 2),
    "norm_act, a group is a tile": lambda: norm_act_forward(60, 40, 2),
    "norm_act, statistics of many groups": lambda: norm_act_forward(8, 40, 3),
    "norm_act_backward, tiles merged": lambda: norm_act_back(300, 40, 2),
    "norm_act_backward, a group is a tile": lambda: norm_act_back(60, 40, 2),
    "bias_act": lambda: bias_act_both(300, 40),
    "losses": losses,
    "levels": pair,
    "adam, flat": lambda: optimiser((3 * BLOCK + 64,), (1,)),
    "adam, rows apart": lambda: optimiser((3, 2, BLOCK // 2), (2 * BLOCK, BLOCK, 1)),
    "overflow, counters": overflow_and_counters,
    "convolution": lambda: product(Geometry(4, 2, 1), 20),
    "transposed convolution, sums in parts": lambda: product(Geometry(4, 2, 1, True), 20, splits=2),
    "tiles and sums merged": merged,
}


class Order:
    """Makes the interpreter run program `order[i]` where it would run program i, and notes which ran."""

    def __init__(self, rearrange: Callable[[list], list], patch: pytest.MonkeyPatch) -> None:
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        self.rearrange, self.set_dim, self.set_index = rearrange, builder.set_grid_dim, builder.set_grid_idx
        self.ran: list[list[tuple[int, ...]]] = []  # per launch
        patch.setattr(builder, "set_grid_dim", self.set_grid_dim)
        patch.setattr(builder, "set_grid_idx", self.set_grid_idx)

    def set_grid_dim(self, *grid: int) -> None:
        programs = list(itertools.product(*map(range, grid)))
        self.order = dict(zip(programs, self.rearrange(programs), strict=True))
        self.ran.append([])
        self.set_dim(*grid)

    def set_grid_idx(self, *index: int) -> None:
        self.ran[-1].append(self.order[index])
        self.set_index(*self.order[index])


ORDERS: dict[str, Callable[[list], list]] = {
    "reversed": lambda programs: programs[::-1],
    "shuffled": lambda programs: random.Random(SEED).sample(programs, len(programs)),
}


def run(case: Callable[[], list[Tensor]], rearrange: Callable[[list], list]) -> tuple[list[Tensor], set[str]]:
    """The results, and the kernels whose programs did not run in the usual order."""
    with pytest.MonkeyPatch.context() as patch, recorded() as tape:
        order = Order(rearrange, patch)
        found = case()
    changed = set()
    for entry, ran in zip(tape, order.ran, strict=True):
        assert len(ran) == len(set(ran)) == math.prod(entry.grid)
        if ran != sorted(ran):
            changed.add(entry.kernel)
    return found, changed


def check_order_does_not_matter(case: Callable[[], list[Tensor]]) -> dict[str, set[str]]:
    """By order, the kernels whose programs it did rearrange."""
    usual, changed = run(case, list)
    assert not changed
    rearranged = {}
    for name, rearrange in ORDERS.items():
        found, rearranged[name] = run(case, rearrange)
        for a, b in zip(usual, found, strict=True):
            assert not b.isnan().any()
            assert torch.equal(a, b), f"depends on the order of programs: {name}"
    return rearranged


def launched(case: Callable[[], list[Tensor]]) -> set[str]:
    with recorded(run=False) as tape:
        case()
    return {entry.kernel for entry in tape}


@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_the_order_of_programs(name):
    several = launched(CASES[name]) - {"_advance_kernel"}  # which is one program
    assert check_order_does_not_matter(CASES[name]) == dict.fromkeys(ORDERS, several)


if triton is not None:

    @jit
    def add_up_kernel(x_ptr, out_ptr):
        tl.store(out_ptr, tl.load(out_ptr) + tl.load(x_ptr + tl.program_id(0)))

    @jit
    def last_one_kernel(x_ptr, out_ptr):
        tl.store(out_ptr, tl.load(x_ptr + tl.program_id(0)))

    @jit
    def neighbour_kernel(x_ptr, out_ptr):
        i = tl.program_id(0)
        tl.store(out_ptr + i + 1, tl.load(out_ptr + i) + tl.load(x_ptr + i))


@pytest.mark.parametrize("name", ["add_up_kernel", "last_one_kernel", "neighbour_kernel"])
def test_a_kernel_that_needs_its_order_is_caught(name):
    def case() -> list[Tensor]:
        out = torch.zeros(5)
        launch(globals()[name], (4,), torch.tensor([1e8, 1.0, -1e8, 2.0]), out, read=16, written=16)
        return [out]

    with pytest.raises(AssertionError, match="depends on the order of programs: reversed"):
        check_order_does_not_matter(case)


def test_every_kernel_is_in_a_case():
    modules = [importlib.import_module(f"fastpix2pix.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    cases = [case for module in modules if hasattr(module, "compile_cases") for case in module.compile_cases()]
    assert set().union(*map(launched, CASES.values())) == {case.kernel.fn.__name__ for case in cases}

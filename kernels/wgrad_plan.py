"""How the gradient of a convolution's kernel is laid out as sums over rows, and how its launch is cut up.

Of a layer's two maps one lies plain, a row per term of the sums; of the other each tap gathers its own rows:

    dw[p, tap, q] = sum over rows m of  plain[m, p] * gathered[row of (m, tap), q]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .conv_plan import PROGRAMS
from .geometry import Geometry, Map

_THIN = 8  # channels of a map that is gathered with all its taps at once
_PARTIAL_BYTES = 4 << 20  # of partial sums that a split may always leave: they stay in the cache
_SHORTEST = 4  # steps that a split has at least: less does not fill its pipeline
_FLOPS_OF_A_BYTE = 200  # operations in the time of one byte: of an A100 156, an H200 206, an H100 295


class Roles(NamedTuple):
    """Which map is which, and where a sum is stored.

    The gathered map is the larger one: a convolution's input, a transposed one's output. Where the stride is 1 it is
    the output if that has few channels: then the input, which has many, is read once instead of once per tap.
    """

    input_plain: bool  # the layer's input is the plain map, its output's gradient the gathered one
    plain: Map
    gathered: Map
    p: int  # channels of the plain map
    q: int  # channels of the gathered map
    side: int  # taps a side
    stride: int
    padding: int
    strides: tuple[int, int, int]  # per p, tap and q in the kernel's memory, in elements
    flipped: bool  # tap t of the sums is the kernel's tap side**2 - 1 - t

    @property
    def taps(self) -> int:
        return self.side**2

    @property
    def few(self) -> bool:
        """Whether a pixel of the gathered map has so few channels that all taps are gathered at once."""
        return self.q <= _THIN

    @property
    def flops(self) -> int:
        """Two per product, padding included."""
        return 2 * self.plain.rows * self.taps * self.p * self.q

    @property
    def operands(self) -> int:
        """Numbers that are read."""
        return self.plain.rows * self.p + self.gathered.rows * self.q


def roles_of(
    geometry: Geometry,
    size: Map,  # of the layer's input
    kernel: tuple[int, ...],  # [d0, d1, k, k], channels-last in memory
) -> Roles:
    """The roles in a layer's kernel gradient."""
    d0, d1, side, _ = kernel
    output = Map(size.images, geometry.output(size.height), geometry.output(size.width))
    outer, inner = side * side * d1, 1
    if geometry.transposed:
        return Roles(True, size, output, d0, d1, side, 2, geometry.padding, (outer, d1, inner), False)
    if geometry.stride == 1 and d0 <= _THIN < d1:
        padding = side - 1 - geometry.padding
        return Roles(True, size, output, d1, d0, side, 1, padding, (inner, d1, outer), True)
    return Roles(
        False, output, size, d0, d1, side, geometry.stride, geometry.padding, (outer, d1, inner), False
    )  # fmt: skip


class WgradPlan(NamedTuple):
    """One way to launch it."""

    block_p: int  # channels of the plain map
    block_q: int  # channels of the gathered map, of one tap; more than it has: columns (tap, channel)
    block_rows: int  # rows of a step of the sum
    splits: int  # parts of the sum over rows
    warps: int
    stages: int

    def columns(self, roles: Roles) -> int:
        """Blocks of a row of the gradient."""
        if self.block_q > roles.q:
            return -(-roles.taps * roles.q // self.block_q)
        return roles.taps * -(-roles.q // self.block_q)

    def programs(self, roles: Roles) -> int:
        """Of the launch, where no block straddles two sources."""
        return -(-roles.p // self.block_p) * self.columns(roles) * self.splits


def wgrad_plan(
    geometry: Geometry,
    size: Map,  # of the input
    kernel: tuple[int, ...],  # [d0, d1, k, k]
    processors: int,  # of the GPU
) -> WgradPlan:
    """The static choice: the first of the candidates."""
    return wgrad_candidates(geometry, size, kernel, processors)[0]


def wgrad_candidates(geometry: Geometry, size: Map, kernel: tuple[int, ...], processors: int) -> list[WgradPlan]:
    """At most four plans that may be measured against each other, the safe one first.

    All fit 99 KB of shared memory (sm_86, sm_89, sm_120) and are compiled by `compile_cases`.
    """
    roles = roles_of(geometry, size, kernel)
    plain = [_split(roles, *shape) for shape in _shapes(roles)]
    found = [_even(roles, plan, processors) for plan in plain]
    if found[0] != plain[0]:
        found.append(plain[0])
    elif found[0].splits > 1:  # half as many splits, twice the work of each
        found.append(found[0]._replace(splits=found[0].splits // 2))
    return list(dict.fromkeys(found))[:4]


Shape = tuple[int, int, int, int, int]  # channels p, channels q or columns, rows, warps, stages
# Few channels. A transposed layer's p may be those of two sources of 64, where half of a block of 128 would be idle.
FLAT: tuple[Shape, ...] = ((128, 16, 32, 4, 3), (64, 16, 32, 4, 3), (64, 64, 32, 4, 3), (64, 128, 32, 8, 3))
DEEP: tuple[Shape, ...] = ((64, 128, 16, 8, 2), (64, 128, 32, 8, 2))  # one or two steps, and a large gradient to store
MIDDLE: Shape = (64, 64, 64, 4, 3)
LARGE: tuple[Shape, ...] = ((128, 128, 32, 8, 3), (64, 128, 32, 8, 3))


def _shapes(roles: Roles) -> Sequence[Shape]:
    if roles.few:
        columns = roles.taps * roles.q
        if columns <= 16:
            return FLAT[:1] if roles.flipped and roles.p > 64 else FLAT[1:2]
        return FLAT[2:3] if columns <= 64 else (FLAT[3], FLAT[2])
    if roles.plain.rows <= 64:
        return DEEP if roles.plain.rows <= 16 else DEEP[::-1]
    if roles.p > 64 and _split(roles, *LARGE[0]).programs(roles) >= PROGRAMS:
        return *LARGE, MIDDLE
    return MIDDLE, LARGE[1]


def _split(roles: Roles, p: int, q: int, rows: int, warps: int, stages: int) -> WgradPlan:
    """Double the splits until the device is busy, the parts get short or the partial sums large."""
    plan, partial = WgradPlan(p, q, rows, 1, warps, stages), 4 * roles.p * roles.q * roles.taps
    most = max(_PARTIAL_BYTES, roles.operands // 2)  # a quarter of what is read
    wanted = 2 * PROGRAMS if roles.few else PROGRAMS  # thin ones wait for memory: several share a multiprocessor
    while (
        plan.programs(roles) < wanted
        and roles.plain.rows >= 2 * plan.splits * _SHORTEST * rows
        and 2 * plan.splits * partial <= most
    ):
        plan = plan._replace(splits=2 * plan.splits)
    return plan


def _even(roles: Roles, plan: WgradPlan, processors: int) -> WgradPlan:
    """More splits where the last wave of programs leaves so many multiprocessors idle that it pays.

    128 tiles take an A100 (108) two waves, and their 640 fifths six of a fifth each.
    """
    if roles.few:  # bound by memory
        return plan
    most = min(8 * processors // plan.programs(roles) * plan.splits, roles.plain.rows // (_SHORTEST * plan.block_rows))
    finer = [plan._replace(splits=splits) for splits in range(plan.splits, most + 1)]
    best = min(finer, key=lambda plan: _cost(roles, plan, processors), default=plan)
    return best if _cost(roles, best, processors) < 0.95 * _cost(roles, plan, processors) else plan


def _cost(roles: Roles, plan: WgradPlan, processors: int) -> int:
    """Of a launch that its products bind, in operations: those of full waves, and the time of its partial sums."""
    waves = -(-plan.programs(roles) // processors)
    steps = -(-roles.plain.rows // (plan.splits * plan.block_rows))
    product = 2 * plan.block_p * plan.block_q * plan.block_rows * steps * waves * processors
    partial = 4 * roles.p * roles.q * roles.taps * plan.splits if plan.splits > 1 else 0
    return product + _FLOPS_OF_A_BYTE * 2 * partial  # written and read

"""How a convolution's launch is cut up: tiles of output rows and channels, and splits of the sum they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .geometry import Gather, Map

PROGRAMS = 128  # about one per multiprocessor of an A100 (108), H100 or H200 (132)
TILE_ROWS = 64  # rows of a group from which a product takes statistics: of a smaller one, tiles would be mostly empty
LAZY_ROWS = 256  # rows of a group from which readers normalise while loading: their own tiles do not cross it either
_PARTIAL_BYTES = 4 << 20  # of partial sums that a split may leave: they stay in the cache
_SHORTEST = 4  # blocks of channels that a split has at least: less does not fill its pipeline


class Problem(NamedTuple):
    """A product's sizes: all that a plan depends on."""

    gather: Gather
    size: Map  # of the input
    output: Map
    groups: int  # of images that no tile crosses
    inputs: tuple[int, ...]  # channels of the sources
    outputs: int  # channels
    plain: bool  # no scale and shift while loading

    @property
    def quotients(self) -> tuple[int, int]:
        """Values of q per dimension: output pixels of one parity."""
        p = self.gather.parities
        return -(-self.output.height // p), -(-self.output.width // p)

    @property
    def rows(self) -> int:
        """Of one parity of one group."""
        height, width = self.quotients
        return self.size.images // self.groups * height * width

    @property
    def useful(self) -> int:
        """Taps that meet the input, of the parity that has most."""
        height, width = self.quotients
        across = max(map(len, self.gather.useful_taps(self.size.width, width)))
        return max(map(len, self.gather.useful_taps(self.size.height, height))) * across

    @property
    def useful_of_kernel(self) -> int:
        """Taps of the kernel that are read at all."""
        height, width = self.quotients
        across = sum(map(len, self.gather.useful_taps(self.size.width, width)))
        return sum(map(len, self.gather.useful_taps(self.size.height, height))) * across

    @property
    def flat(self) -> bool:
        """Few enough input channels for taps and channels to be summed over as one short dimension."""
        return self.plain and len(self.inputs) == 1 and self.inputs[0] <= 8

    @property
    def flops(self) -> int:
        """Two per product, padding included."""
        g = self.gather
        return 2 * self.output.rows * (g.taps**2) * sum(self.inputs) * self.outputs


class ConvPlan(NamedTuple):
    """One way to launch a Problem."""

    block_m: int  # rows of a tile, output pixels of one parity
    block_n: int  # its channels
    block_k: int  # channels of a step of the sum
    tap_splits: int  # parts of the sum over taps
    channel_splits: int  # parts of the sum over channels
    warps: int
    stages: int
    flatten: int = 0  # 1: the loops over taps and channels as one, so that its loads never run dry

    @property
    def splits(self) -> int:
        return self.tap_splits * self.channel_splits


def stages_for(stages: int, element_size: int) -> int:
    """Of a plan, for operands of so many bytes: fp32 takes twice the shared memory and is bound by its products."""
    return stages if element_size <= 2 else max(1, stages // 2)


def conv_plan(problem: Problem) -> ConvPlan:
    """The static choice: the first of the candidates."""
    return conv_candidates(problem)[0]


def conv_candidates(problem: Problem) -> list[ConvPlan]:
    """At most four plans that may be measured against each other, the safe one first.

    All fit 99 KB of shared memory (sm_86, sm_89, sm_120) and are compiled by `compile_cases`.
    """
    shapes = _shapes(problem)
    found = [_split(problem, *shape) for shape in shapes]
    if len(problem.inputs) == 1 and shapes[0] in WIDE:  # two sources are two loops within the one over taps
        found[3:] = [_split(problem, *FLATTENED)._replace(flatten=1)]
    if found[0].splits > 1:  # half as many splits, twice the work of each
        found.append(_split(problem, *shapes[0], programs=PROGRAMS // 2))
    return list(dict.fromkeys(found))[:4]


# Rows, channels, summed channels, warps, stages. At 8 warps or more Triton has miscompiled sums over one loop of taps
# and channels (pytorch/pytorch#177823). The loops here are nested, but for FLAT, of which 4 warps are the safe plan,
# and FLATTENED.
# No plan may be timed before its numbers were checked on the device (tuning/numerics.py): neither the interpreter nor
# the compiler can see it.
FLAT = ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2))
THIN = ((128, 16, 64, 8, 4), (64, 16, 64, 4, 3))
DEEP = ((16, 64, 128, 8, 4),)
SMALL = ((32, 64, 128, 8, 3), (64, 64, 64, 8, 3))
LARGE = ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 128, 64, 8, 2))
WIDE = (*LARGE, SMALL[1])  # of maps with more rows than the smallest tiles have
FLATTENED = (64, 64, 64, 4, 3)
Shape = tuple[int, int, int, int, int]


def _shapes(problem: Problem) -> Sequence[Shape]:
    if problem.flat:
        return FLAT[::-1]
    if problem.outputs <= 16:
        return THIN
    if problem.rows <= 16:
        return *DEEP, SMALL[0]
    if problem.rows <= 32:
        return SMALL
    middle = SMALL[1]
    if problem.outputs <= 64:
        return LARGE[1], middle
    if tiles(problem, 128, 128) >= PROGRAMS:
        return *LARGE, middle
    wide = min(problem.rows, problem.outputs) >= LARGE[0][0]  # such tiles read half of what 64 x 64 do
    return middle, LARGE[0] if wide else LARGE[1]


def tiles(problem: Problem, block_m: int, block_n: int) -> int:
    """Programs of a launch without splits."""
    parts = problem.gather.parities**2 * problem.groups
    return parts * -(-problem.rows // block_m) * -(-problem.outputs // block_n)


def _split(problem: Problem, m: int, n: int, k: int, warps: int, stages: int, programs: int = PROGRAMS) -> ConvPlan:
    """Double the splits until the device is busy, the parts get short or the partial sums large."""
    splits, useful = 1, max(1, problem.useful)
    steps = useful * sum(-(-c // k) for c in problem.inputs)
    partial = 4 * problem.output.rows * problem.outputs
    while (
        not problem.flat
        and tiles(problem, m, n) * splits < programs
        and steps >= 2 * splits * _SHORTEST
        and 2 * splits * partial <= _PARTIAL_BYTES
    ):
        splits *= 2
    tap_splits = min(splits, 1 << (useful.bit_length() - 1))
    return ConvPlan(m, n, k, tap_splits, splits // tap_splits, warps, stages)

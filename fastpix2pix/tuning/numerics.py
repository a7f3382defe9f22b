"""Whether a plan computes what it should on this device: asked before it is timed.

The two-error rule: a result may be twice as wrong as plain torch in the same types, and one rounding more. And it has
to be the same to the bit when it is computed again: every sum has its order here, so what differs is a fault of timing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from ..kernels.conv import Norm, conv, conv_dgrad
from ..kernels.conv_plan import ConvPlan
from ..kernels.conv_wgrad import conv_wgrad
from ..kernels.geometry import Geometry, Map, Source
from ..kernels.rows import Output, Statistics
from ..kernels.statistics import of_tiles
from ..kernels.wgrad_plan import WgradPlan

SLACK = 32 * torch.finfo(torch.float32).eps  # of the largest value: sums in fp32 differ by their order
HALF_SLACK = 4 * SLACK  # likewise of half results: tensor cores cut every step of a sum off instead of rounding it
CHUNK = 1 << 22  # numbers compared at a time: in float64, all of a layer would take several times what it does

Found = dict[str, Tensor]
Rule = Literal["each", "typical", "largest"]


def excess(
    fast: Tensor,
    same: Tensor,  # plain torch in the types of `fast`
    exact: Tensor,  # plain torch in wider types
    *,
    by: Rule = "each",
) -> float:
    """Largest error as a share of the allowed one: up to 1 is right, NaN where `fast` has one.

    Allowed is twice the error of `same`: of the same number (each); of all numbers on average, where that is more
    (typical: sums of products, of which an operand computed while loading is now and then rounded the other way); the
    largest of all (largest: sums over many numbers, which may cancel).
    """
    half = fast.dtype.is_floating_point and fast.dtype.itemsize < 4
    chunks = list(zip(*(t.flatten().split(CHUNK) for t in (fast, same, exact)), strict=True))
    largest = _largest(e.double() for _, _, e in chunks)
    least = LEAST[by](s.double() - e.double() for _, s, e in chunks)

    def share(fast: Tensor, same: Tensor, exact: Tensor) -> Tensor:
        exact = exact.double()
        allowed = 2 * (same.double() - exact).abs().clamp(min=least)
        allowed = allowed + (HALF_SLACK if half else SLACK) * largest + torch.finfo(torch.float32).smallest_normal
        if half:
            allowed = allowed + torch.finfo(fast.dtype).eps * exact.abs() + torch.finfo(fast.dtype).smallest_normal
        return (fast.double() - exact).abs() / allowed

    return float(_largest(share(*chunk) for chunk in chunks))


def _largest(parts: Iterable[Tensor]) -> Tensor:
    """Of all absolute values; NaN where there is one."""
    return torch.stack([part.abs().max() for part in parts]).max()


def _typical(parts: Iterable[Tensor]) -> Tensor:
    """The root of the mean square."""
    squares, counts = zip(*((part.square().sum(), part.numel()) for part in parts), strict=True)
    return (torch.stack(squares).sum() / sum(counts)).sqrt()


# the least error of plain torch that a rule goes by
LEAST: dict[Rule, Callable[[Iterable[Tensor]], Tensor]] = {
    "each": lambda _: torch.tensor(0.0),
    "typical": _typical,
    "largest": _largest,
}


@contextmanager
def exact_fp32() -> Iterator[None]:
    """fp32 convolutions without TF32 (there are no other products), and without cuDNN's search for the fastest: without
    tensor cores it takes long, and these results are not timed."""
    cudnn = torch.backends.cudnn
    old = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = old


def forward_error(
    sources: Sequence[Source],
    w: Tensor,
    geometry: Geometry,
    size: Map,
    groups: int,
    statistics: bool,
    plan: ConvPlan,
    impl: str = "triton",
) -> str:
    """Why a forward plan may not be used; "" where it may."""
    rows = size.images * geometry.output(size.height) * geometry.output(size.width)
    channels = geometry.forward().channels(tuple(w.shape))[1]

    def compute(impl: str, wide: torch.dtype | None) -> Found:
        kernel, given = _cast(w, wide), [_source(source, wide) for source in sources]
        y = torch.full((rows, channels), math.nan, dtype=kernel.dtype, device=w.device)
        product = conv(
            given, kernel, geometry, size, y,
            groups=groups, statistics=statistics and plan.splits == 1, partials=True, plan=plan, impl=impl,
        )  # fmt: skip
        if product.partials is not None:
            y.copy_(product.partials.sum(0))
        if product.tiles is None:
            return {"y": y}
        mean, m2 = of_tiles(product.tiles, rows // groups)
        return {"y": y, "sum of means": mean, "sum of squares": m2}

    return _error(compute, w.dtype, impl)


def dgrad_error(
    g: Tensor,
    w: Tensor,
    geometry: Geometry,
    size: Map,
    norm: Norm | None,
    groups: int,
    plan: ConvPlan,
    impl: str = "triton",
) -> str:
    """Why a dgrad plan may not be used; "" where it may."""
    channels = geometry.dgrad().channels(tuple(w.shape))[1]
    norm = norm if plan.splits == 1 else None

    def compute(impl: str, wide: torch.dtype | None) -> Found:
        dx = torch.full((size.rows, channels), math.nan, dtype=wide or g.dtype, device=g.device)
        sums = conv_dgrad(
            _cast(g, wide), _cast(w, wide), geometry, size, dx,
            norm=_norm(norm, wide), groups=groups if norm is not None else 1, plan=plan, impl=impl,
        ).sums  # fmt: skip
        return {"dx": dx} if sums is None else {"dx": dx, "sum of dz": sums.dz.sum(1), "sum of dzx": sums.dzx.sum(1)}

    return _error(compute, w.dtype, impl)


def wgrad_error(
    sources: Sequence[Source],
    g: Tensor,
    dw: Tensor,
    geometry: Geometry,
    size: Map,
    plan: WgradPlan,
    impl: str = "triton",
) -> str:
    """Why a wgrad plan may not be used; "" where it may. `dw` is only looked at for its shape and strides."""

    def compute(impl: str, wide: torch.dtype | None) -> Found:
        into = torch.full_like(dw, math.nan, dtype=wide, memory_format=torch.channels_last)
        given = [_source(source, wide) for source in sources]
        conv_wgrad(given, _cast(g, wide), into, geometry, size, plan=plan, impl=impl)
        return {"sum over rows": into}

    return _error(compute, g.dtype, impl)


def _error(compute: Callable[[str, torch.dtype | None], Found], dtype: torch.dtype, impl: str) -> str:
    with exact_fp32():
        exact = compute("reference", torch.float64 if dtype == torch.float32 else torch.float32)
        same, fast, again = compute("reference", None), compute(impl, None), compute(impl, None)
    rules: dict[str, Rule] = {name: "largest" if name.startswith("sum") else "typical" for name in exact}
    shares = {name: excess(fast[name], same[name], exact[name], by=rule) for name, rule in rules.items()}
    wrong = [
        f"{name} is off by {share:.3g} times the allowed error" for name, share in shares.items() if not share <= 1
    ]
    wrong += [f"{name} is not the same twice" for name in fast if not torch.equal(fast[name], again[name])]
    return "; ".join(wrong)


def _cast(t: Tensor, wide: torch.dtype | None) -> Tensor:
    return t if wide is None else t.to(wide)


def _source(source: Source, wide: torch.dtype | None) -> Source:
    return source._replace(rows=_cast(source.rows, wide))


def _norm(norm: Norm | None, wide: torch.dtype | None) -> Norm | None:
    if norm is None or wide is None:
        return norm
    other = None if norm.other is None else Output(norm.other.rows.to(wide), norm.other.activation)
    statistics = Statistics(*(t.to(torch.promote_types(wide, t.dtype)) for t in norm.statistics))
    return norm._replace(x=norm.x.to(wide), statistics=statistics, other=other)

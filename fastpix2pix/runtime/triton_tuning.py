"""Plans of the Triton engine's products by measurement: each candidate in turn inside the whole generator.

What wins is kept per machine and precision under the product's sizes: other models with the same layers find it too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Modes
from ..device import resolve_precision
from ..errors import EnvironmentFailed, InputError
from ..kernels.conv_plan import ConvPlan, Problem, conv_candidates, conv_plan
from ..kernels.dispatch import environment_reasons, overlap_reasons
from ..kernels.geometry import Gather, Geometry, Source
from ..model import Unet
from ..model.load import load_generator
from ..tuning.cache import PlanCache
from ..tuning.measure import step_ms
from ..tuning.numerics import forward_error
from ..tuning.products import Ways, keep_plans
from ..tuning.verdicts import one_line
from . import auto_choice
from .load import resolve_modes
from .triton_engine import DTYPES, TritonEngine


def tune_model(
    model: str | Path,  # run folder, .safetensors or .pth
    device: torch.device,
    precision: str,
    batch: int,
    size: int | None,  # pixels a side; default: the model's record, else 256
    minutes: float,
    **options: Any,  # of tune_engine
) -> dict[str, Any]:
    """`tune_engine` in the model's own modes."""
    if reasons := environment_reasons(device.type):
        raise EnvironmentFailed(f"tune: {'; '.join(reasons)}")
    net, record = load_generator(model)
    modes, _ = resolve_modes(record)
    side = size or int(record.get("size") or 256)
    if side % net.config.multiple:
        raise InputError(f"size = {side}: a multiple of {net.config.multiple} is needed")
    return tune_engine(net, modes, device, precision, batch, (side, side), minutes, **options)


def describe(found: dict[str, Any]) -> list[str]:
    """Lines for a person."""
    lines = []
    for product in found["products"]:
        times = ", ".join(f"{n} {f'{t:.4f}' if isinstance(t, float) else t}" for n, t in product["ms"].items())
        lines.append(f"{product['problem']}: {product['plan']} of {times or 'nothing measured'}")
    lines.append(f"generator: {found['before_ms']:.4f} ms with static plans, {found['after_ms']:.4f} ms with these")
    for name, what in (("lazy", "large maps normalised by their readers"), ("overlap", "kernels that overlap")):
        ms, kept = found[f"{name}_ms"], "kept" if found[name] else "not kept"
        lines.append(f"{what}: {f'{ms:.4f} ms, {kept}' if isinstance(ms, float) else ms}")
    return [*lines, auto_choice.in_words(found["backends"])]


def tune_engine(
    net: Unet,
    modes: Modes,
    device: torch.device,
    precision: str,  # auto, fp32, bf16, fp16
    batch: int,
    size: tuple[int, int],  # height and width, multiples of the generator's
    minutes: float,  # of wall time, about
    *,
    impl: str = "triton",
    cache: PlanCache | None = None,
    count: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure the candidates of every product of one shape of batch; keeps what is fastest and returns what was found.

    {"before_ms", "after_ms", "lazy_ms", "lazy": whether it is kept, "overlap_ms": ms or why not, "overlap": likewise,
     "products": [{"problem", "plan", "ms": {plan: ms or why not}}, ...], "complete",
     "backends": what auto_choice.compare gives}
    """
    cache, end = cache or PlanCache(device), time.monotonic() + 60 * minutes
    precision = resolve_precision(precision, device)
    chosen: dict[Problem, ConvPlan] = {}

    def choose(problem: Problem) -> ConvPlan:
        return chosen.setdefault(problem, conv_plan(problem))

    def build(ways: Ways, graph: bool) -> TritonEngine:
        return TritonEngine(net, modes, device, precision, impl=impl, graph=graph, choose=choose, **ways._asdict())

    engine, lazy = (build(Ways(lazy=lazy), graph=False) for lazy in (False, True))
    draws = torch.Generator().manual_seed(1)
    x = torch.rand(batch, engine.in_channels, *size, generator=draws).mul_(2).sub_(1).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(batch, engine.out_channels, *size, device=device).contiguous(memory_format=torch.channels_last)

    def whole(engine: TritonEngine) -> float:
        return step_ms(lambda: engine.enqueue(x, y), device)

    before, meets = whole(engine), dict.fromkeys(chosen, engine)  # every product, and where it is
    whole(lazy)
    meets = dict.fromkeys(chosen, lazy) | meets
    products: list[dict[str, Any]] = []
    for number, (problem, at) in enumerate(meets.items()):
        found: dict[str, float | str] = {}
        right: dict[ConvPlan, float] = {}
        static = chosen[problem]
        for plan in conv_candidates(problem):
            if time.monotonic() > end:
                break
            chosen[problem] = plan
            found[_name(plan)] = ms = _measured(problem, plan, DTYPES[precision], device, impl, partial(whole, at))
            if isinstance(ms, float):
                right[plan] = ms
        chosen[problem] = min(right, key=lambda plan: right[plan], default=static)
        products.append({"problem": str(problem), "plan": _name(chosen[problem]), "ms": found})
        count(number + 1, len(chosen))
    complete = time.monotonic() <= end
    after, lazy_ms = whole(engine), whole(lazy)
    if lazy_ms < after:
        engine, after = lazy, lazy_ms
    overlapped = _overlapped(engine, y, whole)
    ways = Ways(isinstance(overlapped, float) and overlapped < after, engine.lazy)
    keep_plans(cache, precision, chosen, ways)
    backends = auto_choice.compare(build(ways, graph=True), net, x)
    auto_choice.keep(cache, net.config, modes, precision, backends)
    return {"before_ms": before, "after_ms": after, "lazy_ms": lazy_ms, "lazy": ways.lazy, "overlap_ms": overlapped,
            "overlap": ways.overlap, "products": products, "complete": complete, "backends": backends}  # fmt: skip


def _overlapped(
    engine: TritonEngine,
    y: Tensor,  # what its runs write; the same has to come out
    whole: Callable[[TritonEngine], float],
) -> float | str:
    """Milliseconds of the generator whose kernels overlap; or the reason why not."""
    if reasons := overlap_reasons(engine.device):
        return "; ".join(reasons)
    whole(engine)
    expected = y.clone()
    y.fill_(torch.nan)
    engine.overlap = True
    try:
        ms = whole(engine)
        return ms if torch.equal(y, expected) else "not the same picture"
    except Exception as error:
        return one_line(error)
    finally:
        engine.overlap = False


def _name(plan: ConvPlan) -> str:
    return ".".join(map(str, plan))


def _measured(
    problem: Problem, plan: ConvPlan, dtype: torch.dtype, device: torch.device, impl: str, whole: Callable[[], float]
) -> float | str:
    """Milliseconds of the whole generator; or the reason why not, where the numbers are wrong or the device refuses."""
    try:
        wrong = product_error(problem, plan, dtype, device, impl)
        return wrong or whole()
    except Exception as error:
        return one_line(error)


def product_error(
    problem: Problem, plan: ConvPlan, dtype: torch.dtype, device: torch.device, impl: str = "triton"
) -> str:
    """Why a plan may not be used for a product, on random tensors of its sizes; "" where it may."""
    draws = torch.Generator(device).manual_seed(2)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, device=device)

    def source(channels: int) -> Source:
        rows = randn(problem.size.rows, channels).to(dtype)
        if problem.plain:
            return Source(rows, "relu")
        return Source(rows, "relu", 1 + 0.1 * randn(problem.groups, channels), randn(problem.groups, channels))

    geometry = _geometry(problem.gather)
    channels = sum(problem.inputs)
    side, pair = problem.gather.kernel, (problem.outputs, channels)
    shape = (*(pair[::-1] if geometry.transposed else pair), side, side)
    w = (randn(*shape) / (channels * problem.gather.taps**2) ** 0.5).to(dtype).to(memory_format=torch.channels_last)
    sources = [source(channels) for channels in problem.inputs]
    return forward_error(sources, w, geometry, problem.size, problem.groups, True, plan, impl)


def _geometry(gather: Gather) -> Geometry:
    """The layer whose forward product this is."""
    return Geometry(4, 2, 1, True) if gather.parities == 2 else Geometry(gather.kernel, gather.step, -gather.first)

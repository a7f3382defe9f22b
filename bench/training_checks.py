"""The explicit step in bf16 against the plain one in fp32: gradients of one step, losses of many.

What counts as right is set by the same run: the plain step under bf16 autocast is as far off as bf16 makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastpix2pix.kernels.dispatch import environment_reasons, processors
from fastpix2pix.training.explicit_step import ExplicitStep
from fastpix2pix.training.module_step import ModuleStep
from fastpix2pix.training.plans import static_plans
from fastpix2pix.training.stages import How
from fastpix2pix.training.state import LOSSES, State
from fastpix2pix.tuning.numerics import exact_fp32

from .devices import Pair, Setting, synthetic_pairs
from .report import Mismatch, Report, Skipped, Values

FACTOR = 3.0  # errors allowed, in errors of autocast; 1.0 to 1.8 were seen with the reference kernels at full size
FLOOR = 0.01  # relative error that bf16 may have where autocast is right by chance
LARGEST = 0.95  # a gradient that is not written at all is off by 1
# Relative error allowed in fp32, where only the order of sums and cuDNN's algorithms differ, beside a share of
# autocast's: where that turns the sign of one number in front of a ReLU, the gradients behind it differ by 1 or 2 % in
# the paper's networks at batch 1, whose inner maps have few numbers.
FP32, FP32_SHARE = 5e-3, 0.25
SAME_CURVE = 1.15  # final L1 of two runs: at most this ratio apart, either way


def modules(at: Setting, batch: int, precision: str, **options: object) -> ModuleStep:
    """The plain step."""
    return ModuleStep(at.config(batch, precision=precision, step="modules", **options), at.device)


def explicit(
    at: Setting, batch: int, impl: str, graph: str = "off", own: bool = False, **options: object
) -> ExplicitStep:
    """The explicit step, in bf16 unless `options` say otherwise. own: its convolutions too, by the static plans."""
    if impl == "triton" and (reasons := environment_reasons(at.device.type)):
        raise Skipped("; ".join(reasons))
    chosen = {"precision": "bf16", "step": "explicit", "impl": impl, "graph": graph, **options}
    config = at.config(batch, **chosen)
    return ExplicitStep(config, at.device, How(static_plans(config, processors(at.device)) if own else {}, impl))


def relative(
    found: Tensor,
    exact: Tensor,
) -> float:
    """Norm of the difference over the norm; NaN where there is one."""
    size = exact.double().norm()
    error = (found.double() - exact.double()).norm()
    return float(error if size == 0 else error / size)


def run_gradients(report: Report, at: Setting) -> None:
    """The two smaller batch sizes; at every size that is timed, `steps` checks the whole step again."""
    for batch in at.batches[:2]:
        for precision in ("fp32", "bf16"):
            # Own convolutions: the interpreter cuts bf16 off; fp32 has no tensor cores and takes minutes to compile.
            for own in (False, True) if (at.device.type == "cuda") == (precision == "bf16") else (False,):
                row = f"batch {batch} {precision} triton{' own convolutions' * own}"
                report.run("gradients", row, partial(gradients, at, batch, "triton", precision, own))


def gradients(at: Setting, batch: int, impl: str, precision: str, own: bool = False) -> Values:
    """Losses and every parameter's gradient of one step at rate 0, without dropout, from the same weights."""
    ((x, y),) = synthetic_pairs(at.config(batch), 1, at.device)
    found: dict[str, dict[str, Tensor]] = {}
    with exact_fp32():
        for name, state in (
            ("exact", modules(at, batch, "fp32", dropout="none")),
            ("autocast", modules(at, batch, "bf16", dropout="none")),
            ("explicit", explicit(at, batch, impl, own=own, precision=precision, dropout="none")),
        ):
            losses = state.step(x, y, 0, 0.0)
            found[name] = dict(zip(LOSSES, losses.clone(), strict=True)) | _gradients_of(state)
    errors = {
        key: (relative(found["explicit"][key], exact), relative(found["autocast"][key], exact))
        for key, exact in found["exact"].items()
    }
    usual = sorted(plain for _, plain in errors.values())[len(errors) // 2]
    wrong = []
    for key, (error, plain) in errors.items():
        factor, floor = (FP32_SHARE, FP32) if precision == "fp32" else (FACTOR, FLOOR)
        allowed = min(factor * (plain if key in LOSSES else max(plain, usual)) + floor, LARGEST)
        if not error <= allowed:
            wrong.append(f"{key}: relative error {error:.3g}, autocast has {plain:.3g}")
    values: Values = {"median autocast error": usual, "explicit, autocast": _rounded(errors)}
    if wrong:
        raise Mismatch("; ".join(wrong), values)
    return values


def _gradients_of(state: State) -> dict[str, Tensor]:
    """Of the first step; an explicit one keeps none, and Adam's first moments say what it was given."""
    nets = {"generator": state.generator, "discriminator": state.discriminator}
    arenas = {"generator": state.arena_g, "discriminator": state.arena_d} if isinstance(state, ExplicitStep) else {}
    found = {}
    for prefix, net in nets.items():
        assert net is not None
        for name, parameter in net.named_parameters():
            arena = arenas.get(prefix)
            gradient = parameter.grad if arena is None else arena.moments[name][0] / (1 - state.config.beta1)
            assert gradient is not None
            found[f"{prefix}.{name}"] = gradient.detach().clone()
    return found


def _rounded(errors: dict[str, tuple[float, float]]) -> dict[str, list[float | str]]:
    def short(value: float) -> float | str:
        return float(f"{value:.3g}") if math.isfinite(value) else str(value)

    return {key: [short(value) for value in pair] for key, pair in errors.items()}


def run_curves(report: Report, at: Setting) -> None:
    """Three trainings of the same weights on the same pairs, at the first batch size."""
    batch = at.batches[0]
    pairs = synthetic_pairs(at.config(batch), 16, at.device, seed=3)
    final: dict[str, float] = {}
    runs: dict[str, Callable[[], State]] = {
        "modules fp32": partial(modules, at, batch, "fp32", dropout="none"),
        "modules bf16": partial(modules, at, batch, "bf16", dropout="none"),
        "explicit bf16 triton": partial(explicit, at, batch, "triton", "auto", dropout="none"),
    }
    for name, build in runs.items():
        report.run("curves", f"batch {batch} {name}", partial(curve, build, pairs, at.curve_steps, name, final))


def curve(build: Callable[[], State], pairs: list[Pair], steps: int, name: str, final: dict[str, float]) -> Values:
    """`steps` steps over the pairs in turn; the mean L1 of the last quarter goes into `final`."""
    state, kept = build(), []
    with exact_fp32():
        for number in range(steps):
            kept.append(state.step(*pairs[number % len(pairs)], number, state.config.lr).clone())
    losses = torch.stack(kept).cpu()
    final[name] = losses[-max(1, steps // 4) :, 3].mean().item()
    exact = final.get("modules fp32", math.nan)
    values: Values = {
        "steps": steps,
        "final_l1": round(final[name], 5),
        "of_fp32": round(final[name] / exact, 4) if exact == exact else None,
        "losses": dict(zip(LOSSES, losses[:: max(1, steps // 20)].round(decimals=4).T.tolist(), strict=True)),
    }
    if not losses.isfinite().all():
        raise Mismatch(f"losses are not finite from step {int((~losses.isfinite()).any(1).nonzero()[0])} on")
    ratio = final[name] / exact
    if exact == exact and not 1 / SAME_CURVE <= ratio <= SAME_CURVE:
        raise Mismatch(f"final L1 is {ratio:.3f} of fp32's; allowed are {1 / SAME_CURVE:.3f} to {SAME_CURVE}", values)
    return values

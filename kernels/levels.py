"""A pair as the networks read it: levels 0..255 become units -1..1, condition and image lie side by side.

Batches come as uint8, a quarter of fp32's bytes, and the values are those of data/images.to_unit to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .dispatch import CompileCase, choose, launch

BLOCK = 1024  # numbers per program


def units(
    x: Tensor,  # [...] uint8 levels, or float units
    dtype: torch.dtype,  # of the result
    *,
    impl: str = "auto",
) -> Tensor:  # shape and strides of x
    """level / 127.5 - 1 in fp32, rounded once to `dtype`; units only change their type."""
    if x.dtype != torch.uint8:
        return x.to(dtype)
    if choose("levels", impl, x, units_not_supported_reasons(x, dtype)) == "reference":
        wide = torch.promote_types(dtype, torch.float32)
        return (x.to(wide) / 127.5 - 1).to(dtype)
    found = torch.empty_like(x, dtype=dtype)
    sizes = {"read": x.nbytes, "written": found.nbytes}
    launch(_units_kernel, (-(-x.numel() // BLOCK),), x, found, x.numel(), BLOCK=BLOCK, **sizes)
    return found


def units_not_supported_reasons(x: Tensor, dtype: torch.dtype) -> list[str]:
    """Why the Triton kernel of `units` cannot take these arguments."""
    reasons = [] if _dense(x) else [f"x with strides {x.stride()} has gaps"]
    return reasons + wrong_types({"the result": dtype})


def side_by_side(
    condition: Tensor | None,  # [M, Ci] fp32, fp16 or bf16; None: the images alone
    fake: Tensor,  # [M, Co] dtype of condition
    target: Tensor,  # [M, Co] uint8 levels or fp32 units
    *,
    impl: str = "auto",
) -> Tensor:  # [2M, Ci + Co] dtype of fake
    """What the discriminator sees: rows of (condition, fake), and behind them those of (condition, target)."""
    reasons = side_by_side_not_supported_reasons(condition, fake, target)
    if choose("levels", impl, fake, reasons) == "reference":
        both = torch.cat((fake, units(target, fake.dtype, impl="reference")))
        return both if condition is None else torch.cat((condition.repeat(2, 1), both), 1)
    rows, channels = fake.shape
    before = 0 if condition is None else condition.shape[1]
    found = fake.new_empty(2 * rows, before + channels)
    n = found.numel() // 2
    launch(
        _side_by_side_kernel,
        (-(-n // BLOCK),),
        *(condition, fake, target, found, n),
        CI=before,
        CO=channels,
        BLOCK=BLOCK,
        read=(0 if condition is None else condition.nbytes) + fake.nbytes + target.nbytes,
        written=found.nbytes,
    )
    return found


def side_by_side_not_supported_reasons(condition: Tensor | None, fake: Tensor, target: Tensor) -> list[str]:
    """Why the Triton kernel of `side_by_side` cannot take these arguments."""
    given = {"fake": fake, "target": target} | ({} if condition is None else {"condition": condition})
    reasons = [f"{k} with strides {t.stride()} is not contiguous" for k, t in given.items() if not t.is_contiguous()]
    if target.shape != fake.shape:
        reasons.append(f"target {tuple(target.shape)} is not shaped like fake {tuple(fake.shape)}")
    if condition is not None and (len(condition), condition.dtype) != (len(fake), fake.dtype):
        about = f"{len(condition)} rows of {condition.dtype}"
        reasons.append(f"condition has {about}, fake {len(fake)} of {fake.dtype}")
    numbers = fake.numel() + (0 if condition is None else condition.numel())
    if numbers > 2**31 - BLOCK:  # divided in 32 bits
        reasons.append(f"{numbers} numbers in each half; {2**31 - BLOCK} are allowed")
    types = {"fake": fake.dtype} | ({} if target.dtype == torch.uint8 else {"target": target.dtype})
    return reasons + wrong_types(types)


def _dense(x: Tensor) -> bool:
    """Whether its numbers lie in one piece, in whatever order."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def wrong_types(types: dict[str, torch.dtype]) -> list[str]:
    """Which of these no kernel computes in."""
    allowed = (torch.float32, torch.float16, torch.bfloat16)
    needed = "float32, float16 or bfloat16 is needed"
    return [f"{name} is {dtype}; {needed}" for name, dtype in types.items() if dtype not in allowed]


@jit
def unit(value):
    """fp32 units of levels; of units themselves. Divided as torch divides: rounded to nearest."""
    if value.dtype == tl.uint8:
        return tl.div_rn(value.to(tl.float32), 127.5) - 1.0
    else:
        return value.to(tl.float32)


@jit
def _units_kernel(
    levels_ptr,  # [n] uint8
    units_ptr,  # [n] float
    n,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(levels_ptr + at, at < n, other=0)
    tl.store(units_ptr + at, unit(value).to(units_ptr.dtype.element_ty), at < n)


@jit
def _side_by_side_kernel(
    condition_ptr,  # [M, CI] float, or None
    fake_ptr,  # [M, CO] float
    target_ptr,  # [M, CO] uint8 or fp32
    seen_ptr,  # [2, M, CI + CO] float
    n,  # M (CI + CO)
    CI: tl.constexpr,
    CO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program writes the same stretch of both halves, so that the condition is loaded once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, channel = at // (CI + CO), at % (CI + CO)
    image = (at < n) & (channel >= CI)
    from_image = row * CO + channel - CI
    fake = tl.load(fake_ptr + from_image, image, other=0.0)
    real = unit(tl.load(target_ptr + from_image, image, other=0)).to(fake.dtype)
    if condition_ptr is not None:
        shared = tl.load(condition_ptr + row * CI + channel, (at < n) & (channel < CI), other=0.0)
        fake, real = tl.where(image, fake, shared), tl.where(image, real, shared)
    tl.store(seen_ptr + at, fake, at < n)
    tl.store(seen_ptr + n + at.to(tl.int64), real, at < n)


def compile_cases() -> list[CompileCase]:
    """Levels and units into every type; with and without a condition."""
    cases = [
        CompileCase(_units_kernel, {"levels_ptr": "*u8", "units_ptr": float_, "n": "i32:16"}, {"BLOCK": BLOCK})
        for float_ in ("*bf16", "*fp16", "*fp32")
    ]
    for float_, target, channels in (("*bf16", "*u8", 3), ("*fp16", "*fp32", 3), ("*fp32", "*u8", 0)):
        types = {"fake_ptr": float_, "target_ptr": target, "seen_ptr": float_, "n": "i32:16"}
        types |= {"condition_ptr": float_} if channels else {}
        absent = {} if channels else {"condition_ptr": None}
        cases.append(CompileCase(_side_by_side_kernel, types, {**absent, "CI": channels, "CO": 3, "BLOCK": BLOCK}))
    return cases

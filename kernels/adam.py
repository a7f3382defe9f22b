"""Adam over a flat arena in one pass: parameter, both moments, gradient, and the half copy the convolutions read.

An argument is an array [n], or rows [A, B, n] at any distance from each other: the part of an arena that is alive.

Rate and step number live on the device, so that a captured CUDA graph follows a schedule. Kingma and Ba 2015, alg. 1,
without weight decay, with torch.optim.Adam's rounding order of the bias corrections.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._triton import jit, tl
from .dispatch import CompileCase, choose, launch

BLOCK = 1024  # numbers per program: two 16-byte loads of each fp32 array per thread at 4 warps


def adam(
    p: Tensor,  # [n] or [A, B, n] fp32 master parameters, updated
    m: Tensor,  # fp32 first moment, updated; this and the others with the shape and strides of p
    v: Tensor,  # fp32 second moment, updated
    g: Tensor,  # fp32, fp16 or bf16 gradient
    half: Tensor | None,  # fp16 or bf16 copy of p, written
    lr: Tensor,  # [] fp32 on the device
    step: Tensor,  # [] int64 on the device: number of this update, from 1
    *,
    beta1: float,
    beta2: float,
    eps: float = 1e-8,
    scale: Tensor | None = None,  # [] fp32: loss scale, divided out of g
    found_inf: Tensor | None = None,  # [] fp32: where not 0, nothing is changed
    impl: str = "auto",
) -> None:
    """One update of every number of p; the arrays must not overlap, nor must their rows."""
    if choose("adam", impl, p, not_supported_reasons(p, m, v, g, half)) == "triton":
        _adam_triton(p, m, v, g, half, lr, step, beta1, beta2, eps, scale, found_inf)
        return
    grad = g.to(torch.promote_types(g.dtype, p.dtype))
    grad = grad if scale is None else grad / scale
    new_m = torch.lerp(m, grad, 1 - beta1)
    new_v = v * beta2 + grad * grad * (1 - beta2)
    number = step.to(torch.float64)
    size = (lr / (1 - beta1**number)).to(p.dtype)
    root = (1 - beta2**number).sqrt().to(p.dtype)
    new_p = p - size * new_m / (new_v.sqrt() / root + eps)
    updates = [(p, new_p), (m, new_m), (v, new_v)] + ([] if half is None else [(half, new_p.to(half.dtype))])
    for old, new in updates:
        old.copy_(new if found_inf is None else torch.where(found_inf != 0, old, new))


def not_supported_reasons(p: Tensor, m: Tensor, v: Tensor, g: Tensor, half: Tensor | None) -> list[str]:
    """Why the Triton kernel cannot take these arguments."""
    arrays = {"p": p, "m": m, "v": v, "g": g} | ({} if half is None else {"half": half})
    reasons = [f"p {tuple(p.shape)} is neither [n] nor [A, B, n]"] if p.ndim not in (1, 3) else []
    reasons += [f"{k} {tuple(t.shape)} is not shaped like p" for k, t in arrays.items() if t.shape != p.shape]
    like = (*p.stride()[:-1], 1)
    reasons += [f"{k} has strides {t.stride()}; {like} are needed" for k, t in arrays.items() if t.stride() != like]
    reasons += [f"{k} is {arrays[k].dtype}; float32 is needed" for k in "pmv" if arrays[k].dtype != torch.float32]
    return reasons


def found_inf_(
    g: Tensor,  # [n] float gradient, scaled
    found_inf: Tensor,  # [] fp32, set to 1 where g has an infinity or NaN, else left as it is
    *,
    impl: str = "auto",
) -> None:
    """Look for an overflow without telling the host."""
    if choose("adam", impl, g, [] if g.is_contiguous() else ["g is not contiguous"]) == "triton":
        grid = (-(-g.numel() // BLOCK),)
        launch(_found_inf_kernel, grid, g, found_inf, g.numel(), BLOCK=BLOCK, read=g.nbytes, written=4)
        return
    found_inf.copy_(torch.maximum(found_inf, (~torch.isfinite(g)).any().to(found_inf.dtype)))


def advance(
    counters: Tensor,  # [3] int64: seed, step, first image of the next batch (philox.Noise)
    adam_step: Tensor,  # [] int64: updates done so far + 1
    images: int,
    found_inf: Tensor | None = None,  # [] fp32: where not 0, adam_step stays
    *,
    impl: str = "auto",
) -> None:
    """Count one training step on the device: counters[1] += 1, counters[2] += images, adam_step += 1."""
    reasons = [] if counters.is_contiguous() else [f"counters with strides {counters.stride()} are not contiguous"]
    if choose("adam", impl, counters, reasons) == "triton":
        launch(_advance_kernel, (1,), counters, adam_step, found_inf, images, num_warps=1, read=28, written=24)
        return
    counters[1] += 1
    counters[2] += images
    adam_step += 1 if found_inf is None else (found_inf == 0).to(adam_step.dtype)


def _adam_triton(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    half: Tensor | None,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    # in double, as 1 - beta: fp32 is too short
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    outer, middle = p.shape[:-1] or (1, 1)
    launch(
        _adam_kernel,
        (-(-p.shape[-1] // BLOCK), middle, outer),
        *(p, m, v, g, half, lr, step, scale, found_inf),
        *(beta1, 1 - beta1, logs[0], beta2, 1 - beta2, logs[1], eps, *(p.stride()[:-1] or (0, 0)), p.shape[-1]),
        BLOCK=BLOCK,
        read=p.nbytes + m.nbytes + v.nbytes + g.nbytes,  # of the numbers in the rows: what lies between is not touched
        written=p.nbytes + m.nbytes + v.nbytes + (0 if half is None else half.nbytes),
    )


@jit
def _adam_kernel(
    p_ptr,  # [A, B, n] fp32
    m_ptr,  # [A, B, n] fp32
    v_ptr,  # [A, B, n] fp32
    g_ptr,  # [A, B, n] fp32, fp16 or bf16
    half_ptr,  # [A, B, n] fp16 or bf16, or None
    lr_ptr,  # [] fp32
    step_ptr,  # [] int64
    scale_ptr,  # [] fp32, or None
    found_inf_ptr,  # [] fp32, or None
    beta1,
    one_minus_beta1,
    log_beta1,
    beta2,
    one_minus_beta2,
    log_beta2,
    eps,
    stride_a,
    stride_b,
    n,
    BLOCK: tl.constexpr,
):
    """Program (i, b, a): block i of row (a, b). Every number is read once and written once."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if found_inf_ptr is not None:
        n = tl.where(tl.load(found_inf_ptr) == 0, n, 0)
    live = offsets < n
    offsets += tl.program_id(2).to(tl.int64) * stride_a + tl.program_id(1).to(tl.int64) * stride_b
    p = tl.load(p_ptr + offsets, live, other=0.0)
    m = tl.load(m_ptr + offsets, live, other=0.0)
    v = tl.load(v_ptr + offsets, live, other=0.0)
    g = tl.load(g_ptr + offsets, live, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        g /= tl.load(scale_ptr)
    step = tl.load(step_ptr).to(tl.float32)
    size = tl.load(lr_ptr) / _one_minus_exp(step * log_beta1)
    root = tl.sqrt(_one_minus_exp(step * log_beta2))
    m = m * beta1 + g * one_minus_beta1
    v = v * beta2 + g * g * one_minus_beta2
    p -= size * m / (tl.sqrt(v) / root + eps)
    tl.store(p_ptr + offsets, p, live)
    tl.store(m_ptr + offsets, m, live)
    tl.store(v_ptr + offsets, v, live)
    if half_ptr is not None:
        tl.store(half_ptr + offsets, p.to(half_ptr.dtype.element_ty), live)


@jit
def _one_minus_exp(x):  # x <= 0, fp32
    """1 - exp(x) without the cancellation near 0: Taylor's series to x^9 above -0.5, where the next term is 1e-10."""
    near = tl.maximum(x, -0.5)
    series = 1.0 + near / 9
    series = 1.0 + near / 8 * series
    series = 1.0 + near / 7 * series
    series = 1.0 + near / 6 * series
    series = 1.0 + near / 5 * series
    series = 1.0 + near / 4 * series
    series = 1.0 + near / 3 * series
    series = 1.0 + near / 2 * series
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@jit
def _found_inf_kernel(
    g_ptr,  # [n] float
    found_inf_ptr,  # [] fp32
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + offsets, offsets < n, other=0.0).to(tl.float32)
    bad = tl.max(tl.where(tl.abs(g) < float("inf"), 0, 1), 0)  # a NaN compares false
    tl.store(found_inf_ptr, 1.0, bad > 0)  # every program that writes writes the same


@jit
def _advance_kernel(
    counters_ptr,  # [3] int64
    adam_step_ptr,  # [] int64
    found_inf_ptr,  # [] fp32, or None
    images,
):
    tl.store(counters_ptr + 1, tl.load(counters_ptr + 1) + 1)
    tl.store(counters_ptr + 2, tl.load(counters_ptr + 2) + images)
    good = True
    if found_inf_ptr is not None:
        good = tl.load(found_inf_ptr) == 0
    tl.store(adam_step_ptr, tl.load(adam_step_ptr) + 1, good)


def compile_cases() -> list[CompileCase]:
    """Arena updates (n a multiple of 64) and odd arrays, every gradient type, with and without loss scaling.

    The strides of a flat array are 0, those of a kernel's rows multiples of its channels: 16 divides both.
    """
    moments = {"p_ptr": "*fp32", "m_ptr": "*fp32", "v_ptr": "*fp32", "lr_ptr": "*fp32", "step_ptr": "*i64"}
    floats = ("beta1", "one_minus_beta1", "log_beta1", "beta2", "one_minus_beta2", "log_beta2", "eps")
    cases = []
    for g, half, scaled, n in (
        ("*bf16", "*bf16", False, "i32:16"),
        ("*fp16", "*fp16", True, "i32:16"),
        ("*fp32", None, False, "i32:16"),
        ("*fp32", "*bf16", True, "i32"),
    ):
        types = {**moments, "g_ptr": g, **dict.fromkeys(floats, "fp32"), "n": n, "stride_a": n, "stride_b": n}
        types |= {"half_ptr": half} if half else {}
        types |= {"scale_ptr": "*fp32", "found_inf_ptr": "*fp32"} if scaled else {}
        absent = {name: None for name in ("half_ptr", "scale_ptr", "found_inf_ptr") if name not in types}
        cases.append(CompileCase(_adam_kernel, types, {**absent, "BLOCK": BLOCK}))
    for g in ("*fp16", "*fp32"):
        types = {"g_ptr": g, "found_inf_ptr": "*fp32", "n": "i32:16"}
        cases.append(CompileCase(_found_inf_kernel, types, {"BLOCK": BLOCK}))
    types = {"counters_ptr": "*i64", "adam_step_ptr": "*i64", "found_inf_ptr": "*fp32", "images": "i32"}
    cases.append(CompileCase(_advance_kernel, types, {}, num_warps=1))
    return cases

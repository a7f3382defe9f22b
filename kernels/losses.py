"""The losses of pix2pix, value and gradient in one pass (arXiv 1611.07004, section 3.1).

The values are sums in two stages of fixed order (one partial per program, then one program per mean): no atomics, so
they repeat to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import jit, tl
from .dispatch import CompileCase, choose, launch
from .levels import unit, units, wrong_types

GAN_KINDS = ("bce", "lsgan")
BLOCK = 1024  # numbers per program


def gan_loss(
    logits: Tensor,  # [G * n] fp32, fp16 or bf16, contiguous; G groups one after the other
    targets: tuple[float, ...],  # G labels: 1 real, 0 fake
    weight: float,  # of each group's mean in the loss that is differentiated
    gradient: Tensor,  # [G * n] dtype of logits, written: weight * scale * d mean_g / d logits
    *,
    kind: str = "bce",  # bce: -log sigmoid; lsgan: squared distance
    scale: Tensor | None = None,  # [] fp32 on the device: fp16 loss scale
    impl: str = "auto",
) -> Tensor:  # [G] fp32: each group's mean loss, neither weighted nor scaled
    """The adversarial loss of groups of patches against their labels."""
    if kind not in GAN_KINDS:
        raise ValueError(f"kind = {kind!r}: allowed are {', '.join(GAN_KINDS)}")
    if choose("losses", impl, logits, gan_not_supported_reasons(logits, targets, gradient)) == "triton":
        return _gan_loss_triton(logits, targets, weight, gradient, kind, scale)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(len(targets), -1)
    label = torch.stack([torch.full_like(row, target) for row, target in zip(z, targets, strict=True)])
    if kind == "bce":
        values, slope = F.binary_cross_entropy_with_logits(z, label, reduction="none"), torch.sigmoid(z) - label
    else:
        values, slope = (z - label) ** 2, 2 * (z - label)
    factor = weight / z.shape[1] * (1 if scale is None else scale)
    gradient.copy_((slope * factor).view(gradient.shape))
    return values.mean(1).float()


def gan_not_supported_reasons(logits: Tensor, targets: tuple[float, ...], gradient: Tensor) -> list[str]:
    """Why the Triton kernel of gan_loss cannot take these arguments."""
    reasons = _not_flat({"logits": logits, "gradient": gradient})
    if not 1 <= len(targets) <= 2:
        reasons.append(f"{len(targets)} groups; one or two are allowed")
    elif logits.numel() % len(targets):
        reasons.append(f"{logits.numel()} logits are not {len(targets)} groups of equal size")
    return reasons


def l1_tanh_loss(
    fake: Tensor,  # [P] fp32, fp16 or bf16: the generator's output, tanh(raw)
    target: Tensor,  # [P] fp32 units, or uint8 levels
    from_gan: Tensor | None,  # [P], or [M, C] whose rows lie apart; dtype of fake: scaled dL/d fake of the GAN loss
    weight: float,  # of mean |target - fake|; 0 leaves L1 a figure without a gradient
    gradient: Tensor,  # [P] dtype of fake, written: dL/d raw, through the tanh
    *,
    scale: Tensor | None = None,  # [] fp32 on the device: fp16 loss scale
    impl: str = "auto",
) -> Tensor:  # [] fp32: mean |target - fake|, neither weighted nor scaled
    """L1 to the target, joined with the adversarial gradient and taken through the last tanh."""
    if choose("losses", impl, fake, l1_not_supported_reasons(fake, target, from_gan, gradient)) == "triton":
        return _l1_tanh_loss_triton(fake, target, from_gan, weight, gradient, scale)
    y = fake.to(torch.promote_types(fake.dtype, torch.float32))
    factor = weight / y.numel() * (1 if scale is None else scale)
    target = units(target, torch.promote_types(target.dtype, torch.float32), impl="reference")
    g = torch.sign(y - target) * factor
    if from_gan is not None:
        g = g + from_gan.reshape(-1).to(y.dtype)
    gradient.copy_(g * (1 - y * y))
    return (y - target).abs().mean().float()


def l1_not_supported_reasons(fake: Tensor, target: Tensor, from_gan: Tensor | None, gradient: Tensor) -> list[str]:
    """Why the Triton kernel of l1_tanh_loss cannot take these arguments."""
    reasons = _not_flat({"fake": fake, "target": target, "gradient": gradient}, levels="target")
    if from_gan is None:
        return reasons
    if from_gan.ndim == 1:
        return reasons + _not_flat({"fake": fake, "from_gan": from_gan})
    if from_gan.ndim != 2 or from_gan.numel() != fake.numel() or from_gan.stride(1) != 1:
        shape = f"{tuple(from_gan.shape)} with strides {from_gan.stride()}"
        reasons.append(f"from_gan {shape}; rows of {fake.numel()} numbers in all are needed")
    return reasons + wrong_types({"from_gan": from_gan.dtype})


def _not_flat(arrays: dict[str, Tensor], levels: str = "") -> list[str]:  # the one that may be uint8
    (first, like), *_ = arrays.items()
    reasons = [f"{k} with strides {t.stride()} is not contiguous" for k, t in arrays.items() if not t.is_contiguous()]
    reasons += [f"{k} {tuple(t.shape)} is not shaped like {first}" for k, t in arrays.items() if t.shape != like.shape]
    return reasons + wrong_types({k: t.dtype for k, t in arrays.items() if (k, t.dtype) != (levels, torch.uint8)})


def _gan_loss_triton(
    logits: Tensor, targets: tuple[float, ...], weight: float, gradient: Tensor, kind: str, scale: Tensor | None
) -> Tensor:
    n = logits.numel() // len(targets)
    partials = logits.new_empty((len(targets), -(-n // BLOCK)), dtype=torch.float32)
    launch(
        _gan_loss_kernel,
        (partials.shape[1], len(targets)),
        *(logits, gradient, partials, scale),
        *(float(targets[0]), float(targets[-1]), weight / n, n),
        BCE=kind == "bce",
        BLOCK=BLOCK,
        read=logits.nbytes,
        written=gradient.nbytes + partials.nbytes,
    )
    return _means(partials, n)


def _l1_tanh_loss_triton(
    fake: Tensor, target: Tensor, from_gan: Tensor | None, weight: float, gradient: Tensor, scale: Tensor | None
) -> Tensor:
    n = fake.numel()
    partials = fake.new_empty((1, -(-n // BLOCK)), dtype=torch.float32)
    together, apart = (1, 1) if from_gan is None or from_gan.ndim == 1 else (from_gan.shape[1], from_gan.stride(0))
    launch(
        _l1_tanh_loss_kernel,
        (partials.shape[1],),
        *(fake, target, from_gan, gradient, partials, scale, weight / n, n, apart),
        TOGETHER=together,
        BLOCK=BLOCK,
        read=fake.nbytes + target.nbytes + (0 if from_gan is None else from_gan.nbytes),
        written=gradient.nbytes + partials.nbytes,
    )
    return _means(partials, n)[0]


def _means(
    partials: Tensor,  # [G, blocks] fp32: sums
    n: int,  # numbers summed per group
) -> Tensor:  # [G] fp32
    groups, blocks = partials.shape
    means = partials.new_empty(groups)
    sizes = {"read": partials.nbytes, "written": means.nbytes}
    launch(_mean_kernel, (groups,), partials, means, 1 / n, blocks, BLOCK=BLOCK, **sizes)
    return means


@jit
def _gan_loss_kernel(
    logits_ptr,  # [G, n] float
    gradient_ptr,  # [G, n] float
    partials_ptr,  # [G, blocks] fp32: sums of the unweighted losses
    scale_ptr,  # [] fp32, or None
    target0,
    target1,
    factor,  # of the slope, without the loss scale
    n,
    BCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (b, g): block b of group g."""
    group = tl.program_id(1)
    label = tl.where(group == 0, target0, target1)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offsets < n
    offsets += group.to(tl.int64) * n
    z = tl.load(logits_ptr + offsets, live, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr)
    if BCE:
        e = tl.exp(-tl.abs(z))  # in (0, 1]: nothing overflows
        value = tl.maximum(z, 0.0) - z * label + _log1p(e)
        tail = e / (1.0 + e)  # sigmoid(-|z|); of the two branches neither cancels where the answer is right
        slope = tl.where(z < 0, tail - label, (1.0 - label) - tail)
    else:
        value = (z - label) * (z - label)
        slope = 2 * (z - label)
    tl.store(gradient_ptr + offsets, (slope * factor).to(gradient_ptr.dtype.element_ty), live)
    index = group * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials_ptr + index, tl.sum(tl.where(live, value, 0.0), 0))


@jit
def _log1p(e):  # fp32 in [0, 1]
    """log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1/3, by its series to s^15: the next term is 1e-9 of the first."""
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 13 + q * (1.0 / 15)
    series = 1.0 / 11 + q * series
    series = 1.0 / 9 + q * series
    series = 1.0 / 7 + q * series
    series = 1.0 / 5 + q * series
    series = 1.0 / 3 + q * series
    return 2.0 * s * (1.0 + q * series)


@jit
def _l1_tanh_loss_kernel(
    fake_ptr,  # [n] float
    target_ptr,  # [n] fp32 or uint8
    from_gan_ptr,  # [n / TOGETHER, TOGETHER] float, rows `apart` numbers apart, or None
    gradient_ptr,  # [n] float
    partials_ptr,  # [blocks] fp32: sums of |target - fake|
    scale_ptr,  # [] fp32, or None
    factor,  # of the sign, without the loss scale
    n,
    apart,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offsets < n
    y = tl.load(fake_ptr + offsets, live, other=0.0).to(tl.float32)
    difference = tl.where(live, y - unit(tl.load(target_ptr + offsets, live, other=0)), 0.0)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr)
    g = tl.where(difference > 0, factor, tl.where(difference < 0, -factor, 0.0))
    if from_gan_ptr is not None:
        at = offsets // TOGETHER * apart + offsets % TOGETHER
        g += tl.load(from_gan_ptr + at, live, other=0.0).to(tl.float32)
    tl.store(gradient_ptr + offsets, (g * (1.0 - y * y)).to(gradient_ptr.dtype.element_ty), live)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.abs(difference), 0))


@jit
def _mean_kernel(
    partials_ptr,  # [G, blocks] fp32
    means_ptr,  # [G] fp32
    one_over_n,
    blocks,
    BLOCK: tl.constexpr,
):
    """Program g: one group, its partials in their order."""
    group = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + group * blocks + offsets, offsets < blocks, other=0.0)
    tl.store(means_ptr + group, tl.sum(total, 0) * one_over_n)


def compile_cases() -> list[CompileCase]:
    """Both GAN losses and the L1 head, every type, with and without loss scaling and an adversarial gradient."""
    cases = []
    for kind, half, scaled, n in (
        ("bce", "*bf16", False, "i32"),
        ("bce", "*fp16", True, "i32:16"),
        ("lsgan", "*fp32", False, "i32"),
    ):
        types = {"logits_ptr": half, "gradient_ptr": half, "partials_ptr": "*fp32", "n": n}
        types |= dict.fromkeys(("target0", "target1", "factor"), "fp32") | ({"scale_ptr": "*fp32"} if scaled else {})
        absent = {} if scaled else {"scale_ptr": None}
        cases.append(CompileCase(_gan_loss_kernel, types, {**absent, "BCE": kind == "bce", "BLOCK": BLOCK}))
    for half, scaled, gan, target in (
        ("*bf16", False, True, "*u8"),
        ("*fp16", True, True, "*fp32"),
        ("*fp32", False, False, "*u8"),
    ):
        types = {"fake_ptr": half, "target_ptr": target, "gradient_ptr": half, "partials_ptr": "*fp32"}
        types |= {"factor": "fp32", "n": "i32:16"} | ({"apart": "i32"} if gan else {})
        types |= ({"from_gan_ptr": half} if gan else {}) | ({"scale_ptr": "*fp32"} if scaled else {})
        absent = {name: None for name in ("from_gan_ptr", "scale_ptr") if name not in types}
        form = {"TOGETHER": 3} if gan else {"TOGETHER": 1, "apart": 1}
        cases.append(CompileCase(_l1_tanh_loss_kernel, types, {**absent, **form, "BLOCK": BLOCK}))
    types = {"partials_ptr": "*fp32", "means_ptr": "*fp32", "one_over_n": "fp32", "blocks": "i32"}
    cases.append(CompileCase(_mean_kernel, types, {"BLOCK": BLOCK}))
    return cases

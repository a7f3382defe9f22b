"""Operands of products, normalised and activated while they are loaded."""

from __future__ import annotations

from typing import Any

from ._triton import constexpr_function, cuda_capability_geq, interpreted, jit, tl, version
from .activations import activate

# On Hopper a product (wgmma) runs on while its warps compute the operands of the next. Triton before 3.8 lets them
# write the left one into the registers that the product before still reads (triton-lang/triton#9433). Operands in
# shared memory, which is where those go that are handed on as they were loaded, are not concerned.
WAITS = (3, 8)  # the version of Triton from which it waits by itself
_FORGETS = version < WAITS and not interpreted


@constexpr_function
def _overwrites() -> bool:
    """Whether what is compiled now has to wait itself."""
    return _FORGETS and cuda_capability_geq(9) and not cuda_capability_geq(10)


@constexpr_function
def _packed(dtype: Any) -> bool:
    """Whether two numbers lie in a register, on a device that compares both at once."""
    return not interpreted and dtype.primitive_bitwidth == 16 and cuda_capability_geq(8)


@jit
def operand(
    v,  # block as it was loaded, 0 where not ok
    scale,  # fp32, broadcasts to it; or None
    shift,
    ok,  # mask, broadcasts to it; or None where it does not matter what the rest becomes
    ACT: tl.constexpr,
    LEFT: tl.constexpr,  # whether it may be multiplied from registers
):
    """activation(scale * v + shift) in the type of v; 0 where not ok, since padding is zero after the activation."""
    if scale is not None:
        if LEFT:
            scale = after_products(scale)
        if ok is not None:
            shift = padded(shift, ok)
        v = activate(v.to(tl.float32) * scale + shift, ACT).to(v.dtype)
    elif ACT == 2 and _packed(v.dtype):
        v = _relu_of_pairs(v, LEFT)
    elif ACT != 0:
        h = v.to(tl.float32)
        if LEFT:
            h = after_products(h)
        v = activate(h, ACT).to(v.dtype)
    return v


@jit
def _relu_of_pairs(v, LEFT: tl.constexpr):
    """ReLU of half numbers, two at a time; a NaN stays one. As fp32, each takes four instructions and more to pack."""
    zero = tl.zeros((1, 1), tl.float32)
    if LEFT:
        zero = after_products(zero)
    larger: tl.constexpr = "max.NaN.bf16x2 $0, $1, $2;" if v.dtype == tl.bfloat16 else "max.NaN.f16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(larger, "=r,r,r", [v, zero.to(v.dtype)], v.dtype, is_pure=True, pack=2)


@jit
def padded(shift, ok):
    """The shift where ok, else 0. Multiplied, not selected: selections the compiler moves behind the conversion to half
    numbers, where each takes three instructions."""
    return shift * ok.to(tl.float32)


@jit
def after_products(x):
    """x (fp32). Where Triton does not wait, all products that began end before anything is computed from it."""
    if _overwrites():
        wait: tl.constexpr = "wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0f3F800000;"
        x *= tl.inline_asm_elementwise(wait, "=r", [], tl.float32, is_pure=False, pack=1)
    return x

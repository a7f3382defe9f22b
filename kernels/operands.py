"""Operands of products, normalised and activated while they are loaded."""

from __future__ import annotations

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
    elif ACT != 0:
        h = v.to(tl.float32)
        if LEFT:
            h = after_products(h)
        v = activate(h, ACT).to(v.dtype)
    return v


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

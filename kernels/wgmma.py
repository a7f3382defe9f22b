"""Left operands that a product takes from registers, on Hopper.

A product (wgmma) runs on there while its warps compute the operands of the next. Triton before 3.8 lets them write the
left one into the registers of the product before, without a wait for it to end (triton-lang/triton#9433). Operands in
shared memory are not concerned: what a kernel hands on as it was loaded.
"""

from __future__ import annotations

from ._triton import constexpr_function, cuda_capability_geq, interpreted, jit, tl, version

WAITS = (3, 8)  # the version of Triton from which it waits by itself
_FORGETS = version < WAITS and not interpreted


@constexpr_function
def _overwrites() -> bool:
    """Whether what is compiled now needs the wait."""
    return _FORGETS and cuda_capability_geq(9) and not cuda_capability_geq(10)


@jit
def settled(ok):
    """The mask `ok`, once all products that have begun have ended: whatever is selected by it comes after them."""
    if _overwrites():
        wait: tl.constexpr = "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;"
        ok = tl.inline_asm_elementwise(wait, "=r,r", [ok.to(tl.int32)], tl.int32, is_pure=False, pack=1) != 0
    return ok


@jit
def left_operand(
    a,  # [m, k], of which nothing counts where not ok
    ok,  # broadcasts to it
):
    """a, to be converted and multiplied from registers."""
    if _overwrites():
        a = tl.where(settled(ok), a, 0.0)
    return a

"""A kernel that begins while the one before it ends: programmatic dependent launch, of sm_90 and later.

Such a kernel is started as soon as every program of its predecessor has started. It may look at nothing that another
kernel writes before `enter`, which waits until the predecessor has ended and its stores can be seen; and so on for the
predecessor's own. What is constant, such as weights, may be fetched before.
"""

from __future__ import annotations

from ._triton import jit, tl


@jit
def enter(OVERLAP: tl.constexpr):
    """First in a kernel that has nothing to fetch: lets the next one start, waits for the one before."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def prefetch(pointers):
    """Ask for the lines at these addresses, which must be valid, to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )

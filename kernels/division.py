"""Division of row numbers by the sizes of maps, as a multiplication: GPUs divide in some twenty instructions."""

from __future__ import annotations

from ._triton import jit, tl


def reciprocal(d: int) -> int:
    """What `over` needs to divide by d, 1 <= d < 2^31: a factor of 32 bits and a shift, as one odd number.

    floor(n / d) = floor(n * factor / 2^(31 + shift)) for 0 <= n < 2^31, where 2^shift is the first power from d on and
    factor the next number above 2^(31 + shift) / d (Granlund and Montgomery, PLDI 1994). Triton compiles a kernel anew
    for numbers that are multiples of 16; an odd one never is.
    """
    if not 1 <= d < 1 << 31:
        raise ValueError(f"reciprocal of {d}; 1 to 2^31 - 1 is allowed")
    shift = (d - 1).bit_length()
    return (((1 << (31 + shift)) // d + 1) << 6) | (shift << 1) | 1


@jit
def over(
    n,  # int32, 0 or more
    r,  # int64, reciprocal(d)
):
    """n // d."""
    factor, shift = (r >> 6).to(tl.uint32), ((r >> 1) & 31).to(tl.uint32)
    return (tl.umulhi(n.to(tl.uint32) * 2, factor) >> shift).to(tl.int32)


@jit
def within(
    i,  # int32
    size,
):
    """0 <= i < size, in one comparison."""
    return i.to(tl.uint32) < size

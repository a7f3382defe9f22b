"""The two-error rule: a fast result may be as wrong as twice a plain one in the same types, and one rounding more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpix2pix.tuning.numerics import excess

from .report import Mismatch, Values

GUARD = 256  # NaN elements on both sides of a poisoned array; keeps its address a multiple of 512 bytes in fp16


class Poisoned:
    """An array of NaN for a kernel to write, inside a longer one of NaN that it must leave alone."""

    def __init__(
        self,
        rows: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        half: str = "",  # left or right: the array is that half of rows twice as long, as in a concatenation
    ) -> None:
        wide = channels * (2 if half else 1)
        self.flat = torch.full((rows * wide + 2 * GUARD,), math.nan, dtype=dtype, device=device)
        start = GUARD + (channels if half == "right" else 0)
        self.array = self.flat.as_strided((rows, channels), (wide, 1), start)
        other = GUARD + (channels if half == "left" else 0)
        self.other = self.flat.as_strided((rows, channels), (wide, 1), other) if half else None

    def untouched(self) -> bool:
        """Whether everything around the array is still NaN."""
        around = [self.flat[:GUARD], self.flat[-GUARD:], *([] if self.other is None else [self.other])]
        return all(bool(part.isnan().all()) for part in around)


def check(
    compute: Callable[[str, torch.dtype | None], Mapping[str, Tensor]],  # (impl, float64 or None) -> results by name
    totals: tuple[str, ...] = (),  # names of those that are sums
    guards: Callable[[], Mapping[str, Poisoned]] | None = None,  # what the last call of `compute` wrote into
) -> Values:
    """Run exact, plain and fast; {name: share of the allowed error}. Mismatch names what is wrong and by how much."""
    exact, same = compute("reference", torch.float64), compute("reference", None)
    fast = compute("triton", None)
    shares: dict[str, Any] = {
        n: excess(fast[n], same[n], exact[n], by="largest" if n in totals else "each") for n in exact
    }
    wrong = [f"{n} is off by {v:.3g} times the allowed error" for n, v in shares.items() if not v <= 1]
    for name, poisoned in (guards() if guards else {}).items():
        if not poisoned.untouched():
            wrong.append(f"{name}: written outside of its rows")
    values = {n: round(v, 4) if math.isfinite(v) else str(v) for n, v in shares.items()}
    if wrong:
        raise Mismatch("; ".join(wrong), values)
    return values

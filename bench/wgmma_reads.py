"""Registers that are written while a product still reads them: Hopper's wgmma, checked in a kernel's PTX.

A wgmma reads its left operand from registers until a `wgmma.wait_group` that includes it has returned; PTX leaves
undefined what it multiplies when they are written before, and no compiler warns (kernels/operands.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_REGISTER = re.compile(r"%\w+")
PRODUCT = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{([^}]*)\}")  # accumulators, then the left operand
_WRITES_NONE = ("st.", "cp.", "bar.", "bra", "ret", "wgmma.", "fence.", "prefetch.", "griddepcontrol.", "stmatrix.")


def overwritten(ptx: str) -> list[str]:
    """Instructions that write a register of an unfinished product's left operand, once each.

    Every loop is walked twice in the order of the text; branches inside are not followed.
    """
    lines = _instructions(ptx)
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    found: dict[str, None] = {}
    for number, line in enumerate(lines):
        if (branch := re.search(r"\bbra(?:\.uni)?\s+(\S+)$", line)) and labels[branch[1]] <= number:
            found |= dict.fromkeys(_walk(2 * lines[labels[branch[1]] : number]))
    return list(found)


def _instructions(ptx: str) -> list[str]:
    """Labels with their colon, instructions without semicolon."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :].split("\n}")[0]
    body = re.sub(r"//.*|^\s*\.loc\b.*", "", body, flags=re.MULTILINE)  # both end with their line
    parts = (part.strip() for part in re.split(r";|(?<=:)\s*\n", body) if part.strip())
    return [part for part in parts if not part.startswith(".")]


def _walk(lines: Sequence[str]) -> list[str]:
    found, open_group, groups = [], set[str](), list[set[str]]()  # registers of products
    for line in lines:
        instruction = re.sub(r"^@!?%\w+\s+", "", line)
        if product := PRODUCT.match(instruction):
            open_group |= set(_REGISTER.findall(product[1]))
        elif instruction.startswith("wgmma.commit_group"):
            groups.append(open_group)
            open_group = set()
        elif wait := re.match(r"wgmma\.wait_group\S*\s+(\d+)", instruction):
            groups = groups[max(0, len(groups) - int(wait[1])) :]
        elif open_group.union(*groups) & _written(instruction):
            found.append(line)
    return found


def _written(instruction: str) -> set[str]:
    if instruction.startswith(_WRITES_NONE) or " " not in instruction.replace("\t", " "):
        return set()
    operands = re.split(r"\s+", instruction, maxsplit=1)[1]
    first = operands.split("}")[0] if operands.startswith("{") else operands.split(",")[0]
    return set(_REGISTER.findall(first))

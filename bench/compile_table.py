"""Compile every kernel for every supported GPU, without a GPU: registers, local memory, shared memory, hazards.

python -m bench.compile_table            table to standard output; exit code 1 where a case is refused
python -m bench.compile_table --write    the same, into docs/kernels.md (one section per Triton version)
python -m bench.compile_table --triton DIR    another Triton: pip install --no-deps --target DIR triton==3.6.0
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from .wgmma_reads import overwritten

# Bytes of local memory a thread may have. With 8 warps ptxas gives up a few registers to keep two programs on one
# multiprocessor; maxnreg = 255 takes these bytes back, and the second program with them.
LOCAL = 48
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # shared memory a program may have, by compute capability
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
HEAD = """# What the kernels compile to

Written by `python -m bench.compile_table --write` (and with `--triton DIR` for another version); no GPU is needed.
A cell is registers per thread / bytes of shared memory per program; `16 | n` marks sizes known to be multiples of 16.
Refused, and marked `!`: local memory (spilled registers) above {local} bytes a thread, which ptxas takes to keep two
programs on a multiprocessor; shared memory above what a program may have: {limits};
or a register written while a product still reads it (bench/wgmma_reads.py).
"""


class Compiled(NamedTuple):
    """What one case became for one compute capability."""

    registers: int  # per thread
    local: int  # bytes per thread of stack and local memory: spills
    shared: int  # bytes per program
    overwritten: int = 0  # instructions that write what a product still reads

    def refused(self, capability: int) -> bool:
        return self.local > LOCAL or self.shared > SHARED_KB[capability] * 1024 or self.overwritten > 0


def kernel_cases(package: str = "fastpix2pix.kernels") -> list[Any]:
    """The compile cases of every module of a package; a `..._kernel` in none of them raises LookupError."""
    root = importlib.import_module(package)
    modules = [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(root.__path__)]
    cases = [case for module in modules if hasattr(module, "compile_cases") for case in module.compile_cases()]
    kernels = {name for module in modules for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}
    if missing := kernels - {case.kernel.__name__ for case in cases}:
        raise LookupError(f"in no compile_cases(): {', '.join(sorted(missing))}")
    return cases


def compile_case(case: Any, capability: int) -> Compiled:
    """What a fastpix2pix.kernels.dispatch.CompileCase becomes."""
    binary = binary_of(case, capability)
    registers, local = _resource_usage(binary.asm["cubin"])
    return Compiled(registers, local, binary.metadata.shared, len(overwritten(binary.asm["ptx"])))


def binary_of(case: Any, capability: int) -> Any:
    """Triton's compiled kernel of a CompileCase."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import driver

    names = case.kernel.arg_names
    case = case._replace(constexprs={p.name: p.default for p in case.kernel.params if p.has_default} | case.constexprs)
    if unknown := {*case.signature, *case.constexprs} ^ set(names):
        raise LookupError(f"{case.kernel.__name__}: {', '.join(sorted(unknown))} not in both the kernel and its case")
    types = {name: case.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=case.kernel,
        signature={name: type_.removesuffix(":16") for name, type_ in types.items()},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, type_ in enumerate(types.values())
            if type_.startswith("*") or type_.endswith(":16")
        },
    )
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": case.num_warps, "num_stages": case.num_stages}
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))  # who a kernel asks which GPU it is for
    return triton_compile(source, target=target, options=options)


def _resource_usage(cubin: bytes) -> tuple[int, int]:  # registers, bytes of stack and local memory
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


_inherited: list[Any] = []  # cases, for forked processes: kernels cannot be sent to them


def _compile_inherited(number: int, capability: int) -> Compiled:
    return compile_case(_inherited[number], capability)


def compile_all(cases: Sequence[Any], capabilities: Sequence[int], jobs: int) -> list[list[Compiled]]:
    """Per case, what it became for each capability."""
    _inherited[:] = cases
    pairs = [(number, capability) for number in range(len(cases)) for capability in capabilities]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        found = pool.starmap(_compile_inherited, pairs, chunksize=1)
    width = len(capabilities)
    return [found[i : i + width] for i in range(0, len(found), width)]


def table(cases: Sequence[Any], capabilities: Sequence[int], jobs: int) -> tuple[str, list[str]]:
    """A Markdown table, one case a row, and a line per refusal."""
    lines = ["| kernel | types and constants | warps | " + " | ".join(f"sm_{c}" for c in capabilities) + " |"]
    lines.append("|---|---|--:|" + "--:|" * len(capabilities))
    refusals = []
    for case, found in zip(cases, compile_all(cases, capabilities, jobs), strict=True):
        name, what = case.kernel.__name__, _describe(case)
        cells = []
        for capability, compiled in zip(capabilities, found, strict=True):
            refused = compiled.refused(capability)
            local = f" ({compiled.local} local)" if compiled.local else ""
            cells.append(f"{compiled.registers} / {compiled.shared}{local}{' !' if refused else ''}")
            if refused:
                refusals.append(f"sm_{capability} {name} {what}: {compiled._asdict()}")
        lines.append(f"| `{name}` | {what} | {case.num_warps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", refusals


def _describe(case: Any) -> str:
    """What tells this case from the kernel's others: types of the float arrays, sizes known to divide, constants."""
    types = dict.fromkeys(t for t in case.signature.values() if t in ("*bf16", "*fp16", "*fp32"))
    half = [t[1:] for t in types if t != "*fp32"] or [t[1:] for t in types]
    divisible = [f"16 \\| {name}" for name, type_ in case.signature.items() if type_ == "i32:16"]
    absent = [f"no {name.removesuffix('_ptr')}" for name, value in case.constexprs.items() if value is None]
    constants = [f"{name}={value}" for name, value in case.constexprs.items() if value is not None]
    return ", ".join(half + divisible + absent + constants)


def write(version: str, section: str) -> None:
    """Put a version's table into docs/kernels.md, beside those of other versions."""
    old = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    sections = dict(re.findall(r"^## Triton (\S+)\n\n(.*?)(?=^## |\Z)", old, re.MULTILINE | re.DOTALL))
    sections[version] = section
    limits = ", ".join(f"{kb} KB on sm_{capability}" for capability, kb in SHARED_KB.items())
    parts = [f"## Triton {name}\n\n{sections[name].strip()}\n" for name in sorted(sections, reverse=True)]
    DOCUMENT.write_text("\n".join([HEAD.format(limits=limits, local=LOCAL), *parts]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_table", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--triton", metavar="DIR", help="folder with another Triton, put first on sys.path")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--write", action="store_true", help="write docs/kernels.md")
    options = parser.parse_args()
    if options.triton:
        sys.path.insert(0, options.triton)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    if options.triton and not Path(triton.__file__).is_relative_to(Path(options.triton).resolve()):
        parser.error(f"{options.triton} holds no Triton: {triton.__file__} was imported")
    text, refusals = table(kernel_cases(), list(SHARED_KB), options.jobs)
    print(f"Triton {triton.__version__}\n\n{text}")
    if options.write:
        write(triton.__version__, text)
    for line in refusals:
        print(f"refused: {line}", file=sys.stderr)
    return 1 if refusals else 0


if __name__ == "__main__":
    sys.exit(main())

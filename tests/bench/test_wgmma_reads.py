"""No register is written while a product reads it: the check, and the kernels that compute what they multiply."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.wgmma_reads import overwritten
from fastpix2pix.kernels._triton import triton, version
from fastpix2pix.kernels.operands import WAITS

ROOT = Path(__file__).resolve().parents[2]

LOOP = """
.visible .entry _some_kernel(
\t.param .u64 .ptr .global .align 1 _some_kernel_param_0
)
.reqntid 128
{{
\t.reg .b32 \t%r<9>;
\tldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r5, %r6}}, [%r8];  // before the loop
$L__BB0_1:                              // =>This Inner Loop
\t.loc\t1 59 26                          // file.py:59:26
\t{first}
\tldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r5, %r6}}, [%r8];
\twgmma.fence.sync.aligned;
\twgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r10,%r11,%r12,%r13}}, {{{left}}}, %rd2, %p1, 1, 1, 0;
\twgmma.commit_group.sync.aligned;
\t{last}
\t@%p2 bra \t$L__BB0_1;
\tadd.s32 \t%r1, %r8, 1;
\tret;
}}
"""
NOTHING, REGISTERS = "mov.b32 %r7, %r8;", "%r1,%r2,%r3,%r4"
FORMS = [
    (NOTHING, NOTHING, REGISTERS, 1),
    (NOTHING, "wgmma.wait_group.sync.aligned 1;", REGISTERS, 1),  # it may be the one that is left
    (NOTHING, "wgmma.wait_group.sync.aligned 0;", REGISTERS, 0),
    ("wgmma.wait_group.sync.aligned 0; mov.b32 %r7, %r8;", NOTHING, REGISTERS, 0),
    ("@%p3 mov.b32 \t%r4, %r8;", NOTHING, REGISTERS, 2),
    ("st.shared.b32 \t[%r2], %r4;", "setp.lt.s32 %p3, %r1, %r2;", REGISTERS, 1),  # they only read
    (NOTHING, NOTHING, "%r3,%r4,%r7,%r9", 1),  # the other instruction that writes one
    (NOTHING, NOTHING, "%r3,%r4,%r14,%r9", 0),
]


@pytest.mark.parametrize(("first", "last", "left", "count"), FORMS)
def test_a_loop(first, last, left, count):
    assert len(overwritten(LOOP.format(first=first, last=last, left=left))) == count


def test_operands_in_shared_memory_are_not_registers():
    text = LOOP.format(first=NOTHING, last=NOTHING, left="").replace("{}", "%rd1")
    assert overwritten(text) == []


# of every n-th kernel that computes what it multiplies: its name, what overwrites, whether products take registers
COMPILE = """
import json, sys
from bench.compile_table import binary_of, kernel_cases
from bench.wgmma_reads import PRODUCT, overwritten
from fastpix2pix.kernels import operands

operands._FORGETS = operands._FORGETS and sys.argv[1] == "as it is"
given = [(case, {**case.signature, **case.constexprs}) for case in kernel_cases()]
computing = [case for case, names in given if names.get("scale_a") or names.get("ACT_A")]
rows = []
for case in computing[:: int(sys.argv[2])]:
    ptx = binary_of(case, 90).asm["ptx"]
    rows.append([case.kernel.__name__, overwritten(ptx), bool(PRODUCT.search(ptx))])
print(json.dumps(rows))
"""


def compiled(what: str, each: int) -> list[tuple[str, list[str], bool]]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_ALWAYS_COMPILE": "1"}
    command = [sys.executable, "-c", COMPILE, what, str(each)]
    result = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [tuple(row) for row in json.loads(result.stdout)]


needs_compiler = pytest.mark.skipif(triton is None or sys.platform != "linux", reason="needs Triton's compiler")


@needs_compiler
def test_kernels_wait_for_the_products_that_read_their_registers():
    rows = compiled("as it is", 3)  # all of them when the compile table is made
    assert {name for name, _, registers in rows if registers} == {"_conv_kernel", "_conv_wgrad_kernel"}
    assert [row for row in rows if row[1]] == []


@needs_compiler
def test_without_the_wait_some_overwrite_them():
    """Where this fails with a newer Triton, the wait has nothing left to do there."""
    rows = compiled("without", 6)
    assert any(found for _, found, _ in rows) == (version < WAITS)

"""Kernels become machine code for GPUs this machine may not have; a spill, or too much shared memory, is refused."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpix2pix.config import Generator, Modes
from fastpix2pix.kernels._triton import triton
from fastpix2pix.kernels.conv_plan import conv_candidates, conv_plan
from fastpix2pix.kernels.dispatch import recorded
from fastpix2pix.model import build_generator
from fastpix2pix.runtime.triton_engine import TritonEngine

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif(triton is None, reason="triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler tools are for Linux"),
]

# one case of every kernel, and Adam with far too few threads for its block, which must spill
COMPILE = """
import json
from bench.compile_table import compile_case, kernel_cases
from fastpix2pix.kernels.conv_plan import stages_for

first = {}
for case in kernel_cases():
    first.setdefault(case.kernel.__name__, case)
adam = first["_adam_kernel"]
crowded = adam._replace(num_warps=1, constexprs=adam.constexprs | {"BLOCK": 4096})
rows = [(name, sm, compile_case(case, sm)) for name, case in first.items() for sm in (80, 90)]
rows.append(("crowded", 80, compile_case(crowded, 80)))
for case in kernel_cases():  # fp32 of the shapes with the most shared memory, of the forms that read most
    blocks = tuple(case.constexprs.get(name) for name in ("BM", "BN", "BK"))
    if blocks in ((16, 64, 128), (128, 128, 64)) and case.constexprs["SPLIT"] and "xb" in case.signature:
        types = {name: "*fp32" if type_ == "*bf16" else type_ for name, type_ in case.signature.items()}
        fp32 = case._replace(signature=types, num_stages=stages_for(case.num_stages, 4))
        rows.append((f"fp32 {blocks}", 89, compile_case(fp32, 89)))
print(json.dumps([[name, sm, *compiled, compiled.refused(sm)] for name, sm, compiled in rows]))
"""


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Python from the repository's root, where the interpreter is not switched on."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=clean, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], dict[str, int]]:
    """(kernel, capability) -> the fields of Compiled, and whether it is refused."""
    result = run("-c", COMPILE)
    assert result.returncode == 0, result.stderr
    keys = ("registers", "local", "shared", "overwritten", "refused")
    return {(name, sm): dict(zip(keys, values, strict=True)) for name, sm, *values in json.loads(result.stdout)}


def test_plans_fit_small_gpus_in_fp32_too(compiled: dict[tuple[str, int], dict[str, int]]) -> None:
    found = {name: values["shared"] for (name, _), values in compiled.items() if name.startswith("fp32")}
    assert len(found) == 2 and max(found.values()) <= 99 * 1024, found


PAIRS = """
from bench.compile_table import binary_of
from fastpix2pix.kernels.conv_kernel import compile_cases

bare = [case for case in compile_cases() if {"scale_a", "scale_b"} <= case.constexprs.keys()]
case = next(case for case in bare if case.constexprs["ACT_A"] == 2)
for half, capability in (("bf16", 80), ("fp16", 80), ("fp16", 75)):
    types = {name: type_.replace("bf16", half) for name, type_ in case.signature.items()}
    text = binary_of(case._replace(signature=types), capability).asm["ptx"]
    print(capability, text.count(f"max.NaN.{half.replace('fp', 'f')}x2"), text.count("setp.le.f32"))
"""


def test_relu_of_half_numbers_takes_two_at_a_time() -> None:
    result = run("-c", PAIRS)
    assert result.returncode == 0, result.stderr
    counts = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert [capability for capability, _, _ in counts] == [80, 80, 75]
    for capability, pairs, comparisons in counts:  # before sm_80 there is no such instruction
        assert (pairs > 0) == (capability >= 80) and comparisons == 0, counts


@pytest.fixture(scope="module")
def inference_kernels() -> set[str]:
    """All that the Triton engine starts, in both modes of the statistics and with every product split or none."""
    kernels = set()
    for modes, plan in itertools.product((Modes("image", "fixed"), Modes("running", "fixed")), ("static", "split")):
        net = build_generator(Generator(depth=5, ngf=4)).eval()
        choose = conv_plan if plan == "static" else lambda problem: conv_candidates(problem)[-1]
        with recorded() as tape:
            engine = TritonEngine(net, modes, DEVICE, choose=choose, graph=False)
            engine.translate(torch.zeros(1, 3, 64, 64, device=DEVICE))
        kernels |= {launch.kernel for launch in tape}
    return kernels


def test_every_kernel_compiles_without_spills(compiled):
    of_package = {key: value for key, value in compiled.items() if key[0] != "crowded"}
    assert {"_adam_kernel", "_gan_loss_kernel", "_mean_kernel"} <= {name for name, _ in of_package}
    assert {key: value for key, value in of_package.items() if value["refused"]} == {}
    assert all(8 <= value["registers"] <= 255 for value in of_package.values())


def test_a_spill_is_seen_and_refused(compiled):
    crowded = compiled["crowded", 80]
    assert crowded["local"] > 0
    assert crowded["refused"]


OVERLAP = """
from bench.compile_table import binary_of, kernel_cases

seen = set()
for case in kernel_cases():
    forms = {k: v for k, v in case.constexprs.items() if k in ("FLAT", "SPLIT", "stride_n")}
    form = (case.kernel.__name__, *sorted(forms.items()))
    if "OVERLAP" not in case.kernel.arg_names or form in seen:
        continue
    seen.add(form)
    ptx = binary_of(case._replace(constexprs=case.constexprs | {"OVERLAP": True}), 90).asm["ptx"]
    accesses = [ptx.find(name) for name in ("ld.global", "st.global", "cp.async.c") if name in ptx]
    prefetches, wait = ptx.find("prefetch.global"), ptx.find("griddepcontrol.wait")
    begun = ptx.find("griddepcontrol.launch_dependents")
    assert 0 < begun < wait < min(accesses), form
    assert (prefetches > 0) == bool(forms.get("SPLIT")) and prefetches < wait, form
    print(case.kernel.__name__)
"""


def test_kernels_that_overlap_wait_before_they_look_at_anything(inference_kernels):
    """In the machine's order: let the next one begin, fetch the weights, wait, and only then load or store."""
    found = run("-c", OVERLAP)
    assert found.returncode == 0, found.stderr
    assert inference_kernels <= set(found.stdout.split())


def test_shared_memory_above_a_limit_is_refused():
    code = "from bench.compile_table import Compiled as C; c = C(64, 0, 100 << 10)"
    assert (
        run("-c", f"{code}; print([sm for sm in (80, 86, 89, 90, 120) if c.refused(sm)])").stdout == "[86, 89, 120]\n"
    )


REFUSED = [
    ({"TRITON_INTERPRET": "1"}, [], "the interpreter compiles nothing; unset it"),
    ({}, ["--triton", "bench"], "bench holds no Triton"),
]


@pytest.mark.parametrize(("environment", "arguments", "message"), REFUSED)
def test_command_refusals(environment, arguments, message):
    result = run("-m", "bench.compile_table", *arguments, **environment)
    assert result.returncode == 2
    assert message in result.stderr


def test_committed_tables_hold_every_kernel():
    """docs/kernels.md is written by `python -m bench.compile_table --write`, once per Triton version."""
    names = run(
        "-c", "from bench.compile_table import kernel_cases; print(*(c.kernel.__name__ for c in kernel_cases()))"
    )
    assert names.returncode == 0, names.stderr
    _, *sections = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("\n## ")
    assert [section.split("\n")[0] for section in sections] == ["Triton 3.7.1", "Triton 3.6.0"]
    for section in sections:
        rows = [line.split("|")[1].strip(" `") for line in section.splitlines() if line.startswith("| `")]
        assert rows == names.stdout.split(), f"{section.splitlines()[0]}: run python -m bench.compile_table --write"
        assert " !" not in section

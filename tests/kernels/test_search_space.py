"""Every plan that may be chosen for the paper's networks: few, bounded, and of a shape that is compiled ahead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastpix2pix.config import train_config
from fastpix2pix.kernels import conv_kernel, conv_wgrad
from fastpix2pix.kernels._triton import triton
from fastpix2pix.kernels.conv_plan import ConvPlan, Problem, conv_candidates, conv_plan, tiles
from fastpix2pix.kernels.wgrad_plan import roles_of, wgrad_candidates, wgrad_plan
from fastpix2pix.training.layers import Layer
from fastpix2pix.training.plans import layers_of, map_of, problems

pytestmark = pytest.mark.skipif(triton is None, reason="triton is not installed")
BATCHES = (1, 4, 16, 64)
SHARED_KB = 99  # of a program on sm_86, sm_89 and sm_120


def layers() -> Iterator[tuple[Layer, int]]:
    for batch in BATCHES:
        yield from layers_of(train_config(batch=batch, step="explicit", device="cpu"))


def every_problem() -> Iterator[tuple[str, Problem]]:
    """Of training and inference: one source or two side by side, activated or with what readers apply."""
    for layer, groups in layers():
        for name, problem in zip(("forward", "dgrad"), problems(layer, groups), strict=True):
            forms = [problem, problem._replace(plain=False)]
            if name == "forward" and layer.node.kind == "transposed":
                half = problem.inputs[0] // 2
                forms += [form._replace(inputs=(half, half)) for form in forms]
            if layer.norm:  # statistics of every image
                forms += [form._replace(groups=problem.size.images) for form in forms]
            yield from ((f"{layer.name} {name} x{layer.x[0]}", form) for form in forms)


PROBLEMS = {problem: name for name, problem in every_problem()}
PLANS = {problem: conv_candidates(problem) for problem in PROBLEMS}
WGRADS = {
    (layer.node.geometry, map_of(layer.x), layer.w, processors): layer
    for layer, _ in layers()
    for processors in (58, 108, 132, 170)  # of an L4, A100, H100 and RTX 5090
}


def shape(plan: ConvPlan) -> tuple[int, ...]:
    return plan.block_m, plan.block_n, plan.block_k, plan.warps, plan.stages, plan.flatten


def test_few_plans_the_static_one_first():
    for problem, name in PROBLEMS.items():
        plans = PLANS[problem]
        assert 1 <= len(plans) <= 4 and len(set(plans)) == len(plans), name
        assert plans[0] == conv_plan(problem)
        assert not problem.flat or plans[0].warps <= 4, name  # one loop of taps and channels (conv_plan.py)
        assert not plans[0].flatten and all(plan.warps <= 4 for plan in plans if plan.flatten), name
    for given, layer in WGRADS.items():
        plans = wgrad_candidates(*given)
        assert 1 <= len(plans) <= 4 and len(set(plans)) == len(plans) and plans[0] == wgrad_plan(*given), layer.name


def test_every_plan_of_a_product_is_compiled_ahead():
    """By block shape, warps, stages, how the sum runs and whether it is split."""
    compiled = set()
    for case in conv_kernel.compile_cases():
        c = case.constexprs
        sizes = c["BM"], c["BN"], c["BK"], case.num_warps, case.num_stages, int(c["FLATTEN"])
        compiled.add((sizes, c["FLAT"], c["SPLIT"]))
    for problem, name in PROBLEMS.items():
        for plan in PLANS[problem]:
            assert (shape(plan), problem.flat, plan.splits > 1) in compiled, (name, plan)


def test_every_plan_of_a_kernel_gradient_is_compiled_ahead():
    compiled = set()
    for case in conv_wgrad.compile_cases():
        c = case.constexprs
        compiled.add((c["BP"], c["BQ"], c["BR"], case.num_warps, case.num_stages, c["FLAT"]))
    for given, layer in WGRADS.items():
        for plan in wgrad_candidates(*given):
            flat = plan.block_q > roles_of(*given[:3]).q
            found = (*plan[:3], plan.warps, plan.stages, flat)
            assert found in compiled, (layer.name, found)


def test_operands_fit_the_smallest_shared_memory():
    """Half-precision operands of every stage in flight; what the compiler adds is in docs/kernels.md."""
    for problem, name in PROBLEMS.items():
        for plan in PLANS[problem]:
            bytes_ = 2 * (plan.stages - 1) * plan.block_k * (plan.block_m + plan.block_n)
            assert bytes_ <= SHARED_KB * 1024, (name, plan)
    for given in WGRADS:
        for plan in wgrad_candidates(*given):
            assert 2 * (plan.stages - 1) * plan.block_rows * (plan.block_p + plan.block_q) <= SHARED_KB * 1024


def test_splits_end_where_the_device_is_busy_and_cover_the_sum():
    for problem, name in PROBLEMS.items():
        for plan in PLANS[problem]:
            assert not (problem.flat and plan.splits > 1), name
            assert plan.tap_splits <= max(1, problem.useful), (name, plan)
            if plan.splits > 1:
                assert tiles(problem, plan.block_m, plan.block_n) * plan.splits < 256, (name, plan)
    for given, layer in WGRADS.items():
        for plan in wgrad_candidates(*given):
            steps = roles_of(*given[:3]).plain.rows / (plan.splits * plan.block_rows)
            assert plan.splits == 1 or steps >= 4, (layer.name, plan)

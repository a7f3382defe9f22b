"""Taps that never meet a pixel: their gradient is 0, leaving them out changes no bit; else they are not left out."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastpix2pix.config import train_config
from fastpix2pix.errors import InputError
from fastpix2pix.kernels._triton import triton
from fastpix2pix.kernels.dispatch import recorded
from fastpix2pix.training import checkpoint
from fastpix2pix.training.convolution import Node, aten_backward
from fastpix2pix.training.explicit_step import ExplicitStep
from fastpix2pix.training.generator_pass import idle_border
from fastpix2pix.training.stages import How

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BASE = {
    **{"depth": 5, "ngf": 4, "ndf": 4, "n_layers": 1, "crop_size": 32, "batch": 2, "beta1": 0.9},
    **{"step": "explicit", "graph": "off", "precision": "fp32"},
}
BOTH = ["down.4.conv.weight", "up.0.conv.weight"]
IDLE = 12 * 32 * 32  # taps of one such kernel
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(triton is None, reason="no triton"))]


def make(impl: str = "reference", skip_idle: bool = True, **options) -> ExplicitStep:
    """A step whose first weights are numbers of bf16: Triton's interpreter cuts bf16 off where refresh() rounds."""
    state = ExplicitStep(train_config(**{**BASE, **options}), DEVICE, How(impl=impl), skip_idle=skip_idle)
    for _, arena in state._arenas():
        arena.weights.p.copy_(arena.weights.p.bfloat16())
        arena.refresh()
    if state.scale is not None:
        state.scale.fill_(128.0)  # no step is lost to an overflow
    return state


def batches(count: int, size: int = 32) -> list[list[Tensor]]:
    draws = torch.Generator().manual_seed(5)
    shape = (2, size, size, 3)
    return [[(torch.rand(shape, generator=draws) * 2 - 1).permute(0, 3, 1, 2).to(DEVICE) for _ in "xy"]
            for _ in range(count)]  # fmt: skip


def train(state: ExplicitStep, steps: int) -> list[list[float]]:
    return [state.step(x, y, n, 1e-3).tolist() for n, (x, y) in enumerate(batches(steps))]


def arrays(state: ExplicitStep) -> list[Tensor]:
    segments = [s for _, arena in state._arenas() for s in arena.segments]
    return [t for s in segments for t in (s.p, s.m, s.v, s.half) if t is not None]


def updated(state: ExplicitStep) -> int:
    return sum(part.p.numel() for part in state.arena_g.updates(state.idle["g"]))


def everything(state: ExplicitStep) -> int:
    return sum(len(segment.p) for segment in state.arena_g.segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["conv", "transposed"])
@pytest.mark.parametrize("pixels", [1, 2])
def test_gradient_of_the_border_is_exactly_0_around_one_pixel_only(kind, dtype, pixels):
    draws = torch.Generator().manual_seed(1)
    wide, narrow = 2 * pixels, pixels
    x, dy = (torch.randn(3, s, s, 64, generator=draws).permute(0, 3, 1, 2).to(DEVICE, dtype)
             for s in ((wide, narrow) if kind == "conv" else (narrow, wide)))  # fmt: skip
    w = torch.randn(64, 4, 4, 64, generator=draws).permute(0, 3, 1, 2).to(DEVICE, dtype)
    _, dw = aten_backward(dy, x, w, Node("w", kind, 4, 2, 1), False, True)
    assert dw[..., 1:3, 1:3].ne(0).all(0).all(0).all()
    dw[..., 1:3, 1:3] = 0
    assert dw.eq(0).all() == (pixels == 1)


CASES = [
    ("reference", {}, 2, "fp32"),
    ("reference", {"precision": "bf16", "ema": 0.9, "dropout": "none"}, 2, "bf16 copies"),
    ("reference", {"precision": "fp16", "kind": "encoder_decoder", "norm": "instance"}, 2, "fp16 copies, no skips"),
    ("reference", {"up": "resize"}, 1, "the 3x3 kernel of a resize block has no idle taps"),
    ("triton", {"objective": "l1"}, 2, "fp32"),
    ("triton", {"objective": "l1", "precision": "bf16"}, 2, "bf16 copies"),
    ("triton", {"objective": "l1", "precision": "fp16"}, 2, "fp16 copies, loss scale"),
]


@pytest.mark.parametrize(("impl", "options", "kernels", "why"), CASES, ids=[f"{c[0]}: {c[3]}" for c in CASES])
def test_left_out_and_updated_are_the_same_training_to_the_bit(impl, options, kernels, why):
    if impl == "triton" and triton is None:
        pytest.skip("triton is not installed")
    short, full = make(impl, **options), make(impl, skip_idle=False, **options)
    assert updated(full) == everything(full)
    assert updated(short) == everything(short) - kernels * IDLE
    before = [t.clone() for t in arrays(short)]
    assert train(short, 3) == train(full, 3)
    assert all(torch.equal(a, b) for a, b in zip(arrays(short), arrays(full), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(arrays(short), before, strict=True))


def test_comparison_notices_a_moment_that_is_not_0():
    short, full = make(), make(skip_idle=False)
    for state in (short, full):
        state.arena_g.moments["up.0.conv.weight"][0][3, 4, 0, 3] = 1e-3  # behind the check at start
    train(short, 1)
    train(full, 1)
    different = [(a != b).sum().item() for a, b in zip(arrays(short), arrays(full), strict=True)]
    assert sum(different) == 2  # that number and its moment


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({}, BOTH),
        ({"up": "resize"}, BOTH[:1]),
        ({"kind": "encoder_decoder"}, BOTH),
        ({"crop_size": 64}, []),
        ({"crop_size": 96, "load_size": 96}, []),
        ({"depth": 8, "crop_size": 256}, ["down.7.conv.weight", "up.0.conv.weight"]),
    ],
)
def test_which_kernels_have_an_idle_border(options, kernels):
    assert idle_border(train_config(**{**BASE, **options})) == kernels


def test_larger_crops_update_everything():
    state = make(crop_size=64)
    assert updated(state) == everything(state)
    ((x, y),) = batches(1, 64)
    state.step(x, y, 0, 1e-3)
    assert not state.arena_g.border_is_at_rest(BOTH)  # those taps do train there


@pytest.mark.parametrize("moment", [0, 1])
@pytest.mark.parametrize("name", BOTH)
def test_resuming_with_moments_there_updates_everything(tmp_path: Path, name, moment):
    first = make()
    train(first, 2)
    checkpoint.save(tmp_path / "at rest", first, {"step": 2}, {}, {"step": 2})
    first.arena_g.moments[name][moment][31, 0, 3, 2] = torch.nan if moment else -1e-30
    checkpoint.save(tmp_path / "moving", first, {"step": 2}, {}, {"step": 2})
    state = make()
    checkpoint.restore(tmp_path / "moving", state)
    assert updated(state) == everything(state)
    checkpoint.restore(tmp_path / "at rest", state)
    assert updated(state) == everything(state) - 2 * IDLE


@pytest.mark.parametrize("size", [64, (32, 64)])
def test_a_batch_of_another_size_is_refused(size):
    height, width = size if isinstance(size, tuple) else (size, size)
    x = torch.zeros(2, 3, height, width, device=DEVICE)
    with pytest.raises(InputError, match=rf"{height}x{width} pixels: crop_size = 32"):
        make().step(x, x, 0, 1e-3)


@pytest.mark.skipif(triton is None, reason="triton is not installed")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_bytes_of_the_launches_show_the_saving(precision):
    """p, m, v read and written and 4 bytes more, a gradient of fp32 or one of half and the half copy: 28 a tap."""
    tapes = []
    for skip_idle in (True, False):
        state = make("triton", skip_idle, precision=precision)
        with recorded(run=False) as tape:
            train(state, 1)
        tapes.append([launch for launch in tape if launch.kernel == "_adam_kernel"])
    short, full = (sum(launch.read + launch.written for launch in tape) for tape in tapes)
    assert full - short == 2 * IDLE * 28
    # in fp16 the weights before, two kernels, the weights after, not one launch; else one launch for every kernel
    assert len(tapes[0]) == len(tapes[1]) + (3 if precision == "fp16" else 0)

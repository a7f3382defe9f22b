"""The explicit step against the plain one: losses, gradients, weights, statistics, resume."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from fastpix2pix.config import train_config
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.kernels import dispatch
from fastpix2pix.training import checkpoint
from fastpix2pix.training.arena import ALIGN, Arena
from fastpix2pix.training.explicit_step import ExplicitStep
from fastpix2pix.training.module_step import ModuleStep
from fastpix2pix.training.processes import Group
from fastpix2pix.training.stages import How
from fastpix2pix.training.step import build_state

CPU = torch.device("cpu")
BASE = {"depth": 5, "ngf": 8, "ndf": 8, "n_layers": 2, "crop_size": 32, "dropout": "none", "step": "explicit", "impl": "reference", "batch": 2}  # fmt: skip  # noqa: E501
CASES = [
    {},
    {"objective": "l1"},
    {"objective": "gan"},
    {"objective": "l1+gan", "gan_loss": "lsgan"},
    {"objective": "cgan"},
    {"norm": "instance"},
    {"norm": "none", "kind": "encoder_decoder"},
    {"up": "resize", "in_channels": 1},
    {"ema": 0.9, "pool": 3},
    {"batch": 1},
]


def make(**options) -> ExplicitStep:
    state = build_state(train_config(**{**BASE, **options}), CPU)
    assert isinstance(state, ExplicitStep)
    return state


def batches(config, count: int) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(5)
    shape = (config.batch, 32, 32)
    return [
        tuple((torch.rand(shape[0], *shape[1:], c, generator=draws) * 2 - 1).permute(0, 3, 1, 2)
              for c in (config.generator.in_channels, config.generator.out_channels))
        for _ in range(count)
    ]  # fmt: skip


def rounding_noise(net: Module) -> float:
    """What is computed for a gradient that is zero, as that of a bias in front of an instance normalisation."""
    return 4e-6 * max(p.grad.abs().max().item() for p in net.parameters())


def test_kernels_that_cannot_run_are_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", False)
    with pytest.raises(EnvironmentFailed, match=r"impl = triton cannot run: .*; use impl = auto or reference"):
        make(impl="triton")
    monkeypatch.setenv("FASTPIX2PIX_IMPL", "cuda")
    with pytest.raises(EnvironmentFailed, match="FASTPIX2PIX_IMPL = 'cuda'"):
        make(impl="auto")


@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_plain_step(options):
    explicit = make(**options)
    plain = ModuleStep(explicit.config, CPU)
    for number, (x, y) in enumerate(batches(explicit.config, 3)):
        found, expected = (s.step(x, y, number, 2e-4) for s in (explicit, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Adam turns rounding noise into steps of size lr: weights are compared where the gradient is clear
    for a, b in ((explicit.generator, plain.generator), (explicit.discriminator, plain.discriminator)):
        if a is None:
            assert b is None
            continue
        arena = explicit.arena_g if a is explicit.generator else explicit.arena_d
        noise = rounding_noise(b)
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            size = q.grad.abs()
            clear = size > max(1e-2 * size.max().item(), noise)
            torch.testing.assert_close(arena.gradients[name][clear], q.grad[clear], rtol=2e-2, atol=noise, msg=name)
            torch.testing.assert_close(p[clear], q[clear], rtol=1e-2, atol=3e-4, msg=name)
        for (name, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("options", [{}, {"norm": "instance"}])
def test_first_gradients_equal_autograd(options):
    explicit = make(**options)
    plain = ModuleStep(explicit.config, CPU)
    ((x, y),) = batches(explicit.config, 1)
    explicit.step(x, y, 0, 0.0)
    plain.step(x, y, 0, 0.0)
    for arena, net in ((explicit.arena_g, plain.generator), (explicit.arena_d, plain.discriminator)):
        noise = rounding_noise(net)
        for name, p in net.named_parameters():
            atol = 1e-4 * p.grad.abs().max().item() + noise
            torch.testing.assert_close(arena.gradients[name], p.grad, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"dropout": "paper", "ema": 0.9}, {"precision": "fp16"}, {"precision": "bf16", "pool": 2}]
)
def test_resume_is_exact(tmp_path, options):
    whole, first = make(**options), make(**options)
    data = batches(whole.config, 5)
    expected = [whole.step(x, y, n, 2e-4).tolist() for n, (x, y) in enumerate(data)]
    for n in range(3):
        assert first.step(*data[n], n, 2e-4).tolist() == expected[n]
    checkpoint.save(tmp_path / "3", first, {"step": 3}, {}, {"step": 3})
    second = make(**options)
    checkpoint.restore(tmp_path / "3", second)
    assert [second.step(*data[n], n, 2e-4).tolist() for n in (3, 4)] == expected[3:]
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_dropout_changes_from_step_to_step_and_repeats_for_a_seed():
    options = {"dropout": "paper"}
    ((x, y),) = batches(make().config, 1)
    runs = []
    for seed in (1, 1, 2):
        state = make(**options, seed=seed)
        weights = deepcopy(state.generator.state_dict())
        runs.append(state.step(x, y, 0, 0.0))
        state.generator.load_state_dict(weights)
        runs.append(state.step(x, y, 1, 0.0))
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[3])
    assert not torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[4])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(precision):
    half, full = make(precision=precision), make()
    for n, (x, y) in enumerate(batches(half.config, 4)):
        found, expected = (s.step(x, y, n, 2e-4) for s in (half, full))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
    assert half.arena_g.weights.g.dtype == half.dtype
    assert half.arena_g.vectors.g.dtype == torch.float32
    assert torch.equal(half.arena_g.weights.half, half.arena_g.weights.p.to(half.dtype))


def test_fp16_overflow_moves_no_moment_and_halves_the_scale():
    state = make(precision="fp16")
    ((x, y),) = batches(state.config, 1)
    before = [t.clone() for s in (*state.arena_g.segments, *state.arena_d.segments) for t in (s.p, s.m, s.v)]
    state.step(x * 1e30, y, 0, 2e-4)
    after = [t for s in (*state.arena_g.segments, *state.arena_d.segments) for t in (s.p, s.m, s.v)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert state.scale.item() == 32768
    assert {int(t) for t in state.updates.values()} == {1}
    assert state.counters[1] == 1


class NoSynchronisation(TorchDispatchMode):
    """Raises where a step would wait for the device, or make a tensor from host data."""

    REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nothing_in_the_step_waits_for_the_device(precision):
    state = make(precision=precision, dropout="paper", ema=0.9)
    ((x, y),) = batches(state.config, 1)
    with NoSynchronisation():
        state.step(x, y, 0, 2e-4)
        with pytest.raises(AssertionError, match="waits"):
            state.lr.item()  # the check itself can fail


def test_reduction_sees_every_gradient_before_its_update():
    config = make().config
    seen: list[int] = []

    class Drop(Group):
        def reduce(self, flat: Tensor) -> None:
            seen.append(flat.data_ptr())
            flat.zero_()

    state = ExplicitStep(config, CPU, How(impl="reference"), Drop())
    before = {k: p.clone() for k, p in state.generator.named_parameters()}
    ((x, y),) = batches(config, 1)
    state.step(x, y, 0, 2e-4)
    assert all(torch.equal(p, before[k]) for k, p in state.generator.named_parameters())
    segments = (*state.arena_d.segments, *state.arena_g.segments)  # in the order of the updates
    assert seen == [segment.g.data_ptr() for segment in segments]


class Order(TorchDispatchMode):
    """The order in which convolutions read kernels and the optimiser writes half copies, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("convolution", "convolution_backward"):
            self.events.append(("read", args[1 if name == "convolution" else 2].data_ptr()))
        elif name == "copy_":
            self.events.append(("write", args[0].data_ptr()))
        return func(*args, **(kwargs or {}))


def test_no_half_kernel_is_read_after_its_update_but_the_discriminator_by_the_generator_step():
    state = make(precision="bf16")
    ((x, y),) = batches(state.config, 1)
    with Order() as order:
        state.step(x, y, 0, 2e-4)
    for arena, nets_reads_after in (
        (state.arena_g, 0),
        (state.arena_d, 2),
    ):  # forward and backward through the updated D
        kernels = {t.data_ptr(): name for name, t in arena.compute.items() if t.ndim == 4}
        writes = [i for i, e in enumerate(order.events) if e == ("write", arena.weights.half.data_ptr())]
        reads = [(i, kernels[p]) for i, (kind, p) in enumerate(order.events) if kind == "read" and p in kernels]
        assert len(writes) == 1
        after = [name for i, name in reads if i > writes[0]]
        assert {name: after.count(name) for name in kernels.values()} == dict.fromkeys(
            kernels.values(), nets_reads_after
        )
        assert len(reads) - len(after) == 2 * len(kernels)  # before: one forward, one backward


def test_arena_views_are_the_parameters():
    state = make(precision="bf16")
    arena = state.arena_g
    for name, p in state.generator.named_parameters():
        assert p.data_ptr() == arena.addresses[name]
        assert (p.data_ptr() - arena.weights.p.data_ptr() if p.ndim == 4 else 0) % (4 * ALIGN) == 0
        if p.ndim == 4:
            assert p.is_contiguous(memory_format=torch.channels_last)
            assert arena.compute[name].dtype == torch.bfloat16
            assert torch.equal(arena.compute[name], p.to(torch.bfloat16))
    arena.weights.p.zero_()
    assert all(not p.any() for p in state.generator.parameters() if p.ndim == 4)
    state.generator.to(torch.float64)
    with pytest.raises(RuntimeError, match="left the arena"):
        arena.check_addresses()


def test_arena_of_a_network_in_fp32_has_no_half_copy():
    state = make()
    assert state.arena_g.weights.half is None
    assert Arena(state.generator, torch.float32).compute["down.0.conv.weight"].dtype == torch.float32

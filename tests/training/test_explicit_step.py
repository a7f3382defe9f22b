"""The explicit step against the plain one: losses, gradients, weights, statistics, resume."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from fastpix2pix.config import train_config
from fastpix2pix.data.images import to_unit
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.kernels import dispatch
from fastpix2pix.training import checkpoint
from fastpix2pix.training.arena import ALIGN, Arena
from fastpix2pix.training.convolution import Plans
from fastpix2pix.training.explicit_step import ExplicitStep
from fastpix2pix.training.module_step import ModuleStep
from fastpix2pix.training.plans import static_plans
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


def first_moment(plain: ModuleStep, parameter: Parameter) -> Tensor:
    return next(adam.state[parameter]["exp_avg"] for _, adam, _ in plain._optimisers() if parameter in adam.state)


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


@pytest.mark.parametrize("step", ["modules", "explicit"])
@pytest.mark.parametrize("options", [{}, {"objective": "gan"}, {"objective": "l1"}, {"pool": 3}], ids=str)
def test_levels_train_as_their_units_do(options, step):
    config = train_config(**{**BASE, "dropout": "paper", "impl": "auto", **options, "step": step})
    of_levels, of_units = build_state(config, CPU), build_state(config, CPU)
    draws = torch.Generator().manual_seed(2)
    for number in range(3):
        x, y = (torch.randint(256, (2, 32, 32, 3), generator=draws, dtype=torch.uint8) for _ in "xy")
        pairs = [t.permute(0, 3, 1, 2) for t in (x, y)], [to_unit(t).permute(0, 3, 1, 2) for t in (x, y)]
        torch.manual_seed(number)  # of the modules' dropout
        found = of_levels.step(*pairs[0], number, 2e-4)
        torch.manual_seed(number)
        assert torch.equal(found, of_units.step(*pairs[1], number, 2e-4))
    for a, b in zip(of_levels.generator.parameters(), of_units.generator.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_types_are_refused():
    state = make()
    x = torch.zeros(2, 3, 32, 32)
    with pytest.raises(InputError, match=r"a batch of torch.float64: uint8 levels or float32 units"):
        state.step(x, x.double(), 0, 2e-4)


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
            found, expected = arena.moments[name][0], first_moment(plain, q)
            torch.testing.assert_close(found[clear], expected[clear], rtol=2e-2, atol=noise, msg=name)
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
            found = arena.moments[name][0] / (1 - explicit.config.beta1)  # as Adam was given it
            torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=atol, msg=name)


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

    state = ExplicitStep(config, CPU, How(impl="reference"), Drop(0, 2), at_once=False)
    before = {k: p.clone() for k, p in state.generator.named_parameters()}
    ((x, y),) = batches(config, 1)
    state.step(x, y, 0, 2e-4)
    assert all(torch.equal(p, before[k]) for k, p in state.generator.named_parameters())
    segments = (*state.arena_d.segments, *state.arena_g.segments)  # in the order of the updates
    assert seen == [segment.g.data_ptr() for segment in segments]


def span(t: Tensor) -> range:
    """Its addresses."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return range(t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize)


class Order(TorchDispatchMode):
    """The order in which convolutions read kernels and the optimiser writes half copies, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, range]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("convolution", "convolution_backward"):
            self.events.append(("read", span(args[1 if name == "convolution" else 2])))
        elif name == "copy_":
            self.events.append(("write", span(args[0])))
        return func(*args, **(kwargs or {}))

    def of(self, kernel: Tensor) -> str:
        """r and w in their order."""
        own = span(kernel)
        return "".join(kind[0] for kind, at in self.events if at.start < own.stop and own.start < at.stop)


@pytest.mark.parametrize("at_once", [True, False])
def test_no_half_kernel_is_read_after_its_update_but_the_discriminator_by_the_generator_step(at_once):
    state = ExplicitStep(make(precision="bf16").config, CPU, How(impl="reference"), at_once=at_once)
    ((x, y),) = batches(state.config, 1)
    with Order() as order:
        state.step(x, y, 0, 2e-4)
    for arena, expected in ((state.arena_g, "rrw"), (state.arena_d, "rrwrr")):  # rr: forward and backward
        kernels = {name: t for name, t in arena.compute.items() if t.ndim == 4}
        assert {name: order.of(t) for name, t in kernels.items()} == dict.fromkeys(kernels, expected)


@pytest.mark.parametrize("idle", [(), ("b", "d")])
@pytest.mark.parametrize("taken", [(), ("a",), ("b", "c"), ("d",), ("a", "b", "c", "d")])
def test_updates_go_once_over_every_number_but_those_taken_and_idle(taken, idle):
    net = Module()
    shapes = {"a": (2, 3, 4, 4), "b": (8, 4, 4, 4), "c": (5, 3, 3, 3), "d": (4, 8, 4, 4), "e": (7,)}
    for name, shape in shapes.items():
        setattr(net, name, Parameter(torch.zeros(shape)))
    arena = Arena(net, torch.float32)
    for part in arena.updates(idle, taken):
        part.p.add_(1)
    for name in taken:
        gradient = torch.full((arena.gradients[name].numel(),), 3.0)
        part = arena.update_of(name, gradient, idle)
        assert part.g.eq(3).all() and part.g.shape == part.p.shape
        part.p.add_(1)
    for name, p in net.named_parameters():
        expected = torch.ones_like(p)
        if name in idle:
            expected[..., [0, 3], :] = 0
            expected[..., [0, 3]] = 0
        assert torch.equal(p, expected), name


def everything(state: ExplicitStep) -> list[Tensor]:
    segments = [s for arena in (state.arena_g, state.arena_d) if arena for s in arena.segments]
    buffers = [b for net in (state.generator, state.discriminator) if net for b in net.buffers()]
    return [t for s in segments for t in (s.p, s.m, s.v, s.half) if t is not None] + buffers


AT_ONCE = [
    ({}, "fp32"),
    ({"precision": "bf16", "dropout": "paper", "ema": 0.9}, "bf16"),
    ({"up": "resize", "in_channels": 1, "precision": "bf16"}, "kernels of no 16 n numbers, one input channel"),
    ({"norm": "instance", "objective": "l1"}, "no discriminator"),
    ({"pool": 3, "batch": 1}, "image pool"),
    ({"crop_size": 64}, "nothing idle"),
]


@pytest.mark.parametrize("mixed", [False, True], ids=["the library's", "every other by own products"])
@pytest.mark.parametrize(("options", "why"), AT_ONCE, ids=[row[-1] for row in AT_ONCE])
def test_updating_each_kernel_at_once_is_the_same_training_to_the_bit(options, why, mixed):
    config = make(**options).config
    plans = (
        {key: Plans(wgrad=plan.wgrad) for key, plan in list(static_plans(config, 132).items())[::2]} if mixed else {}
    )
    how = How(plans, "reference")
    once, together = (ExplicitStep(config, CPU, how, at_once=at_once) for at_once in (True, False))
    before = [t.clone() for t in everything(once)]
    size, draws = config.data.crop_size, torch.Generator().manual_seed(5)
    for number in range(3):
        x, y = (
            torch.rand(config.batch, channels, size, size, generator=draws) * 2 - 1
            for channels in (config.generator.in_channels, config.generator.out_channels)
        )
        assert torch.equal(*(s.step(x, y, number, 1e-3) for s in (once, together)))
    assert all(torch.equal(a, b) for a, b in zip(everything(once), everything(together), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(everything(once), before, strict=True))
    arena, of_library = once.arena_g, [name for name in once.arena_g.kernels if (name, config.batch) not in plans]
    assert of_library and not any(arena.kernels[name].g.any() for name in of_library)  # nothing was copied there
    assert all(kernel.g.any() for kernel in together.arena_g.kernels.values())
    assert mixed == bool(arena.weights.g.any())


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"processes": 2}], ids=str)
def test_where_something_is_to_be_awaited_nothing_is_updated_at_once(options):
    """fp16 looks for overflows in all gradients first, several processes sum them."""
    options = dict(options)
    group = Group(size=options.pop("processes", 1))
    state = ExplicitStep(make(**options).config, CPU, How(impl="reference"), group)
    ((x, y),) = batches(state.config, 1)
    state.step(x, y, 0, 2e-4)
    assert state.arena_g.weights.g.any() and state.arena_d.weights.g.any()


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

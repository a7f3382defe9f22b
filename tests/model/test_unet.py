"""The generator: the paper's numbers, shapes, modes and refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastpix2pix.config import Generator, Modes
from fastpix2pix.errors import InputError
from fastpix2pix.model import Unet, build_generator
from fastpix2pix.model.unet import check_modes, macs, parameter_count

LAST = torch.channels_last
SMALL = Generator(depth=5, ngf=4)


def _meta(config):
    with torch.device("meta"):
        return Unet(config)


def _net(config=SMALL, double=True):
    """A small generator with uneven running statistics, in eval mode."""
    torch.manual_seed(0)
    net = build_generator(config)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.01, 0.01)
            nn.init.uniform_(module.running_var, 0.0005, 0.002)
    return (net.double() if double else net).eval()


def _x(n=3, size=32, dtype=torch.float64, channels=3):
    return torch.rand(n, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_unet_256_is_the_papers():
    net = _meta(Generator())
    assert parameter_count(net) == 54_413_955
    assert len(net.state_dict()) == 82
    assert macs(Generator(), 256, 256) == 6_048_186_368  # 6.05 G
    outputs = [block.conv.out_channels for block in net.up]
    assert outputs == [512, 512, 512, 512, 256, 128, 64, 3]
    assert [block.conv.in_channels for block in net.up] == [512, 1024, 1024, 1024, 1024, 512, 256, 128]
    assert [block.conv.out_channels for block in net.down] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert [block.dropout is not None for block in net.up] == [True] * 3 + [False] * 5
    assert [isinstance(block.norm, nn.BatchNorm2d) for block in net.down] == [False] + [True] * 6 + [False]
    assert [isinstance(block.norm, nn.BatchNorm2d) for block in net.up] == [True] * 7 + [False]
    assert [name for name in net.state_dict() if "conv.bias" in name] == ["up.7.conv.bias"]


def test_sides_at_256():
    net, sides = _meta(Generator()), {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, i, o, name=name: sides.__setitem__(name, tuple(o.shape[2:])))
    net(torch.zeros(1, 3, 256, 256, device="meta"))
    assert [sides[f"down.{i}.conv"][0] for i in range(8)] == [128, 64, 32, 16, 8, 4, 2, 1]
    assert [sides[f"up.{i}.conv"][0] for i in range(8)] == [2, 4, 8, 16, 32, 64, 128, 256]


CONFIGS = [
    (Generator(depth=5, ngf=4), "the least depth"),
    (Generator(depth=6, ngf=8, in_channels=1, out_channels=2), "channel counts that differ"),
    (Generator(depth=7, ngf=4, norm="instance"), "unet_128, instance norm"),
    (Generator(depth=9, ngf=4, norm="none", dropout="none"), "unet_512, no norm"),
    (Generator(depth=5, ngf=4, kind="encoder_decoder"), "no skips"),
    (Generator(depth=6, ngf=4, up="resize", norm="instance"), "resize up-blocks"),
    (Generator(depth=5, ngf=4, kind="encoder_decoder", up="resize", dropout="junyanz"), "both ablations"),
]


@pytest.mark.parametrize("config", [c for c, _ in CONFIGS], ids=[why for _, why in CONFIGS])
def test_every_architecture(config):
    height, width = config.multiple, 2 * config.multiple
    net = _meta(config)
    x = torch.zeros(2, config.in_channels, height, width, device="meta")
    assert net(x).shape == (2, config.out_channels, height, width)
    with FlopCounterMode(display=False) as counter:
        net.eval()(x[:1])
    # torch counts a transposed convolution by its input, which is its true cost at stride 2
    assert counter.get_total_flops() == 2 * macs(config, height, width)
    if config.depth == 5:
        out = _net(config)(_x())
        assert out.shape == (3, config.out_channels, 32, 32)
        assert out.abs().max() <= 1
        assert out.std() > 0
        assert out.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(
    ("layout", "depth", "blocks"),
    [("paper", 8, [0, 1, 2]), ("junyanz", 8, [1, 2, 3]), ("junyanz", 7, [1, 2]), ("junyanz", 5, []), ("none", 8, [])],
)
def test_dropout_layouts(layout, depth, blocks):
    net = _meta(Generator(depth=depth, dropout=layout))
    assert [i for i, block in enumerate(net.up) if block.dropout is not None] == blocks


def test_image_mode_is_train_mode_at_batch_1():
    net = _net(Generator(depth=5, ngf=4, dropout="none"))
    x = _x()
    image = net(x, Modes("image"))
    for i in range(3):
        _close(net.train()(x[i : i + 1]), image[i : i + 1])
        net.eval()


MODES = [Modes("image"), Modes("image", "fixed", 3), Modes("image", "random", 3), Modes("running", "random")]


@pytest.mark.parametrize("modes", MODES, ids=lambda m: f"{m.norm_stats}+{m.noise}")
def test_an_image_does_not_depend_on_its_batch(modes):
    net, x = _net(), _x()
    together = net(x, modes, 5)
    for i in range(3):
        _close(together[i : i + 1], net(x[i : i + 1], modes, 5 + i))


def test_noise():
    net, x = _net(), _x(1).expand(3, -1, -1, -1)
    off, fixed, random = (net(x, Modes(noise=noise)) for noise in ("off", "fixed", "random"))
    _close(fixed[0], fixed[2])
    assert (random[0] - random[1]).abs().max() > 1e-3
    assert (off - fixed).abs().max() > 1e-3
    assert torch.equal(fixed, net(x, Modes(noise="fixed")))
    assert torch.equal(random, net(x, Modes(noise="random")))
    assert not torch.equal(fixed, net(x, Modes(noise="fixed", seed=1)))
    assert not torch.equal(random, net(x, Modes(noise="random", seed=1)))


def test_modes_default_to_the_networks_own_and_leave_the_state_alone():
    net, x = _net(), _x()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert net.modes == Modes()
    assert torch.equal(net(x), net(x, Modes("image", "off")))
    net.modes = Modes("running", "fixed")
    running = net(x)
    assert torch.equal(running, net(x, Modes("running", "fixed")))
    assert (running - net(x, Modes("image", "fixed"))).abs().max() > 1e-2
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_training_ignores_modes_and_updates_running_statistics():
    net, x = _net().train(), _x()
    torch.manual_seed(4)
    first = net(x)
    assert net.up[0].norm.num_batches_tracked == 1
    torch.manual_seed(4)
    assert torch.equal(first, net(x, Modes("running", "off")))
    torch.manual_seed(5)
    assert not torch.equal(first, net(x))  # dropout is on


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_gradients_reach_every_parameter(norm):
    net = _net(Generator(depth=5, ngf=4, norm=norm)).train()
    net(_x()).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # a bias in front of a norm has gradient 0 in exact arithmetic
        if not (norm == "instance" and name.endswith("conv.bias")):
            assert parameter.grad.any(), name


def test_channels_last_parameters_and_output():
    net = _net(double=False)
    for parameter in net.parameters():
        assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=LAST)
    for modes in (Modes("image", "random"), Modes("running", "fixed")):
        assert net(_x(dtype=torch.float32), modes).is_contiguous(memory_format=LAST)
    assert net.train()(_x(dtype=torch.float32)).is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("modes", MODES, ids=lambda m: f"{m.norm_stats}+{m.noise}")
def test_bf16_autocast(modes):
    net, x = _net(double=False), _x(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, modes)
    assert half.dtype == torch.bfloat16
    assert (half.float() - net(x, modes)).abs().mean() < 0.01
    with torch.autocast("cpu", torch.bfloat16):
        net.train()(x).float().mean().backward()
    assert net.down[0].conv.weight.grad.isfinite().all()


def test_sync_batchnorm_conversion_runs_alike():
    net, x = _net(), _x()
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    for modes in (Modes("image"), Modes("running")):
        assert torch.equal(net(x, modes), sync(x, modes))


def test_a_copy_is_independent():
    net, x = _net(), _x()
    net(x, Modes(noise="fixed"))
    twin = copy.deepcopy(net)
    expected = net(x, Modes(noise="fixed"))
    nn.init.zeros_(net.up[-1].conv.weight)
    assert torch.equal(twin(x, Modes(noise="fixed")), expected)


def test_repr_names_the_architecture():
    text = repr(_meta(SMALL))
    for part in ("Unet(", "depth=5, ", "ngf=4", str(Modes()), "BatchNorm2d(8", "Dropout(0.5, block=2)"):
        assert part in text


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(1, 3, 32, 48), r"32x48 pixels: a generator of depth 5 .* multiples of 32"),
        (torch.zeros(1, 3, 0, 32), "0x32 pixels"),
        (torch.zeros(1, 4, 32, 32), r"1x4x32x32 .* takes \[N, 3, H, W\]"),
        (torch.zeros(3, 32, 32), "3x32x32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"torch.uint8: .* floats in \[-1, 1\]"),
    ],
)
def test_bad_inputs_are_refused(x, match):
    with pytest.raises(InputError, match=match):
        _meta(SMALL)(x)


def test_check_modes():
    instance = Generator(depth=5, ngf=4, norm="instance")
    with pytest.raises(InputError, match="no running statistics; use norm_stats = image"):
        check_modes(instance, Modes("running"))
    with pytest.raises(InputError, match="no running statistics"):
        _net(instance)(_x(), Modes("running"))
    check_modes(instance, Modes("image"))
    for norm in ("batch", "none"):
        for stats in ("image", "running"):
            check_modes(Generator(norm=norm), Modes(stats))
    none = _net(Generator(depth=5, ngf=4, norm="none"))
    assert torch.equal(none(_x(), Modes("running")), none(_x(), Modes("image")))

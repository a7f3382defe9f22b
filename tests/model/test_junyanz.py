"""junyanz checkpoints: names and shapes, equal outputs against a reference of our own, round trips, refusals."""

import collections
import re

import pytest
import torch
from torch import nn

from fastpix2pix.config import Discriminator, Generator, Modes
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.model import PatchGAN, Unet, build_discriminator, build_generator
from fastpix2pix.model.junyanz import convert, from_junyanz, load_pth, save_pth, to_junyanz
from fastpix2pix.model.load import load_generator
from fastpix2pix.model.weights import load_network, load_state, read_record, save_network


class InstanceNorm(nn.InstanceNorm2d):
    """torch's returns NCHW; dropout draws in memory order, so equal draws need equal formats."""

    def forward(self, x):
        return super().forward(x).contiguous(memory_format=torch.channels_last)


NORMS = {"batch": nn.BatchNorm2d, "instance": InstanceNorm, "none": lambda features: nn.Identity()}


class Level(nn.Module):
    """One level of the reference U-Net: everything inside it, and its own input beside the result."""

    def __init__(self, outer, inner, sub, norm, source=None, dropout=False):
        super().__init__()
        bias, wide = norm == "instance", inner if sub is None else 2 * inner
        down = nn.Conv2d(source or outer, inner, 4, 2, 1, bias=bias)
        up = nn.ConvTranspose2d(wide, outer, 4, 2, 1, bias=bias or bool(source))
        if source:
            layers = [down, sub, nn.ReLU(True), up, nn.Tanh()]
        elif sub is None:
            layers = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, NORMS[norm](outer)]
        else:
            layers = [nn.LeakyReLU(0.2, True), down, NORMS[norm](inner), sub, nn.ReLU(True), up, NORMS[norm](outer)]
        self.model = nn.Sequential(*layers, *[nn.Dropout(0.5)] * dropout)
        self.outermost = bool(source)

    def forward(self, x):
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class Reference(nn.Module):
    def __init__(self, depth, ngf, norm="batch", source=3, out=3, dropout=True):
        super().__init__()
        level = Level(8 * ngf, 8 * ngf, None, norm)
        for _ in range(depth - 5):
            level = Level(8 * ngf, 8 * ngf, level, norm, dropout=dropout)
        for width in (4, 2, 1):
            level = Level(width * ngf, 2 * width * ngf, level, norm)
        self.model = Level(out, ngf, level, norm, source=source)

    def forward(self, x):
        return self.model(x)


def _reference_d(n, ndf, norm, source=6):
    bias = norm == "instance"
    act = lambda: nn.LeakyReLU(0.2, True)  # noqa: E731
    if n == 0:
        convs = [
            nn.Conv2d(a, b, 1, bias=c) for a, b, c in ((source, ndf, True), (ndf, 2 * ndf, bias), (2 * ndf, 1, bias))
        ]
        net = nn.Module()
        net.net = nn.Sequential(convs[0], act(), convs[1], NORMS[norm](2 * ndf), act(), convs[2])
        net.forward = net.net.forward
        return net
    layers = [nn.Conv2d(source, ndf, 4, 2, 1), act()]
    for i in range(1, n + 1):
        a, b = (ndf * min(2**k, 8) for k in (i - 1, i))
        layers += [nn.Conv2d(a, b, 4, 2 if i < n else 1, 1, bias=bias), NORMS[norm](b), act()]
    net = nn.Module()
    net.model = nn.Sequential(*layers, nn.Conv2d(b, 1, 4, 1, 1))
    net.forward = net.model.forward
    return net


def _randomise(net):
    """Weights and running statistics that matter at every layer."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            low, high = (
                (0.5, 1.5) if "running_var" in name or (tensor.ndim == 1 and "bias" not in name) else (-0.1, 0.1)
            )
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
        else:
            tensor.fill_(17)
    return net


def _x(channels, size, n=2):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _load(state):
    config, own = from_junyanz(state)
    net = (Unet if isinstance(config, Generator) else PatchGAN)(config)
    load_state(net, own, "test")
    return net.eval()


def _batchnorm(prefix, features):
    shapes = {f"{prefix}.{name}": (features,) for name in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{prefix}.num_batches_tracked": ()}


def _unet_256_table():
    """The 82 entries of a published unet_256, written down level by level."""
    p = ["model.model", "model.model.1.model"]
    while len(p) < 8:
        p.append(p[-1] + ".3.model")
    table = {f"{p[0]}.0.weight": (64, 3, 4, 4), f"{p[0]}.3.weight": (128, 3, 4, 4), f"{p[0]}.3.bias": (3,)}
    for k, (out, source) in enumerate([(128, 64), (256, 128), (512, 256)] + [(512, 512)] * 3, start=1):
        table |= {f"{p[k]}.1.weight": (out, source, 4, 4)} | _batchnorm(f"{p[k]}.2", out)
    table |= {f"{p[7]}.1.weight": (512, 512, 4, 4), f"{p[7]}.3.weight": (512, 512, 4, 4)} | _batchnorm(f"{p[7]}.4", 512)
    ups = {6: (1024, 512), 5: (1024, 512), 4: (1024, 512), 3: (1024, 256), 2: (512, 128), 1: (256, 64)}
    for k, (source, out) in ups.items():
        table |= {f"{p[k]}.5.weight": (source, out, 4, 4)} | _batchnorm(f"{p[k]}.6", out)
    return table


def test_names_and_shapes_of_unet_256():
    net = Unet(Generator())
    state = to_junyanz(net)
    assert {name: tuple(t.shape) for name, t in state.items()} == _unet_256_table()
    assert len(state) == 82
    config, own = from_junyanz(state)
    assert config == Generator(dropout="junyanz")
    assert _equal(own, net.state_dict())


def test_names_and_shapes_of_patchgan_70():
    state = to_junyanz(PatchGAN(Discriminator()))
    table = {
        "model.0.weight": (64, 6, 4, 4),
        "model.0.bias": (64,),
        "model.11.weight": (1, 512, 4, 4),
        "model.11.bias": (1,),
    }
    for conv, norm, out, source in ((2, 3, 128, 64), (5, 6, 256, 128), (8, 9, 512, 256)):
        table |= {f"model.{conv}.weight": (out, source, 4, 4)} | _batchnorm(f"model.{norm}", out)
    assert {name: tuple(t.shape) for name, t in state.items()} == table
    assert len(state) == 22


G_TABLE = [
    (5, 4, "batch", 3, 3, "the least depth"),
    (7, 4, "batch", 1, 2, "unet_128, other channels"),
    (6, 4, "instance", 3, 3, "every convolution has a bias"),
    (9, 2, "none", 3, 1, "unet_512, no norm"),
]


@pytest.mark.parametrize(("depth", "ngf", "norm", "source", "out", "why"), G_TABLE, ids=[row[-1] for row in G_TABLE])
def test_generator_equals_the_reference(depth, ngf, norm, source, out, why):
    theirs = _randomise(Reference(depth, ngf, norm, source, out)).to(memory_format=torch.channels_last)
    net = _load(theirs.state_dict())
    assert net.config == Generator("unet", depth, source, out, ngf, norm, "junyanz")
    assert _equal(to_junyanz(net), theirs.state_dict())
    x = _x(source, 2**depth).contiguous(memory_format=torch.channels_last)
    stats = "image" if norm == "instance" else "running"
    torch.testing.assert_close(net(x, Modes(stats)), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    # their default test: train mode at batch 1, dropout on; the same global draws make the same picture
    torch.manual_seed(0)
    expected = theirs.train()(x[:1])
    torch.manual_seed(0)
    torch.testing.assert_close(net.train()(x[:1]), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_image_statistics_equal_the_references_train_mode():
    theirs = _randomise(Reference(6, 4, dropout=False)).train()
    net, x = _load(theirs.state_dict()), _x(3, 64)
    each = torch.cat([theirs(image[None]) for image in x])
    torch.testing.assert_close(net(x, Modes("image")), each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", range(6))
def test_discriminator_equals_the_reference(n, norm):
    theirs = _randomise(_reference_d(n, 4, norm)).eval()
    net = _load(theirs.state_dict())
    assert net.config == Discriminator(6, 4, n, norm)
    assert _equal(to_junyanz(net), theirs.state_dict())
    x = _x(6, 128)
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.train()(x), theirs.train()(x), rtol=1e-4, atol=1e-5)


NETS = [
    *(build_generator(Generator(depth=5, ngf=4, norm=norm, dropout="junyanz")) for norm in NORMS),
    *(build_discriminator(Discriminator(ndf=4, n_layers=n, norm=norm)) for norm in NORMS for n in (0, 1, 3)),
]


@pytest.mark.parametrize(
    "net", NETS, ids=lambda n: f"{type(n).__name__}-{n.config.norm}-{getattr(n.config, 'n_layers', '')}"
)
def test_round_trip_through_files_is_bit_equal(net, tmp_path):
    _randomise(net).eval()
    pth, own, back = tmp_path / "a_net.pth", tmp_path / "a.safetensors", tmp_path / "b_net.pth"
    save_pth(pth, net)
    convert(pth, own)
    convert(own, back)
    loaded, _ = load_network(own)
    for twin in (load_pth(pth), loaded, load_pth(back)):
        assert type(twin) is type(net)
        assert twin.config == net.config
        assert not twin.training
        assert _equal(twin.state_dict(), net.state_dict())
        x = _x(twin.config.in_channels, 32)
        assert torch.equal(twin(x), net(x))
    raw = torch.load(pth, weights_only=True)
    assert all(tensor.is_contiguous() for tensor in raw.values())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "a_net.pth", "b_net.pth"]


def _old_instance_norm(state):
    """Files of old torch versions: running statistics without weights, for every InstanceNorm."""
    extra = {}
    for key in state:
        if match := re.fullmatch(r"(model\.model\.1\.model)\.1\.weight|(model)\.2\.weight", key):
            norm = f"{match[1]}.2" if match[1] else f"{match[2]}.3"
            extra |= {f"{norm}.running_mean": torch.zeros(8), f"{norm}.running_var": torch.ones(8)}
            extra[f"{norm}.num_batches_tracked"] = torch.tensor(5)
    assert len(extra) == 3
    return state | extra


VARIANTS = [
    ("batch", lambda s: {f"module.{k}": t for k, t in s.items()}, "module. prefix"),
    ("instance", _old_instance_norm, "statistics of old InstanceNorm files"),
    ("batch", lambda s: {k: t for k, t in s.items() if "num_batches" not in k}, "no counters"),
    ("batch", lambda s: collections.OrderedDict(reversed(s.items())), "another order"),
]


@pytest.mark.parametrize(("norm", "change", "why"), VARIANTS, ids=[row[-1] for row in VARIANTS])
@pytest.mark.parametrize("kind", ["G", "D"])
def test_variants_of_files(norm, change, why, kind, tmp_path):
    net = Unet(Generator(depth=5, ngf=4, norm=norm)) if kind == "G" else PatchGAN(Discriminator(ndf=4, norm=norm))
    _randomise(net).eval()
    torch.save(change(to_junyanz(net)), tmp_path / "old.pth")
    loaded = load_pth(tmp_path / "old.pth")
    expected = {k: t * 0 if why == "no counters" and "num_batches" in k else t for k, t in net.state_dict().items()}
    assert _equal(loaded.state_dict(), expected)


def test_files_of_modules_and_of_old_torch(tmp_path):
    theirs = _randomise(Reference(5, 4))
    torch.save(theirs.state_dict(), tmp_path / "zip.pth")  # an OrderedDict with metadata
    torch.save(theirs.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("zip.pth", "old.pth"):
        assert _equal(to_junyanz(load_pth(tmp_path / name)), theirs.state_dict())


def test_load_generator_takes_a_pth(tmp_path):
    save_pth(tmp_path / "latest_net_G.pth", build_generator(Generator(depth=5, ngf=4)))
    net, record = load_generator(tmp_path / "latest_net_G.pth")
    assert net.modes == Modes()
    assert "modes" not in record
    assert record["architecture"]["depth"] == 5
    assert record["architecture"]["dropout"] == "junyanz"
    save_pth(tmp_path / "latest_net_D.pth", build_discriminator(Discriminator(ndf=4)))
    with pytest.raises(InputError, match=r"latest_net_D\.pth is a discriminator; a generator is wanted"):
        load_generator(tmp_path / "latest_net_D.pth")


def test_convert_describes_and_refuses(tmp_path):
    pth, own = tmp_path / "g.pth", tmp_path / "g.safetensors"
    save_pth(pth, build_generator(Generator(depth=5, ngf=4)))
    line = convert(pth, own)
    assert line.endswith(
        "generator unet_32, 3 -> 3 channels, ngf 4, norm batch, dropout junyanz; "
        "a .pth does not tell the dropout layout: junyanz is assumed"
    )
    assert "\n" not in line
    assert read_record(own)["architecture"]["dropout"] == "junyanz"
    assert "modes" not in read_record(own)
    for src, dst in ((pth, own), (own, pth)):
        before = dst.read_bytes()
        with pytest.raises(InputError, match="exists; choose another name or give overwrite"):
            convert(src, dst)
        assert dst.read_bytes() == before
    save_network(own, load_pth(pth), direction="BtoA", modes=Modes("running"))
    assert convert(own, pth, overwrite=True).endswith("a .pth does not keep its modes and direction")
    save_network(own, build_generator(Generator(depth=5, ngf=4, dropout="paper")), direction="BtoA")
    assert convert(own, pth, overwrite=True).endswith(
        "a .pth does not keep its direction and dropout layout (converted back it is junyanz)"
    )
    save_pth(tmp_path / "d.pth", build_discriminator(Discriminator(ndf=4, n_layers=0)))
    assert convert(tmp_path / "d.pth", tmp_path / "d.safetensors").endswith(
        "discriminator PixelGAN, 6 channels, ndf 4, norm batch"
    )
    for src, dst in (("g.pth", "h.pth"), ("g.onnx", "g.pth"), ("g", "g.safetensors")):
        with pytest.raises(InputError, match=r"allowed are .pth -> .safetensors and .safetensors -> .pth"):
            convert(tmp_path / src, tmp_path / dst)
    with pytest.raises(InputError, match=r"none\.pth: no such file"):
        convert(tmp_path / "none.pth", tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"a folder; of a run, convert .*best\.safetensors, of a checkpoint .*gen"):
        convert(tmp_path, tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (Generator(depth=5, ngf=2, up="resize"), "up = resize: junyanz's generator has transposed convolutions only"),
        (Generator(depth=5, ngf=2, kind="encoder_decoder"), "kind = encoder_decoder: junyanz's generator is a U-Net"),
    ],
)
def test_what_junyanz_cannot_build_is_not_exported(config, match, tmp_path):
    save_network(tmp_path / "g.safetensors", Unet(config))
    with pytest.raises(InputError, match=match):
        convert(tmp_path / "g.safetensors", tmp_path / "g.pth")
    assert not (tmp_path / "g.pth").exists()


def _g_state():
    return to_junyanz(Unet(Generator(depth=5, ngf=2)))


def _without(part):
    return {name: tensor for name, tensor in _g_state().items() if part not in name}


INNER = "model.model.1.model.3.model"
BAD_STATES = [
    (
        {"model.1.weight": torch.zeros(4, 3, 7, 7), "model.10.conv_block.1.weight": torch.zeros(1)},
        "resnet generators are not supported; unet only",
    ),
    ({"netG_A2B.layer.weight": torch.zeros(1)}, "neither a U-Net generator nor a PatchGAN .* netG_A2B.layer.weight"),
    ({}, "neither .* it holds nothing"),
    ({"model.0.weight": torch.zeros(4)}, "neither a U-Net"),
    (lambda: _g_state() | {"extra.weight": torch.zeros(1)}, r"unexpected \(1\): extra.weight"),
    (lambda: _without(f"{INNER}.1.weight"), r"missing \(1\): down.2.conv.weight"),
    (lambda: _g_state() | {f"{INNER}.2.weight": torch.zeros(9)}, "down.2.norm.weight: file 9, model 8"),
    (lambda: _without("running"), r"missing \(\d+\): down.1.norm.running_mean"),
]


@pytest.mark.parametrize(("state", "match"), BAD_STATES)
def test_foreign_and_damaged_states_are_refused(state, match, tmp_path):
    torch.save(state() if callable(state) else state, tmp_path / "f.pth")
    with pytest.raises(InputError, match=match) as caught:
        load_pth(tmp_path / "f.pth")
    assert str(caught.value).startswith(str(tmp_path / "f.pth"))
    assert len(str(caught.value).splitlines()) <= 8


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def _cut(data, keep):
    return data[: int(len(data) * keep)]


BAD_FILES = [
    (lambda p: p.write_bytes(b""), "empty or not a PyTorch file"),
    (lambda p: p.write_text("weights"), "empty or not a PyTorch file"),
    (lambda p: p.write_bytes(_cut(p.read_bytes(), 0.5)), "truncated or damaged"),
    (lambda p: torch.save(Unet(Generator(depth=5, ngf=2)), p), "holds Python objects or code, which are never run"),
    (
        lambda p: torch.save({"w": Payload(p.with_name("owned"))}, p),
        "holds Python objects or code, which are never run",
    ),
    (lambda p: torch.save([torch.zeros(1)], p), "holds a list; a plain state dict is needed"),
    (lambda p: torch.save(torch.zeros(1), p), "holds a Tensor; a plain state dict"),
    (lambda p: torch.save({"state_dict": _g_state(), "epoch": 3}, p), "holds state_dict, epoch that are not tensors"),
    (
        lambda p: torch.save({"netG_A": _g_state(), "netG_B": _g_state()}, p),
        "holds netG_A, netG_B that are not tensors",
    ),
    (lambda p: p.unlink(), "no such file"),
]


@pytest.mark.parametrize(("spoil", "match"), BAD_FILES)
def test_bad_files_are_refused_in_one_line(spoil, match, tmp_path):
    path = tmp_path / "g.pth"
    torch.save(_g_state(), path)
    spoil(path)
    with pytest.raises(InputError, match=match) as caught:
        load_pth(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_old_format_cut_short_is_refused(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(_g_state(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for keep in (0.02, 0.5, 0.99):
        path.write_bytes(_cut(whole, keep))
        with pytest.raises(InputError, match="truncated or damaged"):
            load_pth(path)


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "g.pth").mkdir()
    with pytest.raises(EnvironmentFailed, match=r"cannot write .*g\.pth"):
        save_pth(tmp_path / "g.pth", NETS[0])
    assert [p.name for p in tmp_path.iterdir()] == ["g.pth"]

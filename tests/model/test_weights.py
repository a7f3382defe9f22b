"""Model files: round trips, loading in place, and a readable line for everything that can be wrong with a file."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

import fastpix2pix
from fastpix2pix.config import Discriminator, Generator, Modes
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.model import PatchGAN, Unet, build_discriminator, build_generator
from fastpix2pix.model.load import load_discriminator, load_generator
from fastpix2pix.model.weights import infer_config, load_network, load_state, read_record, save_network

SMALL = Generator(depth=5, ngf=4)


def _build(config):
    return build_generator(config) if isinstance(config, Generator) else build_discriminator(config)


CONFIGS = [
    SMALL,
    Generator(depth=6, ngf=2, norm="instance", in_channels=1, dropout="none"),
    Generator(depth=5, ngf=2, kind="encoder_decoder", norm="none", dropout="junyanz"),
    Generator(depth=5, ngf=2, up="resize", out_channels=2),
    Generator(depth=5, ngf=2, up="resize", kind="encoder_decoder"),
    Discriminator(ndf=4),
    Discriminator(ndf=4, n_layers=0, norm="instance", in_channels=2),
    Discriminator(ndf=4, n_layers=5, norm="none"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_round_trip(config, tmp_path):
    path = tmp_path / "net.safetensors"
    net = _build(config).eval()
    save_network(path, net, direction="BtoA", step=7, size=256, other=None)
    loaded, record = load_network(path)
    assert type(loaded) is type(net)
    assert loaded.config == config
    assert not loaded.training
    ours, theirs = net.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    for tensor in theirs.values():
        assert tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(1, config.in_channels, 128, 128)
    assert torch.equal(net(x), loaded(x))
    assert record == read_record(path)
    assert record == {
        "format": 1,
        "network": "generator" if isinstance(config, Generator) else "discriminator",
        "architecture": dataclasses.asdict(config),
        "direction": "BtoA",
        "step": 7,
        "size": 256,
        "versions": {"fastpix2pix": fastpix2pix.__version__, "torch": torch.__version__},
    }
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_architecture_shows_in_names_and_shapes(config):
    inferred = infer_config(_build(config).state_dict())
    known = {"dropout": config.dropout} if isinstance(config, Generator) else {}
    assert dataclasses.replace(inferred, **known) == config


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(1)}, {"down.0.conv.weight": torch.zeros(1)}])
def test_no_architecture_in_a_foreign_state(state):
    assert infer_config(state) is None


def test_the_file_is_plain_safetensors_with_one_record(tmp_path):
    path = tmp_path / "g.safetensors"
    save_network(path, build_generator(SMALL), modes=Modes("running", "fixed", 3))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["fastpix2pix"]
    assert json.loads(metadata["fastpix2pix"])["modes"] == {"norm_stats": "running", "noise": "fixed", "seed": 3}
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode  # readable for whom any new file is


def test_modes_come_from_the_record(tmp_path):
    path = tmp_path / "g.safetensors"
    for given, expected in (
        ({}, Modes()),
        ({"modes": {"norm_stats": "running", "noise": "random"}}, Modes("running", "random")),
    ):
        save_network(path, build_generator(SMALL), **given)
        net, _ = load_network(path)
        assert net.modes == expected


def test_load_state_copies_in_place():
    net, other = build_generator(SMALL), build_generator(SMALL)
    pointers = [t.data_ptr() for t in net.state_dict().values()]
    load_state(net, other.state_dict(), "other")
    assert [t.data_ptr() for t in net.state_dict().values()] == pointers
    assert torch.equal(net.up[1].conv.weight, other.up[1].conv.weight)
    assert net.up[1].conv.weight.is_contiguous(memory_format=torch.channels_last)


def _changed(config=SMALL, **changes):
    return build_generator(dataclasses.replace(config, **changes)).state_dict()


MISFITS = [
    (lambda: _changed(depth=7), r"unet, depth 7, .*; the model asked for has depth 5", "another depth"),
    (lambda: _changed(ngf=6), "ngf 6, .*; the model asked for has ngf 4", "another width"),
    (lambda: _changed(norm="instance"), "norm instance.*; the model asked for has norm batch", "another norm"),
    (lambda: _changed(out_channels=1), "out_channels 1, .* has out_channels 3", "another output"),
    (lambda: _changed(kind="encoder_decoder"), "kind encoder_decoder.* has kind unet", "no skips"),
    (lambda: _changed(up="resize"), "up resize; the model asked for has up transposed", "other up-blocks"),
    (lambda: build_discriminator(Discriminator(ndf=4)).state_dict(), "a discriminator; .* is a generator", "D for G"),
    (lambda: {"weight": torch.zeros(1)}, r"missing \(46\): .*, .* and 42 more\n.*unexpected \(1\): weight", "foreign"),
    (lambda: {}, r"missing \(46\): down", "empty"),
]


@pytest.mark.parametrize(("state", "match", "why"), MISFITS, ids=[row[-1] for row in MISFITS])
def test_a_misfit_is_explained_and_changes_nothing(state, match, why):
    net = build_generator(SMALL)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(InputError, match=match) as caught:
        load_state(net, state(), "some.file")
    lines = str(caught.value).splitlines()
    assert lines[0] == "some.file does not fit the model"
    assert len(lines) <= 8
    assert max(map(len, lines)) < 200
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_the_difference_word_for_word():
    net, state = build_generator(SMALL), build_generator(SMALL).state_dict()
    state["up.3.conv.weight"] = torch.zeros(16, 2, 4, 4)
    del state["up.0.norm.bias"]
    state["extra"] = torch.zeros(())
    with pytest.raises(InputError) as caught:
        load_state(net, state, "g.safetensors")
    assert str(caught.value).splitlines() == [
        "g.safetensors does not fit the model",
        "  missing (1): up.0.norm.bias",
        "  unexpected (1): extra",
        "  wrong shape (1): up.3.conv.weight: file 16x2x4x4, model 16x4x4x4",
    ]


def _rewrite(path, change):
    """The same tensors with another record."""
    record = read_record(path)
    change(record)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"fastpix2pix": json.dumps(record)})


def _metadata(path, metadata):
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)


def _cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def _architecture(**changes):
    return lambda p: _rewrite(p, lambda r: r["architecture"].update(changes))


BAD_FILES = [
    (lambda p: p.unlink(), "no such file"),
    (lambda p: p.write_bytes(b""), "not a safetensors file, or damaged"),
    (lambda p: p.write_text("hello, this is text"), "not a safetensors file, or damaged"),
    (lambda p: _cut(p, 100), "not a safetensors file, or damaged"),
    (lambda p: _cut(p, -100), "not a safetensors file, or damaged"),
    (lambda p: _metadata(p, None), "without a fastpix2pix record"),
    (lambda p: _metadata(p, {"format": "pt"}), "without a fastpix2pix record"),
    (lambda p: _metadata(p, {"fastpix2pix": "{"}), "damaged record"),
    (lambda p: _metadata(p, {"fastpix2pix": "[1]"}), "damaged record"),
    (lambda p: _metadata(p, {"fastpix2pix": "{}"}), "damaged record .*format"),
    (lambda p: _rewrite(p, lambda r: r.update(format=2)), "format 2, this version reads 1; update fastpix2pix"),
    (lambda p: _rewrite(p, lambda r: r.update(network="vae")), "damaged record"),
    (lambda p: _rewrite(p, lambda r: r.update(network=[])), "damaged record"),
    (lambda p: _rewrite(p, lambda r: r.update(architecture="unet")), "damaged record"),
    (lambda p: _rewrite(p, lambda r: r.update(modes={"noise": "loud"})), "damaged record: noise = 'loud'"),
    (lambda p: _rewrite(p, lambda r: r.update(modes="image")), "damaged record"),
    (_architecture(depth="8"), "damaged record"),
    (_architecture(depth=99), "damaged record: depth = 99"),
    (_architecture(norm=3), "damaged record|does not fit"),
    (_architecture(attention=True), "damaged record: unknown Generator fields attention"),
    (_architecture(ngf=10**6), "ngf 4, .* has ngf 1000000"),
    (_architecture(ngf=10**18), "damaged record"),
    (_architecture(depth=6), "depth 5, .* has depth 6"),
]


@pytest.mark.parametrize(("spoil", "match"), BAD_FILES)
def test_bad_files_are_refused(spoil, match, tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(path, build_generator(SMALL))
    spoil(path)
    with pytest.raises(InputError, match=match) as caught:
        load_network(path)
    assert str(caught.value).startswith(str(path))
    assert "does not fit" in str(caught.value) or "\n" not in str(caught.value)


def test_running_statistics_recorded_for_instance_norm_are_refused(tmp_path):
    save_network(tmp_path / "g.safetensors", Unet(Generator(depth=5, ngf=2, norm="instance")), modes=Modes("running"))
    with pytest.raises(InputError, match=r"g\.safetensors: damaged record: .*no running statistics"):
        load_network(tmp_path / "g.safetensors")


def test_the_other_network_is_refused(tmp_path):
    save_network(tmp_path / "d.safetensors", PatchGAN(Discriminator(ndf=2)))
    save_network(tmp_path / "g.safetensors", Unet(Generator(depth=5, ngf=2)))
    assert isinstance(load_network(tmp_path / "d.safetensors", "discriminator")[0], PatchGAN)
    for load in (lambda p: load_network(p, "generator"), load_generator):
        with pytest.raises(InputError, match=r"d\.safetensors is a discriminator; a generator is wanted"):
            load(tmp_path / "d.safetensors")
    with pytest.raises(InputError, match="is a generator; a discriminator is wanted"):
        load_network(tmp_path / "g.safetensors", "discriminator")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "g.safetensors"
    save_network(path, build_generator(SMALL))
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_network(path, build_generator(SMALL), step=object())
    assert path.read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(EnvironmentFailed, match=r"cannot write .*folder"):
        save_network(tmp_path / "folder", build_generator(SMALL))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "g.safetensors"]


def test_load_generator_finds_the_model_of_a_run(tmp_path):
    net = build_generator(SMALL)
    with pytest.raises(InputError, match=r"no best\.safetensors and no finished checkpoint"):
        load_generator(tmp_path)
    for step in (900, 1000, 50):  # as text, 900 would come last
        save_network(tmp_path / "checkpoints" / str(step) / "generator.safetensors", net, step=step)
    save_network(tmp_path / "checkpoints" / ".2000.tmp-1" / "generator.safetensors", net, step=2000)
    (tmp_path / "checkpoints" / "3000").mkdir()  # no generator in it
    assert load_generator(tmp_path)[1]["step"] == 1000
    save_network(tmp_path / "best.safetensors", net, step=700, modes=Modes("running"))
    found, record = load_generator(tmp_path)
    assert record["step"] == 700
    assert found.modes == Modes("running")
    assert not found.training
    assert load_generator(str(tmp_path), "latest")[1]["step"] == 1000
    for name in ("50", "50/generator.safetensors"):  # one checkpoint, as folder and as file
        assert load_generator(tmp_path / "checkpoints" / name)[1]["step"] == 50
    critic = build_discriminator(Discriminator(ndf=4))
    save_network(tmp_path / "checkpoints" / "50" / "discriminator.safetensors", critic, step=50)
    assert load_discriminator(tmp_path / "checkpoints" / "50")[1]["step"] == 50


@pytest.mark.parametrize("model", [None, 7, build_generator(SMALL)], ids=["None", "int", "Unet"])
def test_what_is_no_path_is_refused_by_its_type(model):
    for load in (load_generator, load_discriminator):
        with pytest.raises(InputError, match=f"model is of type {type(model).__name__}: give the path of a run folder"):
            load(model)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("none.safetensors", "no such file; a model is a run folder, a .safetensors file or a junyanz .pth"),
        ("run", "no such file; a model is a run folder"),
        ("model.pt", "unknown kind of model; allowed are a run folder, .safetensors and junyanz .pth"),
    ],
)
def test_load_generator_refuses(name, match, tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(InputError, match=match):
        load_generator(tmp_path / name)
    with pytest.raises(InputError, match="which = 'worst': allowed are best, latest"):
        load_generator(tmp_path, "worst")

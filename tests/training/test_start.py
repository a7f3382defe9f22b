"""Runs that start from the weights of models."""

import re

import pytest
import torch
from torch.nn import Module

from fastpix2pix import cli
from fastpix2pix.config import Generator, train_config
from fastpix2pix.errors import InputError
from fastpix2pix.model import build_generator
from fastpix2pix.model.junyanz import save_pth
from fastpix2pix.model.weights import save_network
from fastpix2pix.training import checkpoint
from fastpix2pix.training.loop import train
from fastpix2pix.training.record import recorded_config, replace_options
from fastpix2pix.training.start import defaults_of_models, start_from_models
from fastpix2pix.training.state import State
from fastpix2pix.training.step import build_state

CPU = torch.device("cpu")
SMALL = {"depth": 5, "ngf": 4, "ndf": 4, "n_layers": 1, "crop_size": 32}


def make(**options) -> State:
    return build_state(train_config(**SMALL, **options), CPU)


def assert_equal(a: Module, b: Module) -> None:
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture
def models(tmp_path) -> tuple[State, dict[str, str]]:
    """Networks of another seed, and where they lie as junyanz's files."""
    other = make(seed=5)
    other.generator.down[1].norm.running_mean.fill_(0.3)
    save_pth(tmp_path / "latest_net_G.pth", other.generator)
    save_pth(tmp_path / "latest_net_D.pth", other.discriminator)
    names = {"init": "latest_net_G.pth", "init_discriminator": "latest_net_D.pth"}
    return other, {option: str(tmp_path / name) for option, name in names.items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"ema": 0.9}, {"step": "explicit", "impl": "reference", "precision": "bf16"}],
    ids=["modules", "average", "explicit"],
)
def test_networks_have_the_weights_of_the_models(models, options):
    other, paths = models
    state = make(**options)
    said = start_from_models(state, train_config(**SMALL, **options, **paths))
    assert said == [
        f"generator: starts from {paths['init']}; taken over: depth 5, ngf 4",
        f"discriminator: starts from {paths['init_discriminator']}; taken over: ndf 4, n_layers 1",
    ]
    assert_equal(other.generator, state.model)
    assert_equal(other.generator, state.generator)
    assert_equal(other.discriminator, state.discriminator)
    if "step" in options:  # the half copies that convolutions read
        for net, arena in ((other.generator, state.arena_g), (other.discriminator, state.arena_d)):
            for name, parameter in net.named_parameters():
                wanted = parameter.detach().to(arena.compute[name].dtype)
                torch.testing.assert_close(arena.compute[name], wanted, rtol=0, atol=0, msg=name)


def test_each_may_be_given_alone(models):
    other, paths = models
    state, random = make(), make()
    start_from_models(state, train_config(**SMALL, init_discriminator=paths["init_discriminator"]))
    assert_equal(random.generator, state.generator)
    assert_equal(other.discriminator, state.discriminator)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init": "D"}, r"D\.pth is a discriminator; a generator is wanted"),
        ({"init_discriminator": "G"}, r"G\.pth is a generator; a discriminator is wanted"),
        ({"init": "G", "ngf": 8}, r"G\.pth does not fit the model\n.*ngf"),
        ({"init_discriminator": "D", "n_layers": 2}, r"D\.pth does not fit the model\n.*n_layers"),
        ({"init": "nothing"}, "nothing.pth: no such file"),
    ],
)
def test_refusals_leave_no_run(models, options, says, tmp_path, pairs):
    given = {k: str(tmp_path / f"latest_net_{v}.pth") if k.startswith("init") else v for k, v in options.items()}
    with pytest.raises(InputError, match=says):
        train(pairs, tmp_path / "run", **SMALL | given, max_steps=1, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def unusual(tmp_path) -> dict[str, str]:
    """A model trained BtoA whose networks are not the default ones."""
    other = make(seed=5, norm="instance", dropout="none", direction="BtoA")
    save_network(tmp_path / "g.safetensors", other.generator, direction="BtoA", step=7)
    save_network(tmp_path / "d.safetensors", other.discriminator, step=7)
    return {"init": str(tmp_path / "g.safetensors"), "init_discriminator": str(tmp_path / "d.safetensors")}


def test_networks_and_direction_are_the_models(unusual, models, tmp_path):
    network = {"depth": 5, "ngf": 4, "norm": "instance", "dropout": "none"}
    critic = {"ndf": 4, "n_layers": 1, "norm": "instance"}
    g, d = unusual.values()
    assert defaults_of_models(None, None) == train_config()
    assert defaults_of_models(g, None) == train_config(**network, direction="BtoA")
    assert defaults_of_models(None, d) == train_config(**critic)
    assert defaults_of_models(g, d) == train_config(**network | critic, direction="BtoA")
    theirs = defaults_of_models(models[1]["init"], None)  # a .pth has no direction
    assert theirs == train_config(depth=5, ngf=4, dropout="junyanz")
    save_network(tmp_path / "deep.safetensors", build_generator(Generator(depth=9, ngf=1)))
    assert defaults_of_models(str(tmp_path / "deep.safetensors"), None).data.crop_size == 512


@pytest.mark.parametrize("given", [{}, {"direction": "AtoB", "dropout": "paper"}])
def test_options_given_are_respected(unusual, given, tmp_path, pairs, capsys):
    options = {"crop_size": 32, "workers": 0, "tensorboard": False, "device": "cpu", "max_steps": 1}
    train(pairs, tmp_path / "run", **options, **unusual, **given)
    config, said = recorded_config(tmp_path / "run"), capsys.readouterr().err
    assert (config.data.direction, config.generator.dropout) == tuple(given.values() or ("BtoA", "none"))
    assert (config.generator.norm, config.n_layers) == ("instance", 1)
    network = "depth 5, ngf 4, norm instance"
    if given:
        assert f"(step 7); taken over: {network}\n" in said
        assert f"warning: direction = AtoB, but {unusual['init']} was trained BtoA" in said
    else:
        assert f"(step 7); taken over: direction BtoA, {network}, dropout none\n" in said
        assert "was trained" not in said


def test_the_command_line_takes_the_same_over(unusual, tmp_path):
    words = ["train", "data", "--out", str(tmp_path / "run"), "--crop-size=32"]
    for option, path in unusual.items():
        words += [f"--{option.replace('_', '-')}", path]
    assert cli.parse(words).training == replace_options(defaults_of_models(**unusual), {**unusual, "crop_size": 32})
    assert cli.parse([*words, "--direction=AtoB"]).training.data.direction == "AtoB"


def test_an_objective_without_a_discriminator_takes_none():
    with pytest.raises(InputError, match=r"init_discriminator = x: objective = l1 has no discriminator"):
        train_config(objective="l1", init_discriminator="x")


def test_a_run_goes_on_from_a_run_and_is_resumed_without_it(tmp_path, pairs, small, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    small |= {"validate_epochs": 0, "checkpoint_steps": 1}
    train(pairs, first, **small, seed=3, max_steps=2, quiet=True)
    train(pairs, second, **small, init=first, init_discriminator=first, max_steps=1)
    said = capsys.readouterr().err
    assert re.search(rf"generator: starts from {first} \(step 2\); taken over: direction AtoB, depth 5, ngf 4", said)
    assert f"discriminator: starts from {first}" in said
    assert recorded_config(second).init == str(first)
    before, after = (checkpoint.newest(run) / "discriminator.safetensors" for run in (first, second))
    assert before.read_bytes() != after.read_bytes()
    first.rename(tmp_path / "gone")
    assert train(pairs, second, resume=True, max_steps=2, quiet=True).step == 2

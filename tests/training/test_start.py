"""Runs that start from the weights of models."""

import re

import pytest
import torch
from torch.nn import Module

from fastpix2pix.config import train_config
from fastpix2pix.errors import InputError
from fastpix2pix.model.junyanz import save_pth
from fastpix2pix.training import checkpoint
from fastpix2pix.training.loop import train
from fastpix2pix.training.record import recorded_config
from fastpix2pix.training.start import start_from_models
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
        f"generator: starts from {paths['init']}",
        f"discriminator: starts from {paths['init_discriminator']}",
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


def test_an_objective_without_a_discriminator_takes_none():
    with pytest.raises(InputError, match=r"init_discriminator = x: objective = l1 has no discriminator"):
        train_config(objective="l1", init_discriminator="x")


def test_a_run_goes_on_from_a_run_and_is_resumed_without_it(tmp_path, pairs, small, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    small |= {"validate_epochs": 0, "checkpoint_steps": 1}
    train(pairs, first, **small, seed=3, max_steps=2, quiet=True)
    train(pairs, second, **small, init=first, init_discriminator=first, max_steps=1)
    said = capsys.readouterr().err
    assert re.search(rf"generator: starts from {first} \(step 2, direction AtoB\)", said)
    assert f"discriminator: starts from {first}" in said
    assert recorded_config(second).init == str(first)
    before, after = (checkpoint.newest(run) / "discriminator.safetensors" for run in (first, second))
    assert before.read_bytes() != after.read_bytes()
    first.rename(tmp_path / "gone")
    assert train(pairs, second, resume=True, max_steps=2, quiet=True).step == 2

"""Checkpoints: complete or absent, and refused in one line where damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpix2pix.config import train_config
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.training import checkpoint
from fastpix2pix.training.step import build_state

CPU = torch.device("cpu")
OPTIONS = {"depth": 5, "ngf": 4, "ndf": 4, "crop_size": 32, "n_layers": 1}


def trained(steps: int = 3, **options):
    config = train_config(**OPTIONS, **options)
    state = build_state(config, CPU)
    more_steps(state, 0, steps)
    return config, state


def more_steps(state, start: int, stop: int) -> list[list[float]]:
    draws = torch.Generator().manual_seed(9)
    batches = [torch.rand(2, 2, 3, 32, 32, generator=draws) * 2 - 1 for _ in range(stop)]
    return [state.step(*batches[s], s, 2e-4).tolist() for s in range(start, stop)]


def write(folder, state, step: int = 3) -> None:
    checkpoint.save(folder, state, {"step": step}, {"sums": torch.ones(4)}, {"step": step, "direction": "AtoB"})


@pytest.mark.parametrize("options", [{}, {"pool": 3}, {"ema": 0.9}, {"precision": "fp16"}, {"objective": "l1"}])
def test_restored_state_continues_bit_for_bit(tmp_path, options):
    config, state = trained(**options)
    write(tmp_path / "checkpoints" / "00000003", state)
    expected = more_steps(state, 3, 6)

    other = build_state(config, CPU)
    torch.manual_seed(123)  # the restored random state must win
    counters, tensors = checkpoint.restore(tmp_path / "checkpoints" / "00000003", other)
    assert counters == {"step": 3}
    assert torch.equal(tensors["sums"], torch.ones(4))
    assert more_steps(other, 3, 6) == expected
    for a, b in zip(state.generator.state_dict().values(), other.generator.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(state.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_moments_take_the_layout_of_their_parameters(tmp_path):
    config, state = trained()
    write(tmp_path / "3", state)
    other = build_state(config, CPU)
    checkpoint.restore(tmp_path / "3", other)
    for p in other.generator.parameters():
        assert other.adam_g.state[p]["exp_avg"].stride() == p.stride()


def test_newest_counts_and_ignores_what_is_unfinished(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("00000009", "00000100", ".00000200.tmp-17", "notes"):
        (folder / name).mkdir(parents=True)
    assert checkpoint.newest(tmp_path) == folder / "00000100"
    checkpoint.prune(tmp_path, 1)
    assert sorted(p.name for p in folder.iterdir()) == [".00000200.tmp-17", "00000100", "notes"]
    assert checkpoint.newest(tmp_path / "elsewhere") is None


def test_saving_the_same_step_again_replaces_it(tmp_path):
    _, state = trained()
    write(tmp_path / "checkpoints" / "3", state, step=3)
    write(tmp_path / "checkpoints" / "3", state, step=4)
    assert json.loads((tmp_path / "checkpoints" / "3" / "training.json").read_text())["counters"] == {"step": 4}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize(
    "file", ["training.safetensors", "training.json", "generator.safetensors", "discriminator.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_checkpoint_is_refused_by_name(tmp_path, file, damage):
    config, state = trained()
    write(tmp_path / "3", state)
    path = tmp_path / "3" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    with pytest.raises(InputError, match=str(tmp_path / "3")):
        checkpoint.restore(tmp_path / "3", build_state(config, CPU))


def test_failing_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    _, state = trained()
    folder = tmp_path / "checkpoints"
    write(folder / "3", state)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(EnvironmentFailed, match="No space left on device; free some space"):
        write(folder / "4", state)
    assert [p.name for p in folder.iterdir()] == ["3"]


@pytest.mark.parametrize("options", [{"step": "modules"}, {"step": "explicit", "impl": "reference"}], ids=str)
def test_a_state_saved_in_another_precision_gets_a_fresh_loss_scale(tmp_path, options):
    _, state = trained(**options, precision="fp32")
    write(tmp_path / "3", state)
    half = build_state(train_config(**OPTIONS, **options, precision="fp16"), CPU)
    fresh = {k: t.clone() for k, t in half.tensors().items() if k in ("scaler", "scale", "growth")}
    checkpoint.restore(tmp_path / "3", half)
    assert fresh
    assert [k for k, t in fresh.items() if not torch.equal(half.tensors()[k], t)] == []
    for a, b in zip(state.generator.parameters(), half.generator.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.tensor(more_steps(half, 3, 5)).isfinite().all()


def test_only_of_a_damaged_checkpoint_it_is_said_to_remove_it(tmp_path):
    config, state = trained()
    write(tmp_path / "3", state)
    path = tmp_path / "3" / "training.safetensors"
    tensors = load_file(path)
    del tensors["rng/cpu"]
    save_file(tensors, path)
    with pytest.raises(
        InputError, match=r"3: the checkpoint has no 'rng/cpu', .* resume with the version that wrote it"
    ):
        checkpoint.restore(tmp_path / "3", build_state(config, CPU))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"3: incomplete or damaged checkpoint .*; remove this folder"):
        checkpoint.restore(tmp_path / "3", build_state(config, CPU))


def test_what_a_killed_save_leaves_is_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "checkpoints"
    left = (".00000100.tmp-17-140011", ".00000100.tmp-17-140011.old", ".00000090.old")
    kept = (
        ".00000100",
        ".tmp-17-140011",
        ".00000100.tmp-17",
        ".00000100.olds",
        "00000100.old",
        ".notes.old",
        "00000100",
    )
    for name in (*left, *kept):
        (folder / name / "inside").mkdir(parents=True)
    (tmp_path / ".00000100.old").mkdir()
    checkpoint.tidy(tmp_path)
    assert {p.name for p in folder.iterdir()} == set(kept)
    assert (tmp_path / ".00000100.old").is_dir()
    checkpoint.tidy(tmp_path / "elsewhere")


def test_a_checkpoint_whose_replacement_was_killed_between_the_renames_comes_back(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / ".00000100.tmp-17-140011" / "new").mkdir(parents=True)
    (folder / ".00000100.tmp-17-140011.old" / "before").mkdir(parents=True)
    checkpoint.tidy(tmp_path)
    assert [p.name for p in folder.iterdir()] == ["00000100"]
    assert [p.name for p in checkpoint.newest(tmp_path).iterdir()] == ["before"]

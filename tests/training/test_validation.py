"""Which modes are tried, and which are chosen."""

import torch

from fastpix2pix.config import Data, Generator, Modes
from fastpix2pix.data.pairs import find_pairs
from fastpix2pix.model import build_generator
from fastpix2pix.training import validation

CPU = torch.device("cpu")


def names(**options) -> list[str]:
    return [str(m) for m in validation.candidates(build_generator(Generator(depth=5, ngf=2, **options)))]


def test_candidates_are_the_modes_that_make_a_difference():
    assert names() == ["image+off", "running+off", "image+random", "running+random"]
    assert names(dropout="none") == ["image+off", "running+off"]
    assert names(norm="instance") == ["image+off", "image+random"]
    assert names(norm="none", dropout="none") == ["image+off"]


def test_best_modes_by_each_metric():
    table = {
        "image+off": {"l1": 0.2, "psnr": 12.0},
        "running+off": {"l1": 0.1, "psnr": 12.0},
    }
    assert validation.best_modes(table, "l1") == (Modes("running", "off"), 0.1)
    assert validation.best_modes(table, "psnr") == (Modes("image", "off"), 12.0)  # the earlier wins a tie


def test_better_is_strict_and_knows_its_direction():
    assert validation.better(0.2, None, "l1")
    assert validation.better(0.1, 0.2, "l1")
    assert not validation.better(0.2, 0.2, "l1")
    assert validation.better(0.3, 0.2, "ssim")


def test_samples_and_table_leave_network_and_random_numbers_alone(pairs):
    net = build_generator(Generator(depth=5, ngf=2)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    numbers = torch.get_rng_state()
    check = validation.Validation(find_pairs(pairs, "val"), Data(crop_size=32), net, CPU)
    table = check.table(net)
    sheet = check.samples(net, Modes())
    assert set(table) == {"image+off", "running+off", "image+random", "running+random"}
    assert sheet.shape == (3 * 36 - 4, 3 * 36 - 4, 3)
    assert net.training
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_validation_that_does_not_fit_into_memory_is_read_again(pairs, monkeypatch):
    net = build_generator(Generator(depth=5, ngf=2))
    kept = validation.Validation(find_pairs(pairs, "val"), Data(crop_size=32), net, CPU)
    monkeypatch.setattr(validation, "_CACHED", 0)
    fresh = validation.Validation(find_pairs(pairs, "val"), Data(crop_size=32), net, CPU)
    assert fresh.table(net) == kept.table(net)
    assert fresh._decoded is None

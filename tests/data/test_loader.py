"""What a batch holds depends on pairs, options, seed and number alone: not on workers, chunks or where one starts."""

import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix.config import Data
from fastpix2pix.data import jitter
from fastpix2pix.data.batches import CHUNK, Feed
from fastpix2pix.data.loader import choose_loader, training_batches, validation_batches
from fastpix2pix.data.pairs import Pair, find_pairs
from fastpix2pix.data.torch_loader import _chunk_limit
from fastpix2pix.errors import EnvironmentFailed, InputError

RNG = np.random.default_rng(0)
DATA = Data(crop_size=32, loader="torch", workers=0)  # load 36
COUNT = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for k in range(COUNT):
        half = RNG.integers(0, 256, (2, 40 + k, 30, 3), np.uint8)
        Image.fromarray(np.concatenate(list(half), axis=1)).save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def pairs(root) -> list[Pair]:
    return find_pairs(root, "train")


def feed(pairs, data=DATA, *, channels=(3, 3), batch=2, seed=5, start=0, stop=12, device="cpu") -> Feed:
    options = {"in_channels": channels[0], "out_channels": channels[1], "batch": batch, "seed": seed}
    return Feed(pairs=pairs, data=data, **options, start=start, stop=stop, device=torch.device(device))


def batches(*args, **options):
    return training_batches(feed(*args, **options))


def joined(found) -> tuple[torch.Tensor, torch.Tensor]:
    found = list(found)
    return torch.cat([b.input for b in found]), torch.cat([b.target for b in found])


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(joined(one), joined(other), strict=True))


def expected(pairs: list[Pair], p: int, seed: int, mode: str = "RGB") -> list[np.ndarray]:
    """Position p by the definition, through Pillow alone: [A, B] as [C, crop, crop]."""
    epoch, rank = divmod(p, len(pairs))
    index = int(np.argsort(np.random.Philox(key=[seed, 0], counter=[0, 0, epoch, 1]).random_raw(len(pairs)))[rank])
    y, x, side = (int(r) for r in np.random.Philox(key=[seed, 0], counter=[0, index, epoch, 0]).random_raw(3))
    y, x, flip = (y * 5) >> 64, (x * 5) >> 64, side >> 63
    image = Image.open(pairs[index].a)
    halves = []
    for left in (0, image.width // 2):
        half = (
            image.crop((left, 0, left + image.width // 2, image.height)).convert(mode).resize((36, 36), Image.BICUBIC)
        )
        half = half.crop((x, y, x + 32, y + 32))
        half = half.transpose(Image.FLIP_LEFT_RIGHT) if flip else half
        halves.append(np.asarray(half).reshape(32, 32, -1).transpose(2, 0, 1))
    return halves


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_batches_equal_the_definition(pairs, direction):
    source, target = joined(batches(pairs, Data(crop_size=32, direction=direction, loader="torch", workers=0)))
    assert len(source) == 24  # three epochs of 7 and a bit: batches run over their ends
    for p in range(24):
        a, b = expected(pairs, p, seed=5)
        if direction == "BtoA":
            a, b = b, a
        np.testing.assert_array_equal(source[p], a)
        np.testing.assert_array_equal(target[p], b)


def test_layout_and_type(pairs):
    for batch in batches(pairs, channels=(1, 4), batch=3, stop=2):
        assert batch.input.shape == (3, 1, 32, 32)
        assert batch.target.shape == (3, 4, 32, 32)
        for tensor in batch:
            assert tensor.dtype == torch.uint8
            assert tensor.is_contiguous(memory_format=torch.channels_last)
    source, _ = joined(batches(pairs, channels=(1, 4)))
    np.testing.assert_array_equal(source[9], expected(pairs, 9, 5, "L")[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(pairs, workers):
    data = Data(crop_size=32, loader="torch", workers=workers)
    assert same(batches(pairs, stop=40), batches(pairs, data, stop=40))


@pytest.mark.parametrize("start", [1, 3, 7, 11])
def test_start_changes_nothing(pairs, start):
    source, target = joined(batches(pairs))
    later = joined(batches(pairs, start=start))
    assert torch.equal(later[0], source[2 * start :])
    assert torch.equal(later[1], target[2 * start :])


@pytest.mark.parametrize("batch", [1, 3, 8, 24])  # 8 and 24 are more than the pairs there are
def test_batch_size_only_slices(pairs, batch):
    assert same(batches(pairs, batch=2, stop=12), batches(pairs, batch=batch, stop=24 // batch))


def test_seed_and_flip_matter(pairs):
    assert not same(batches(pairs), batches(pairs, seed=6))
    assert not same(batches(pairs), batches(pairs, Data(crop_size=32, flip=False, loader="torch", workers=0)))
    assert list(batches(pairs, start=3, stop=3)) == []
    with pytest.raises(InputError, match="no pairs to train on"):
        next(batches([]))


def test_both_halves_get_the_same_numbers(tmp_path):
    for k in range(3):
        half = RNG.integers(0, 256, (50, 45, 3), np.uint8)
        Image.fromarray(np.concatenate((half, half), axis=1)).save(tmp_path / f"{k}.png")
    source, target = joined(batches(find_pairs(tmp_path, "train"), stop=20))
    assert torch.equal(source, target)
    assert len(torch.unique(source, dim=0)) > 30  # and they are different ones from item to item


def test_loading_leaves_the_global_random_state_alone(pairs):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(batches(pairs, Data(crop_size=32, loader="torch", workers=workers), stop=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("start", "stop", "batch"), [(0, 100, 1), (5, 6, 1), (3, 50, 4), (0, 9, 32), (0, 5, 100), (2, 2, 1)]
)
def test_chunks_cover_every_position_once(start, stop, batch):
    ranges = list(feed([], start=start, stop=stop, batch=batch).chunks())
    assert [p for lo, hi in ranges for p in range(lo, hi)] == list(range(start * batch, stop * batch))
    sizes = [hi - lo for lo, hi in ranges]
    assert all(size % batch == 0 and size <= max(CHUNK, batch) for size in sizes)
    assert sizes[:1] == [batch][: stop - start]  # the first step waits for one batch


def test_chunks_fit_in_shared_memory():
    free = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    assert _chunk_limit(6 * 256**2, 1, workers=0) == CHUNK
    assert _chunk_limit(1, 1, workers=2) == CHUNK
    assert 3 <= _chunk_limit(free // 40, 1, workers=2) <= 5  # half of it, two workers, two chunks each: 5
    with pytest.raises(
        EnvironmentFailed, match=r"/dev/shm has \d+ MB free, and 4 .* enlarge it \(docker: --shm-size\)"
    ):
        _chunk_limit(free // 40, 8, workers=4)


def test_default_workers():
    cores = len(os.sched_getaffinity(0))
    assert feed([], Data()).workers == min(max(cores - 1, 1), 8)
    assert feed([], Data(workers=0)).workers == 0
    assert feed([], Data(workers=20)).workers == 20


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "not a readable image"),
        (lambda p: Image.new("RGB", (61, 40)).save(p), "needs an even width, not 61"),
        (lambda p: p.unlink(), "No such file"),
    ],
)
def test_a_broken_file_is_named(tmp_path, workers, break_it, message):
    for k in range(COUNT):
        Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / f"{k}.png")
    found = find_pairs(tmp_path, "train")
    broken = jitter.item(5, 4, COUNT)[1]  # in the third batch
    break_it(found[broken].a)
    running = batches(found, Data(crop_size=32, loader="torch", workers=workers))
    with pytest.raises(InputError, match=rf"^[^\n]*/{broken}\.png: .*{message}[^\n]*$"):
        list(running)
    assert not multiprocessing.active_children()


def test_closing_ends_the_workers(pairs):
    running = batches(pairs, Data(crop_size=32, loader="torch", workers=2), stop=10**6)
    next(running)
    assert len(multiprocessing.active_children()) == 2
    running.close()
    assert not multiprocessing.active_children()


def test_workers_outlive_the_group_s_signals_but_not_a_kill(pairs):
    """Ctrl-C and a batch system's SIGTERM reach the workers, too: they must go on until the trainer has finished."""
    running = batches(pairs, Data(crop_size=32, loader="torch", workers=2), stop=10**6)
    found = [next(running)]
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    found += itertools.islice(running, 400)
    assert same(found[:12], batches(pairs))
    assert all(worker.is_alive() for worker in workers)
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"(?s)worker.*(died|killed)"):  # torch's signal handler may raise right here
        for _ in running:
            pass
    running.close()
    assert not multiprocessing.active_children()


def test_choose_loader(pairs, tmp_path):
    def choose(loader, device, channels=(3, 3), among=pairs):
        return choose_loader(Data(loader=loader), among, device, *channels)

    pytest.importorskip("nvidia.dali")
    assert choose("torch", "cuda") == ("torch", "asked for")
    assert choose("auto", "cpu") == ("torch", "on a CPU, Pillow is faster than DALI")
    assert choose("auto", "cuda:0") == ("dali", "decodes on the GPU")
    assert choose("dali", torch.device("cpu")) == ("dali", "asked for")
    assert choose("auto", "cuda", (1, 3)) == ("torch", "not DALI: 1 + 3 channels, it takes 3 + 3")
    Image.new("RGBA", (8, 8)).save(tmp_path / "x.png")
    Image.new("L", (8, 8)).save(tmp_path / "y.bmp")
    refused = r"1 \+ 3 channels.*; RGBA images \(x\.png\); BMP files \(y\.bmp\)\. Use loader = 'torch'"
    for run in (choose, lambda *a: next(batches(a[3], Data(loader="dali"), channels=a[2]))):
        with pytest.raises(EnvironmentFailed, match=refused):
            run("dali", "cpu", (1, 3), find_pairs(tmp_path, "train"))


def test_choose_loader_without_dali(pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # as Python marks what cannot be imported
    name, reason = choose_loader(Data(), pairs, "cuda", 3, 3)
    assert name == "torch"
    assert "nvidia.dali cannot be imported" in reason
    with pytest.raises(EnvironmentFailed, match="pip install nvidia-dali-cuda130"):
        choose_loader(Data(loader="dali"), pairs, "cpu", 3, 3)


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_validation_batches(pairs, batch):
    found = list(validation_batches(pairs, "BtoA", 3, 1, 24, batch, "cpu"))
    assert [len(b.input) for b in found] == [min(batch, COUNT - i) for i in range(0, COUNT, batch)]
    source, target = joined(found)
    assert target.shape == (COUNT, 1, 24, 24)
    assert all(b.input.is_contiguous(memory_format=torch.channels_last) for b in found)
    for k, pair in enumerate(pairs):
        image = Image.open(pair.a)
        a, b = image.crop((0, 0, 30, 40 + k)), image.crop((30, 0, 60, 40 + k))
        np.testing.assert_array_equal(source[k].permute(1, 2, 0), np.asarray(b.resize((24, 24), Image.BICUBIC)))
        np.testing.assert_array_equal(target[k, 0], np.asarray(a.convert("L").resize((24, 24), Image.BICUBIC)))


def test_validation_names_a_broken_file_and_closes(pairs, tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.png: not an image"):
        list(validation_batches([*pairs, Pair("x", tmp_path / "x.png", None)], "AtoB", 3, 3, 24, 2, "cpu"))
    running = validation_batches(pairs, "AtoB", 3, 3, 24, 2, "cpu")
    next(running)
    running.close()
    assert list(validation_batches([], "AtoB", 3, 3, 24, 2, "cpu")) == []


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_the_gpu(pairs, workers):
    data = Data(crop_size=32, loader="torch", workers=workers)
    found = list(batches(pairs, data, device="cuda"))
    assert all(b.input.is_cuda and b.input.is_contiguous(memory_format=torch.channels_last) for b in found)
    assert same([type(b)(b.input.cpu(), b.target.cpu()) for b in found], batches(pairs))


def test_facades_through_workers(facades):
    pairs = find_pairs(facades, "train")[:40]
    data = Data(direction="BtoA", loader="torch", workers=2)
    assert same(
        batches(pairs, data, stop=24), batches(pairs, Data(direction="BtoA", loader="torch", workers=0), stop=24)
    )

import dataclasses
import os
import stat

import pytest

from fastpix2pix.config import Form, Generator, Modes
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.runtime.engine_cache import EngineCache, default_folder, key_of
from fastpix2pix.runtime.plan import read_plan, sidecar, write_plan

ENGINE = b"x" * 1000


def make(path, engine=ENGINE):
    write_plan(
        path, engine, model="0" * 64, record={"architecture": dataclasses.asdict(Generator(depth=5, ngf=4))},
        modes=Modes(), form=Form(), sizes=((32, 32),), batches=(1,), target="tensorrt-rtx", version="1", gpu=None,
        capabilities=("sm80",), stripped=False, parity={},
    )  # fmt: skip


class Maker:
    """Counts how often an engine is built."""

    def __init__(self):
        self.count = 0

    def __call__(self, path):
        self.count += 1
        make(path)


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache" / "engines")


def test_an_engine_is_built_once(cache):
    maker = Maker()
    assert cache.get("a", maker) == cache.get("a", maker)
    assert maker.count == 1
    cache.get("b", maker)
    assert maker.count == 2


@pytest.mark.parametrize("damage", ["engine", "sidecar", "both"])
def test_a_damaged_engine_is_built_again(cache, damage):
    path = cache.get("a", make)
    if damage in ("engine", "both"):
        path.write_bytes(b"y")
    if damage in ("sidecar", "both"):
        sidecar(path).unlink()
    maker = Maker()
    assert cache.get("a", maker) == path
    assert maker.count == 1
    assert read_plan(path).size == len(ENGINE)


def test_the_least_used_goes_first_with_everything_beside_it(cache):
    one = cache.get("a", make).stat().st_size
    cache.limit = 4 * (one + sidecar(cache.folder / "a.engine").stat().st_size)
    for i, name in enumerate("abcd"):
        path = cache.get(name, make)
        os.utime(path, (i, i))
    beside = cache.folder / "b.engine.kernels"
    beside.write_bytes(b"k")
    cache.get("a", make)  # now the newest
    os.utime(cache.folder / "a.engine", (10, 10))
    cache.get("e", make)
    left = {path.name.split(".")[0] for path in cache.folder.iterdir()}
    assert left == {"a", "c", "d", "e"}
    assert not beside.exists()
    assert cache.size() <= cache.limit


def test_the_newest_stays_even_over_the_limit(cache):
    cache.limit = 1
    cache.get("a", make)
    path = cache.get("b", make)
    assert sorted(p.name for p in cache.folder.iterdir()) == ["b.engine", "b.engine.json"]
    assert path.is_file()


def test_a_build_that_fails_leaves_nothing(cache):
    def fail(path):
        raise EnvironmentFailed("no")

    with pytest.raises(EnvironmentFailed):
        cache.get("a", fail)
    assert list(cache.folder.iterdir()) == []


def test_the_folder_is_its_owners_alone(cache):
    cache.folder.mkdir(parents=True)
    cache.folder.chmod(0o777)
    cache.get("a", make)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(cache):
    cache.folder.mkdir(parents=True)
    os.chown(cache.folder, 12345, 12345)
    with pytest.raises(EnvironmentFailed, match=r"another user.*FASTPIX2PIX_CACHE"):
        cache.get("a", make)


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTPIX2PIX_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "engines"
    monkeypatch.delenv("FASTPIX2PIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(default_folder()) == "/x/fastpix2pix/engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder().parts[-3:] == (".cache", "fastpix2pix", "engines")


def test_the_key_is_of_every_part():
    parts = {"model": "0", "modes": {"seed": 0}, "machine": {"gpu": "A", "version": "1"}}
    assert key_of(**parts) == key_of(**dict(reversed(parts.items())))
    changed = [{**parts, "model": "1"}, {**parts, "modes": {"seed": 1}}, {**parts, "machine": {"gpu": "B"}}]
    assert len({key_of(**p) for p in [parts, *changed]}) == 4

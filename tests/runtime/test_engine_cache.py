import dataclasses
import os
import stat
import subprocess
import sys
import time

import pytest

from fastpix2pix.config import Form, Generator, Modes
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.runtime.engine_cache import EngineCache, key_of
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


def left(cache) -> list[str]:
    """Names of the engines kept; each has its sidecar."""
    engines = sorted(path.name for path in cache.folder.glob("*.engine"))
    assert sorted(path.name for path in cache.folder.glob("*.json")) == [f"{name}.json" for name in engines]
    return engines


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
    assert left(cache) == ["a.engine", "c.engine", "d.engine", "e.engine"]
    assert not beside.exists()
    assert cache.size() <= cache.limit


def test_what_was_just_used_stays_even_over_the_limit(cache):
    """Another process may be about to load it."""
    cache.limit = 1
    old, recent = cache.get("a", make), cache.get("b", make)
    assert left(cache) == ["a.engine", "b.engine"]
    os.utime(old, (time.time() - 70,) * 2)
    assert cache.get("c", make).is_file()
    assert left(cache) == ["b.engine", "c.engine"]
    assert recent.is_file()


def test_a_build_that_fails_leaves_nothing(cache):
    def fail(path):
        raise EnvironmentFailed("no")

    with pytest.raises(EnvironmentFailed):
        cache.get("a", fail)
    assert left(cache) == []


BUILDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_engine_cache import make
from fastpix2pix.runtime.engine_cache import EngineCache

def slow(path):
    with open(path.with_name("builds"), "a") as log:
        log.write("x")
    path.with_name(f".{path.name}.tmp-1-1").write_text("half an engine")
    print("building", flush=True)
    time.sleep(float(sys.argv[3]))
    path.with_name(f".{path.name}.tmp-1-1").unlink()
    make(path)

EngineCache(Path(sys.argv[2])).get("a", slow)
"""


def process(cache, seconds):
    """Another process that asks for the engine "a" and builds it in so many seconds, once it has begun to."""
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", BUILDER, here, str(cache.folder), str(seconds)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert started.stdout.readline() == b"building\n"
    return started


def test_two_processes_build_once(cache):
    other, waits = process(cache, 1), []
    path = cache.get("a", lambda path: pytest.fail("built twice"), lambda: waits.append(1))
    assert other.wait() == 0
    assert waits
    assert read_plan(path).size == len(ENGINE)
    assert (cache.folder / "builds").read_text() == "x"


def test_waiting_can_be_ended(cache):
    def stop():
        raise KeyboardInterrupt

    other = process(cache, 1)
    with pytest.raises(KeyboardInterrupt):
        cache.get("a", make, stop)
    assert other.wait() == 0


def test_a_killed_build_is_made_again(cache):
    other = process(cache, 60)
    other.kill()
    other.wait()
    half = cache.folder / ".a.engine.tmp-1-1"
    assert half.is_file()
    assert read_plan(cache.get("a", make)).size == len(ENGINE)
    os.utime(half, (time.time() - 7200,) * 2)
    cache.get("b", make)
    assert not half.exists()


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
    assert EngineCache().folder == tmp_path / "engines"


def test_the_key_is_of_every_part():
    parts = {"model": "0", "modes": {"seed": 0}, "machine": {"gpu": "A", "version": "1"}}
    assert key_of(**parts) == key_of(**dict(reversed(parts.items())))
    changed = [{**parts, "model": "1"}, {**parts, "modes": {"seed": 1}}, {**parts, "machine": {"gpu": "B"}}]
    assert len({key_of(**p) for p in [parts, *changed]}) == 4

"""FrameRuntime from Python, on the CPU: order, policies, deadlines, failures, threads, signals, memory."""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastpix2pix.errors import InputError
from tests.native.frames import SIZE, Gate, check_sum, frame, runtime


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("engine", (None, lambda input, output: np.copyto(output, input)))
def test_frames_come_back_as_they_were_and_in_order(engine: Callable[..., Any] | None, threads: int) -> None:
    r = runtime(engine, threads=threads)

    def submit() -> None:
        for i in range(200):
            assert r.submit(frame(i), i - 100)
        r.finish()

    submitter = threading.Thread(target=submit)
    submitter.start()
    back = np.empty((*SIZE, 3), np.uint8)
    for i in range(200):
        assert r.collect(back) == i - 100
        np.testing.assert_array_equal(back, frame(i))
    assert r.collect(back) is None and r.drained
    submitter.join()
    assert check_sum(r) == {**dict.fromkeys(r.stats()["frames"], 0), "submitted": 200, "collected": 200}
    for stage in r.stats()["latency"].values():
        assert stage["count"] == 200
        assert 0 <= stage["p50_ms"] <= stage["p95_ms"] <= stage["p99_ms"] <= stage["max_ms"]
    total, compute = r.stats()["latency"]["total"], r.stats()["latency"]["compute"]
    assert total["p50_ms"] >= compute["p50_ms"]
    r.close()


def test_an_engine_gets_the_arrays_of_its_slot() -> None:
    kept: dict[int, Any] = {}

    def engine(input: Any, output: Any) -> None:
        assert input.shape == output.shape == (3, *SIZE) and input.dtype == output.dtype == np.float32
        assert kept.setdefault(input.ctypes.data, (input, output))[0] is input  # the same objects at every call
        np.negative(input, out=output)

    r = runtime(engine, slots=3)
    for i in range(12):
        r.submit(frame(i))
        back = np.empty((*SIZE, 3), np.uint8)
        assert r.collect(back) == 0
        np.testing.assert_array_equal(back, 255 - frame(i))
    assert 1 <= len(kept) <= 3
    r.close()
    del r
    gc.collect()
    assert all(np.isfinite(array).all() for pair in kept.values() for array in pair)  # they own their memory


def test_poll_and_timeouts() -> None:
    gate, back = Gate(), np.empty((*SIZE, 3), np.uint8)
    r = runtime(gate, slots=2, depth=1)
    assert r.poll(back) is None and not r.drained
    start = time.monotonic()
    assert r.collect(back, timeout=0.15) is None
    assert 0.15 <= time.monotonic() - start < 5
    assert r.submit(frame(0), 7) and r.submit(frame(1), 8)
    assert not r.submit(frame(2), 9, timeout=0.02)
    gate.opened.set()
    assert r.collect(back, timeout=10) == 7 and r.collect(back, timeout=float("inf")) == 8
    assert check_sum(r)["submitted"] == 2  # what timed out was not counted


@pytest.mark.parametrize("policy", ("drop-oldest", "drop-newest"))
def test_policies(policy: str) -> None:
    gate, back = Gate(), np.empty((*SIZE, 3), np.uint8)
    r = runtime(gate, slots=3, depth=1, policy=policy)
    assert r.submit(frame(0), 0)
    assert gate.entered.acquire(timeout=10)  # 0 is in work now
    taken = [r.submit(frame(i), i) for i in range(1, 8)]
    gate.opened.set()
    r.finish()
    tags = []
    while (tag := r.collect(back)) is not None:
        tags.append(tag)
        np.testing.assert_array_equal(back, frame(tag))
    frames = check_sum(r)
    if policy == "drop-oldest":
        assert all(taken) and tags == [0, 6, 7] and frames["dropped_oldest"] == 5
    else:
        assert taken == [True] * 2 + [False] * 5 and tags == [0, 1, 2] and frames["dropped_newest"] == 5
    assert frames["submitted"] == 8 and frames["collected"] == 3


def test_block_waits() -> None:
    gate, back = Gate(), np.empty((*SIZE, 3), np.uint8)
    r = runtime(gate, slots=2, depth=2)
    for i in range(2):
        r.submit(frame(i), i)
    done: list[bool] = []
    waiting = threading.Thread(target=lambda: done.append(r.submit(frame(2), 2)))
    waiting.start()
    waiting.join(0.25)  # longer than one step of the wait
    assert not done
    gate.opened.set()
    assert [r.collect(back) for _ in range(3)] == [0, 1, 2]
    waiting.join(10)
    assert done == [True]


def test_deadlines() -> None:
    gate, back = Gate(), np.empty((*SIZE, 3), np.uint8)
    r = runtime(gate, slots=4, depth=1)
    r.submit(frame(0), 0, deadline=60)
    assert gate.entered.acquire(timeout=10)
    r.submit(frame(1), 1, deadline=0)
    r.submit(frame(2), 2, deadline=60)
    time.sleep(0.01)
    gate.opened.set()
    r.finish()
    assert r.collect(back) == 0 and r.collect(back) == 2 and r.collect(back) is None
    assert check_sum(r)["late"] == 1


def test_after_finish() -> None:
    r, back = runtime(), np.empty((*SIZE, 3), np.uint8)
    r.submit(frame(3), 3)
    r.finish()
    r.finish()
    with pytest.raises(InputError, match="submit after finish"):
        r.submit(frame(0))
    assert not r.drained and r.collect(back) == 3 and r.drained
    assert r.collect(back) is None


def test_two_threads_submit_and_two_collect() -> None:
    r = runtime(lambda input, output: np.copyto(output, input), slots=5, depth=3)
    collected: list[int] = []

    def submit(first: int) -> None:
        for tag in range(first, 400, 2):
            assert r.submit(frame(tag), tag)

    def collect() -> None:
        back = np.empty((*SIZE, 3), np.uint8)
        while (tag := r.collect(back)) is not None:
            np.testing.assert_array_equal(back, frame(tag))
            collected.append(tag)

    submitters = [threading.Thread(target=submit, args=(first,)) for first in (0, 1)]
    collectors = [threading.Thread(target=collect) for _ in range(2)]
    for thread in (*submitters, *collectors):
        thread.start()
    for thread in submitters:
        thread.join(60)
    r.finish()
    for thread in collectors:
        thread.join(60)
    assert sorted(collected) == list(range(400))


def test_waiting_leaves_the_interpreter_to_others() -> None:
    """With the GIL held, the counting thread would stand still while collect waits."""
    r, back, count, stop = runtime(), np.empty((*SIZE, 3), np.uint8), [0], threading.Event()

    def counting() -> None:
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=counting)
    thread.start()
    before = count[0]
    assert r.collect(back, timeout=0.2) is None
    assert count[0] - before > 20
    stop.set()
    thread.join()


def test_no_growth_over_20000_frames() -> None:
    r, source, back = runtime(lambda input, output: np.copyto(output, input)), frame(0), frame(1)

    def frames(n: int) -> int:
        for i in range(n):
            assert r.submit(source, i, deadline=60)
            assert r.collect(back, timeout=60) == i
        gc.collect()
        return _resident()

    before = frames(2000)
    assert frames(20_000) - before < 2 * 2**20
    assert r.stats()["frames"]["collected"] == 22_000


def _resident() -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is read from /proc")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_describe() -> None:
    r = runtime(slots=5, depth=3, policy="drop-oldest")
    assert r.describe() == {"device": "cpu", "graph": "none", "slots": 5, "depth": 3, "policy": "drop-oldest"}

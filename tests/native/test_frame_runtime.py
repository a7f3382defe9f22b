"""FrameRuntime from Python, on the CPU: order, policies, deadlines, failures, threads, signals, memory."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.runtime.native import CUDA, FrameRuntime, InputSpec, OutputSpec

SIZE = (6, 10)


def runtime(engine: Callable[..., Any] | None = None, format: str = "rgb", **options: Any) -> FrameRuntime:
    return FrameRuntime(InputSpec(format, SIZE, SIZE), OutputSpec(format, SIZE, SIZE), engine, **options)


def frame(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def check_sum(r: FrameRuntime) -> dict[str, int]:
    frames = dict(r.stats()["frames"])
    assert frames["submitted"] == sum(count for name, count in frames.items() if name != "submitted")
    return frames  # type: ignore[return-value]


class Gate:
    """An engine that copies, once it is let through."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Semaphore(0), threading.Event()

    def __call__(self, input: Any, output: Any) -> None:
        self.entered.release()
        assert self.opened.wait(30)
        output[:] = input


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


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("raised", "message"),
    [(ValueError("seven is odd"), "the engine failed: ValueError: seven is odd"), (Unprintable(), "RuntimeError")],
)
def test_what_an_engine_raises_surfaces_at_the_next_call(raised: Exception, message: str) -> None:
    def engine(input: Any, output: Any) -> None:
        raise raised

    r, back = runtime(engine), np.empty((*SIZE, 3), np.uint8)
    assert r.submit(frame(0))
    with pytest.raises(EnvironmentFailed, match=message):
        r.collect(back)
    with pytest.raises(EnvironmentFailed, match=message):
        r.submit(frame(1))
    with pytest.raises(EnvironmentFailed, match=message):
        r.poll(back)
    frames = check_sum(r)
    assert frames["failed"] == 1 and frames["pending"] == 0
    r.close()


def test_an_engine_with_other_parameters() -> None:
    r = runtime(lambda one: None)
    r.submit(frame(0))
    with pytest.raises(EnvironmentFailed, match=r"TypeError: .*takes 1 positional argument but 2 were given"):
        r.collect(np.empty((*SIZE, 3), np.uint8))


def test_close_with_frames_in_flight() -> None:
    gate = Gate()
    r, back = runtime(gate, slots=4, depth=2), np.empty((*SIZE, 3), np.uint8)
    for i in range(4):
        r.submit(frame(i), i)
    raised: list[Exception] = []

    def collect() -> None:
        try:
            r.collect(back)
        except EnvironmentFailed as error:
            raised.append(error)

    collector = threading.Thread(target=collect)
    collector.start()
    assert gate.entered.acquire(timeout=10)
    threading.Timer(0.05, gate.opened.set).start()
    r.close()  # waits for the engine, which needs the GIL
    collector.join(10)
    assert len(raised) == 1 and "the frame runtime is closed; make a new one" in str(raised[0])
    with pytest.raises(EnvironmentFailed, match="closed"):
        r.submit(frame(0))
    frames = check_sum(r)
    assert frames["abandoned"] == 4 and frames["pending"] == 0
    r.close()


def test_dropping_an_open_runtime_ends_its_threads() -> None:
    before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    for _ in range(5):
        r = runtime(lambda input, output: np.copyto(output, input), threads=2)
        for i in range(4):
            r.submit(frame(i))
        del r
    if before:
        assert len(os.listdir("/proc/self/task")) <= before


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


INTERRUPTED = """
import signal, numpy as np
from fastpix2pix.runtime.native import FrameRuntime, InputSpec, OutputSpec
r = FrameRuntime(InputSpec("rgb", (4, 4), (4, 4)), OutputSpec("rgb", (4, 4), (4, 4)), None, slots=2)
print("ready", flush=True)
try:
    WAIT
except KeyboardInterrupt:
    print("interrupted", r.stats()["frames"]["pending"], flush=True)
"""
EXITING = """
import time, threading, numpy as np
from fastpix2pix.runtime.native import FrameRuntime, InputSpec, OutputSpec
entered = threading.Event()
def engine(input, output):
    entered.set()
    time.sleep(0.2)
    output[:] = input
r = FrameRuntime(InputSpec("rgb", (4, 4), (4, 4)), OutputSpec("rgb", (4, 4), (4, 4)), engine)
for i in range(3):
    r.submit(bytes(48))
entered.wait()
print("left open", flush=True)
"""


def python(source: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", source], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("wait", "pending"),
    [("r.collect(np.empty((4, 4, 3), np.uint8))", 0), ("[r.submit(bytes(48)) for _ in range(9)]", 2)],
)
def test_ctrl_c_ends_a_wait(wait: str, pending: int) -> None:
    child = python(INTERRUPTED.replace("WAIT", wait))
    assert child.stdout and child.stdout.readline() == "ready\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert out == f"interrupted {pending}\n", err
    assert child.returncode == 0


def test_a_runtime_left_open_does_not_hold_up_the_exit() -> None:
    out, err = python(EXITING).communicate(timeout=20)
    assert (out, err) == ("left open\n", "")


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


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("slots = 1; allowed are 2 to 64", {"slots": 1}),
        ("depth = 5; allowed are 1 to slots = 4", {"depth": 5}),
        ("policy = 'drop'; allowed are block, drop-oldest, drop-newest", {"policy": "drop"}),
        ("threads = 0; allowed are 1 to 64", {"threads": 0}),
        ("kind = 'graph', graph = 'auto' on the CPU; allowed are 'call' and 'auto' there", {"kind": "graph"}),
        ("graph = 'on' on the CPU", {"graph": "on"}),
        ("device = 'tpu'", {"device": "tpu"}),
    ],
)
def test_refused_options(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        runtime(**options)


@pytest.mark.skipif(CUDA is not None, reason="built with CUDA")
def test_a_build_without_cuda_says_so() -> None:
    with pytest.raises(InputError, match="device = 'cuda'; this build has only the CPU"):
        runtime(device="cuda")


@pytest.mark.skipif(CUDA is None or torch.cuda.is_available(), reason="built without CUDA, or there is a GPU")
def test_a_build_with_cuda_on_a_machine_without_gpu() -> None:
    with pytest.raises(EnvironmentFailed, match=r"CUDA failed to find a GPU: cudaError.*: "):
        runtime(device="cuda")
    with pytest.raises(InputError, match="device = 'cuda:x'; allowed are cpu, cuda and cuda:N"):
        runtime(device="cuda:x")
    with pytest.raises(InputError, match="kind = 'no'; allowed are call, graph"):
        runtime(device="cuda", kind="no")


def test_refused_calls() -> None:
    r, back = runtime(), np.empty((*SIZE, 3), np.uint8)
    with pytest.raises(InputError, match=r"plane 0 \[6, 9, 3\] of format 'B'; allowed are 6 rows of 30 uint8"):
        r.submit(np.empty((6, 9, 3), np.uint8))
    with pytest.raises(InputError, match="a frame of type bytes: it must be writable memory"):
        r.collect(bytes(180))
    for seconds in (-1.0, float("nan")):
        with pytest.raises(InputError, match=r"timeout = .* seconds from now; allowed are 0 and more, or None"):
            r.collect(back, timeout=seconds)
        with pytest.raises(InputError, match=r"deadline = .* seconds from now; allowed are 0 and more, or None"):
            r.submit(back, deadline=seconds)
    with pytest.raises(InputError, match="without an engine the network's input and output must be of one size"):
        FrameRuntime(InputSpec("rgb", SIZE, SIZE), OutputSpec("rgb", SIZE, (8, 8)), None)
    with pytest.raises(InputError, match="of one size, layout and type"):
        FrameRuntime(InputSpec("rgb", SIZE, SIZE), OutputSpec("rgb", SIZE, SIZE, layout="nhwc"), None)
    assert r.stats()["frames"]["submitted"] == 0

"""How the frame runtime fails and ends: engines that raise, closing, signals, the end of the process, bad arguments."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.runtime.native import CUDA, FrameRuntime, InputSpec, OutputSpec
from tests.native.frames import SIZE, Gate, check_sum, frame, runtime


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


INTERRUPTED = """
import threading, numpy as np
from fastpix2pix.runtime.native import FrameRuntime, InputSpec, OutputSpec
r = FrameRuntime(InputSpec("rgb", (4, 4), (4, 4)), OutputSpec("rgb", (4, 4), (4, 4)), None, slots=2)
def tell():
    while r.stats()["frames"]["pending"] < PENDING:
        pass
    print("ready", flush=True)
try:
    threading.Thread(target=tell).start()
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
AT_WORK = """
import threading, time, numpy as np
from fastpix2pix.runtime.native import FrameRuntime, InputPlan, InputSpec, OutputSpec
source, back, network = bytes(48), np.empty((4, 4, 3), np.uint8), np.empty((3, 4, 4), np.float32)
input, output = InputSpec("rgb", (4, 4), (4, 4)), OutputSpec("rgb", (4, 4), (4, 4))
begun = threading.Semaphore(0)
def work():
    r, plan = FrameRuntime(input, output, None), InputPlan(input)
    begun.release()
    while True:
        try:
            WORK
        except Exception:
            AFTER
for _ in range(12):
    threading.Thread(target=work, daemon=True).start()
for _ in range(12):
    begun.acquire()
time.sleep(0.3)
"""


def python(source: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", source], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("wait", "pending"),
    [("r.collect(np.empty((4, 4, 3), np.uint8))", 0), ("[r.submit(bytes(48)) for _ in range(9)]", 2)],
)
def test_ctrl_c_ends_a_wait(wait: str, pending: int) -> None:
    child = python(INTERRUPTED.replace("WAIT", wait).replace("PENDING", str(pending)))
    assert child.stdout and child.stdout.readline() == "ready\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert out == f"interrupted {pending}\n", err
    assert child.returncode == 0


def test_a_runtime_left_open_does_not_hold_up_the_exit() -> None:
    out, err = python(EXITING).communicate(timeout=120)
    assert (out, err) == ("left open\n", "")


@pytest.mark.parametrize("after", ("return", "pass"))  # the thread drops its runtime; it tries again
@pytest.mark.parametrize("work", ("r.collect(back)", "r.submit(source)", "plan.run(network, source); r.poll(back)"))
def test_threads_at_work_do_not_crash_the_exit(work: str, after: str) -> None:
    source = AT_WORK.replace("WORK", work).replace("AFTER", after)
    for child in [python(source) for _ in range(4)]:
        assert child.communicate(timeout=120) == ("", "")
        assert child.returncode == 0


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

"""The CUDA half: conversions with the bits of the CPU, graphs, device frames, failures. Needs a GPU."""

import ctypes
import itertools
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.runtime.native import CUDA, FrameRuntime, InputPlan, InputSpec, OutputPlan, OutputSpec

FORMATS = ("rgb", "bgr", "rgba", "nv12", "yuv420")
SIZE = (32, 48)
GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # input, output; frame and network may differ
    "as it is": ({"frame": SIZE, "network": SIZE}, {"frame": SIZE, "network": SIZE}),
    "odd": ({"frame": (33, 47), "network": (33, 47)}, {"frame": (33, 47), "network": (33, 47)}),
    "one pixel": ({"frame": (1, 1), "network": (3, 4), "place": (1, 1, 1, 1)}, {"frame": (1, 1), "network": (3, 4)}),
    "letterbox of an odd crop": (
        {"frame": (65, 93), "network": SIZE, "crop": (1, 3, 61, 85), "place": (5, 0, 22, 48)},
        {"frame": (65, 93), "network": SIZE, "region": (5, 0, 22, 48)},
    ),
    "more columns of the crop than a block sums at once": (
        {"frame": (7, 2601), "network": (3, 160), "place": (0, 20, 3, 130)},
        {"frame": (7, 2601), "network": (3, 160), "region": (0, 20, 3, 130)},
    ),
    "wider than a block": ({"frame": (5, 1031), "network": (5, 1031)}, {"frame": (5, 1031), "network": (5, 1031)}),
}


def insist() -> None:
    """Skip or fail where the runtime cannot run; conftest.py has done so already where there is no GPU."""
    if CUDA is None:
        message = "fastpix2pix._native is built without CUDA; install again with FASTPIX2PIX_CUDA=on"
        pytest.fail(message) if os.environ.get("FASTPIX2PIX_REQUIRE_GPU") == "1" else pytest.skip(message)


pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _built() -> None:
    insist()


class Tensor:
    """A network tensor of the runtime, for torch: its address with shape and type."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (address, False),
            "version": 3,
            "stream": None,
        }


@cache  # made outside of captures; whoever asks again gets the same view
def as_torch(address: int, shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
    return torch.as_tensor(Tensor(address, shape, dtype), device="cuda")


def runtime(engine: Callable[..., Any] | None = None, format: str = "rgb", **options: Any) -> FrameRuntime:
    options = {"device": "cuda", **options}
    return FrameRuntime(InputSpec(format, SIZE, SIZE), OutputSpec(format, SIZE, SIZE), engine, **options)


def frame(seed: int, format: str = "rgb", size: tuple[int, int] = SIZE) -> Any:
    height, width = size
    half = ((height + 1) // 2) * ((width + 1) // 2)
    count = {"rgba": 4 * height * width, "nv12": height * width + 2 * half, "yuv420": height * width + 2 * half}
    return np.random.default_rng(seed).integers(0, 256, count.get(format, 3 * height * width), dtype=np.uint8)


def translated(r: FrameRuntime, source: Any, like: Any) -> Any:
    back = np.empty_like(like)
    assert r.submit(source, 5)
    assert r.collect(back, timeout=60) == 5
    return back


def stream(r: FrameRuntime, count: int, source: Callable[[int], Any], seen: Callable[[int, Any], None]) -> None:
    """`count` frames; submitted by a thread of its own, since submit waits for collect once every slot is taken."""

    def submit() -> None:
        for i in range(count):
            r.submit(source(i), i)
        r.finish()

    submitter, back = threading.Thread(target=submit, daemon=True), np.empty_like(source(0))
    submitter.start()
    while (tag := r.collect(back, timeout=60)) is not None:
        seen(tag, back)
    submitter.join(60)
    assert r.drained


@pytest.mark.parametrize("dtype", ("float32", "float16"))
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("format", FORMATS)
def test_conversions_give_the_bits_of_the_cpu(format: str, name: str, layout: str, dtype: str) -> None:
    for filter in ("bilinear", "bicubic", "area"):
        for border, matrix, range in (("reflect", "bt601", "full"), ("constant", "bt709", "limited")):
            how = {"filter": filter, "matrix": matrix, "range": range, "layout": layout, "dtype": dtype}
            into, out = GEOMETRIES[name]
            input = InputSpec(format, **into, border=border, fill=114.0, **how)
            output = OutputSpec(format, **out, **how)
            height, width = into["network"]
            shape = (height, width, 3) if layout == "nhwc" else (3, height, width)
            given = np.random.default_rng(1).uniform(-1.2, 1.2, shape).astype(dtype)
            given.flat[::97] = np.nan
            got = torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")
            answer = torch.from_numpy(given).cuda()
            torch.cuda.synchronize()

            def engine(
                input: int,
                output: int,
                stream: int,
                got: torch.Tensor = got,
                answer: torch.Tensor = answer,
                shape: tuple[int, ...] = shape,
            ) -> None:
                with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                    got.copy_(as_torch(input, shape, dtype))
                    as_torch(output, shape, dtype).copy_(answer)

            source = frame(2, format, into["frame"])
            r = FrameRuntime(input, output, engine, device="cuda", graph="off")
            back = translated(r, source, source)
            r.close()
            wanted, wanted_back = np.empty(shape, dtype), np.empty_like(source)
            InputPlan(input).run(wanted, source)
            OutputPlan(output).run(wanted_back, given)
            np.testing.assert_array_equal(got.cpu().numpy(), wanted)
            np.testing.assert_array_equal(back, wanted_back)


@pytest.mark.parametrize("graph", ("auto", "on", "off"))
def test_frames_come_back_as_they_were_and_in_order(graph: str) -> None:
    r = runtime(graph=graph, slots=4, depth=3)
    assert r.describe()["graph"] == ("none" if graph == "off" else "captured")
    tags: list[int] = []

    def seen(tag: int, back: Any) -> None:
        np.testing.assert_array_equal(back, frame(tag))
        tags.append(tag)

    stream(r, 500, frame, seen)
    assert tags == list(range(500))
    for name in ("upload", "compute", "download", "total"):
        stage = r.stats()["latency"][name]
        assert stage["count"] == 500 and 0 < stage["p50_ms"] <= stage["p99_ms"] <= stage["max_ms"]
    r.close()


class Negative:
    """A small torch network as a call and as a graph of its own for each slot, with memory of its own."""

    def __init__(self) -> None:
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.calls = 0

    def enqueue(self, input: int, output: int, stream: int) -> None:
        self.calls += 1
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.neg(as_torch(input, (3, *SIZE)), out=as_torch(output, (3, *SIZE)))

    def graph(self, input: int, output: int) -> int:
        x, y = as_torch(input, (3, *SIZE)), as_torch(output, (3, *SIZE))
        graph = torch.cuda.CUDAGraph(keep_graph=True)

        def negate() -> None:
            y.copy_(-(x * 2.0) / 2.0)  # with memory between the operations

        negate()  # kernels are loaded in the first call
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            negate()
        self.graphs.append(graph)
        return graph.raw_cuda_graph()


@pytest.mark.parametrize(
    ("kind", "graph", "wanted"), [("call", "on", "captured"), ("call", "off", "none"), ("graph", "on", "child")]
)
def test_torch_as_the_engine(kind: str, graph: str, wanted: str) -> None:
    net = Negative()
    r = runtime(net.enqueue if kind == "call" else net.graph, kind=kind, graph=graph, slots=3)
    assert r.describe()["graph"] == wanted
    before = net.calls
    for i in range(20):
        np.testing.assert_array_equal(translated(r, frame(i), frame(i)), 255 - frame(i))
    assert net.calls - before == (20 if graph == "off" else 0)
    assert graph == "off" or before == (9 if kind == "call" else 0)  # twice as it is, once to capture, per slot
    r.close()


def test_what_cannot_be_captured() -> None:
    def engine(input: int, output: int, stream: int) -> None:
        torch.cuda.ExternalStream(stream).synchronize()
        Negative().enqueue(input, output, stream)

    r = runtime(engine)
    assert r.describe()["graph"].startswith("none: ")
    np.testing.assert_array_equal(translated(r, frame(1), frame(1)), 255 - frame(1))
    with pytest.raises(EnvironmentFailed, match="captur"):
        runtime(engine, graph="on")
    np.testing.assert_array_equal(translated(runtime(graph="on"), frame(1), frame(1)), frame(1))


def test_refused_graphs() -> None:
    with pytest.raises(InputError, match="graph = 'off' with an engine that is a graph; allowed are auto and on"):
        runtime(Negative().graph, kind="graph", graph="off")
    with pytest.raises(InputError, match="the engine gave 0; allowed is the address of a finished cudaGraph_t"):
        runtime(lambda input, output: 0, kind="graph")
    with pytest.raises(InputError, match=r"device = 'cuda:99'; this machine has \d+ GPU"):
        runtime(device="cuda:99")


@pytest.mark.parametrize("format", FORMATS)
def test_frames_on_the_gpu(format: str) -> None:
    r, source = runtime(format=format), frame(4, format)
    wanted = translated(r, source, source)  # through chroma and back, which is not what went in
    whole = torch.from_numpy(source).cuda()
    torch.cuda.synchronize()
    height, width = SIZE
    y, rest = whole[: height * width].view(height, width), whole[height * width :]
    frames: list[Any] = [whole]
    if format == "nv12":
        wide = torch.zeros(height, width + 16, dtype=torch.uint8, device="cuda")
        wide[:, :width] = y
        frames += [(y, rest.view(height // 2, width // 2, 2)), [wide[:, :width], rest.view(height // 2, width)]]
    elif format == "yuv420":
        frames.append((y, *rest.view(2, height // 2, width // 2)))
    else:
        frames.append(whole.view(height, width, -1))
    for given in frames:
        np.testing.assert_array_equal(translated(r, given, source), wanted)
    interface = Tensor(whole.data_ptr(), (len(source),), "uint8")
    np.testing.assert_array_equal(translated(r, interface, source), wanted)


def test_a_frame_whose_producer_is_still_at_work() -> None:
    r, source, back = runtime(), frame(6), np.empty_like(frame(6))
    host, late = torch.from_numpy(source).pin_memory(), torch.zeros(source.shape, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    producer = torch.cuda.Stream()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        late.copy_(host, non_blocking=True)
        assert r.submit(late)
    assert not producer.query()
    assert r.collect(back, timeout=60) == 0
    np.testing.assert_array_equal(back, source)


def test_making_a_runtime_leaves_the_interpreter_to_others() -> None:
    runtime()  # kernels are loaded
    stamps, stop = [time.perf_counter()], threading.Event()

    def counting() -> None:
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.001)

    def slow(input: int, output: int, stream: int) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda._sleep(50_000_000)

    thread = threading.Thread(target=counting)
    thread.start()
    begin = time.perf_counter()
    runtime(slow, slots=8)  # warms up for some tenths of a second
    took = time.perf_counter() - begin
    stop.set()
    thread.join()
    assert max(after - before for before, after in itertools.pairwise(stamps)) < took / 3


def test_nobody_spins_while_the_gpu_works() -> None:
    def slow(input: int, output: int, stream: int) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.cuda._sleep(500_000_000)  # about a quarter of a second

    r, back = runtime(slow, slots=2), np.empty_like(frame(1))
    busy, begin = time.process_time(), time.perf_counter()
    assert r.submit(frame(1)) and r.collect(back, timeout=60) == 0
    assert time.process_time() - busy < 0.3 * (time.perf_counter() - begin)


class Frame:
    """A frame on the GPU that nothing but its user holds."""

    def __init__(self, source: Any) -> None:
        self.tensor = torch.from_numpy(source).cuda()
        self.__cuda_array_interface__ = self.tensor.__cuda_array_interface__
        torch.cuda.synchronize()


def test_a_device_frame_is_held_until_it_has_been_read() -> None:
    r, back, given = runtime(), np.empty_like(frame(7)), Frame(frame(7))
    seen = weakref.ref(given)
    assert r.submit(given)
    del given
    assert r.collect(back, timeout=60) == 0
    np.testing.assert_array_equal(back, frame(7))
    assert seen() is None


def test_device_frames_that_are_given_up_are_let_go() -> None:
    def engine(input: int, output: int, stream: int) -> None:
        if entered is not None:
            entered.set()
            assert opened.wait(60)

    entered: threading.Event | None = None
    r, back, given = runtime(engine, graph="off", depth=1), np.empty_like(frame(7)), Frame(frame(7))
    entered, opened, seen = threading.Event(), threading.Event(), weakref.ref(given)
    assert r.submit(frame(8)) and entered.wait(60)
    assert r.submit(given, deadline=0)
    del given
    opened.set()
    assert r.collect(back, timeout=60) == 0
    while r.stats()["frames"]["late"] == 0:
        time.sleep(0.001)
    assert r.poll(back) is None and seen() is None
    opened.clear()
    entered.clear()
    given = Frame(frame(7))
    seen = weakref.ref(given)
    assert r.submit(frame(8)) and entered.wait(60) and r.submit(given)
    del given
    threading.Timer(0.05, opened.set).start()
    r.close()
    assert seen() is None


def test_a_frame_is_ready_while_another_thread_has_the_interpreter() -> None:
    r, back, given = runtime(), np.empty_like(frame(7)), Frame(frame(7))
    translated(r, given, back)
    assert r.submit(given)
    ctypes.PyDLL(None).usleep(300_000)  # with the GIL
    assert r.collect(back, timeout=60) == 0
    assert r.stats()["latency"]["total"]["max_ms"] < 200


def test_refused_device_frames() -> None:
    r = runtime()
    with pytest.raises(InputError, match=r"plane 0 .* of format 'not uint8'"):
        r.submit(torch.zeros(*SIZE, 3, device="cuda"))
    with pytest.raises(InputError, match=r"plane 0 \[31, 48, 3\]"):
        r.submit(torch.zeros(31, 48, 3, dtype=torch.uint8, device="cuda"))
    with pytest.raises(InputError, match="a plane in host memory beside planes on the GPU"):
        runtime(format="nv12").submit(
            (torch.zeros(SIZE, dtype=torch.uint8, device="cuda"), np.zeros((16, 24, 2), np.uint8))
        )
    with pytest.raises(InputError, match="its memory cannot be shared"):
        runtime(device="cpu").submit(torch.zeros(*SIZE, 3, dtype=torch.uint8, device="cuda"))
    assert r.stats()["frames"]["submitted"] == 0


SECOND_GPU = """
import threading, numpy as np, torch
from fastpix2pix.runtime.native import FrameRuntime, InputSpec, OutputSpec
size, back = (8, 8), np.empty((8, 8, 3), np.uint8)
given = torch.zeros(8, 8, 3, dtype=torch.uint8, device="cuda:1")
class Interface:
    __cuda_array_interface__ = given.__cuda_array_interface__
def work():
    r = FrameRuntime(InputSpec("rgb", size, size), OutputSpec("rgb", size, size), None, device="cuda:1")
    for frame in (bytes(192), given, Interface()):
        assert r.submit(frame) and r.collect(back, timeout=60) == 0
for run in (work, lambda: [thread.start() or thread.join() for thread in [threading.Thread(target=work)]]):
    run()
    print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_used_gets_no_context() -> None:
    """In a process of its own, on its main thread and on another: each begins on the GPU 0, without a context there."""
    done = subprocess.run([sys.executable, "-c", SECOND_GPU], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False True\n" * 2, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_frames_of_a_gpu_that_is_not_the_current_one() -> None:
    torch.zeros(1, device="cuda:0")
    r = runtime(device="cuda:1")
    given = torch.from_numpy(frame(1).reshape(*SIZE, 3))
    assert torch.cuda.current_device() == 0
    np.testing.assert_array_equal(translated(r, given.to("cuda:1"), frame(1)), frame(1))
    assert torch.cuda.current_device() == 0
    with pytest.raises(InputError, match="on cuda:0; this runtime is on cuda:1"):
        r.submit(given.to("cuda:0"))


def test_closing_with_frames_in_flight() -> None:
    def slow(input: int, output: int, stream: int) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.cuda._sleep(50_000_000)

    for graph in ("on", "off"):
        r = runtime(slow, graph=graph, slots=4, depth=3)
        for i in range(4):
            r.submit(frame(i))
        r.close()
        frames = r.stats()["frames"]
        assert frames["pending"] == 0 and frames["abandoned"] == 4
    r = runtime(slow, slots=4)
    for i in range(4):
        r.submit(frame(i))
    del r  # the same without close
    assert torch.ones(3, device="cuda").sum().item() == 3


BROKEN = """
import numpy as np, torch
from fastpix2pix.errors import EnvironmentFailed
from fastpix2pix.runtime.native import FrameRuntime, InputSpec, OutputSpec
arm, index = [False], None
def engine(input, output, stream):
    if arm[0]:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            torch.zeros(4, device="cuda")[index] = 1.0  # out of bounds: found while it runs
index = torch.tensor([99], device="cuda")
input, output = InputSpec("rgb", (8, 8), (8, 8)), OutputSpec("rgb", (8, 8), (8, 8))
r = FrameRuntime(input, output, engine, device="cuda", graph="off")
back = np.empty((8, 8, 3), np.uint8)
r.submit(bytes(192)); assert r.collect(back, timeout=60) == 0
arm[0] = True
r.submit(bytes(192))
for call in (lambda: r.collect(back, timeout=60), lambda: r.submit(bytes(192))):
    try:
        call()
    except EnvironmentFailed as error:
        print(error)
r.close()
print(r.stats()["frames"]["failed"])
"""


def test_an_error_of_asynchronous_work_surfaces() -> None:
    """In a process of its own: such an error ends the CUDA context."""
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert lines[0] == lines[1] and "CUDA failed to" in lines[0] and "cudaErrorAssert: device-side assert" in lines[0]
    assert lines[2] == "1"


def test_throughput_is_recorded(record_property: Callable[[str, Any], None]) -> None:
    """Frames per second and latency of raw 256x256 frames in and out; a figure, not a limit."""
    size = (256, 256)
    r = FrameRuntime(
        InputSpec("rgb", size, size), OutputSpec("rgb", size, size), None, device="cuda", graph="on", slots=6
    )
    source, tags, frames = frame(8, size=size), [], 5000
    start = time.perf_counter()
    stream(r, frames, lambda i: source, lambda tag, back: tags.append(tag))
    rate = frames / (time.perf_counter() - start)
    assert len(tags) == frames
    p99 = r.stats()["latency"]["total"]["p99_ms"]
    record_property("frames_per_second", rate)
    record_property("p99_ms", p99)
    print(f"{torch.cuda.get_device_name()}: {rate:.0f} frames/s, p99 {p99:.3f} ms")

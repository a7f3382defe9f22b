"""Without a GPU: what is refused, and which calls a stand-in for the library gets. With one: engines built for it
against the generator."""

import dataclasses
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastpix2pix import capture
from fastpix2pix.config import Fitted, Form, Generator, Modes
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime import load, tensorrt_engine
from fastpix2pix.runtime.fitting import size_asked
from fastpix2pix.runtime.plan import Machine, kernels, read_plan, sidecar, update_plan, write_plan
from fastpix2pix.runtime.tensorrt_engine import TensorRTEngine, not_supported_reasons
from fastpix2pix.runtime.tensorrt_library import library, missing, target_for

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")


@pytest.fixture
def foreign(tmp_path):
    """A sound pair of files whose engine no library would take."""
    path = tmp_path / "g.engine"
    write_plan(
        path, b"not an engine", model="0" * 64, modes=Modes(), form=Form("fp16", 1, 64, 64), sizes=((64, 64),),
        record={"architecture": dataclasses.asdict(Generator(depth=5, ngf=4))}, batches=(1,), target="tensorrt-rtx",
        version=library("tensorrt-rtx").version, capabilities=("sm80",), gpu=None, stripped=False,
        parity={},
    )  # fmt: skip
    return path


@no_gpu
def test_without_a_gpu_it_says_what_to_install(foreign):
    with pytest.raises(EnvironmentFailed, match=r"g.engine cannot run here: torch sees no NVIDIA GPU \(install"):
        TensorRTEngine(foreign)


@no_gpu
@pytest.mark.skipif(not missing("tensorrt"), reason="the full TensorRT is installed")
def test_without_the_library_it_says_what_to_install():
    found = not_supported_reasons("tensorrt")
    assert len(found) == 2
    assert "pip install 'fastpix2pix[tensorrt13]'" in found[1]


def test_damage_is_found_before_anything_about_the_machine(foreign):
    foreign.write_bytes(b"not an enginf")
    with pytest.raises(InputError, match="changed after the build"):
        TensorRTEngine(foreign)
    sidecar(foreign).unlink()
    with pytest.raises(InputError, match=r"no g.engine.json beside it"):
        TensorRTEngine(foreign)


@pytest.mark.parametrize(
    "name, used",
    [
        ("Runtime", ["deserialize_cuda_engine"]),
        ("ICudaEngine", ["create_execution_context", "create_runtime_config", "device_memory_size_v2"]),
        ("ICudaEngine", ["create_engine_inspector"]),
        ("IRuntimeConfig", ["set_execution_context_allocation_strategy", "create_runtime_cache", "set_runtime_cache"]),
        ("IRuntimeConfig", ["dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy"]),
        ("IRuntimeCache", ["serialize", "deserialize"]),
        ("IExecutionContext", ["set_device_memory", "set_input_shape", "set_tensor_address", "execute_async_v3"]),
        ("IExecutionContext", ["is_stream_capturable"]),
        ("ExecutionContextAllocationStrategy", ["USER_MANAGED"]),
        ("DynamicShapesKernelSpecializationStrategy", ["EAGER"]),
        ("CudaGraphStrategy", ["DISABLED"]),
        ("BuilderFlag", ["REQUIRE_USER_ALLOCATION", "EXCLUDE_LEAN_RUNTIME", "STRIP_PLAN", "REFIT", "TF32"]),
        ("EngineInspector", ["get_engine_information"]),
    ],
)
def test_what_only_a_gpu_can_call_is_in_the_library(name, used):
    found = getattr(library("tensorrt-rtx").api, name)
    assert [attribute for attribute in used if not hasattr(found, attribute)] == []


class StandIn:
    """The library's API as far as calls and captures go: a context that got a shape must run once before a capture."""

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")

    def __init__(self):
        self.contexts, self.capturing, self.broken, self.replays = [], False, "", []
        self.kernels = b"kernels of this GPU"  # of TensorRT-RTX

    def Runtime(self, logger):
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self)

    device_memory_size_v2 = 16

    def create_runtime_config(self):
        """TensorRT-RTX's, which is what a context is made with there."""
        cache = SimpleNamespace(deserialize=lambda data: data == self.kernels, serialize=lambda: self.kernels)
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: None,
        )

    def create_execution_context(self, config):
        assert config == "user managed" or config.cuda_graph_strategy == "disabled"
        self.contexts.append(StandInContext(self))
        return self.contexts[-1]

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
        if self.broken:
            raise RuntimeError(self.broken)


class StandInContext:
    def __init__(self, api):
        self.api, self.shapes, self.memory, self.ready, self.ran = api, [], None, False, []

    def set_device_memory(self, address, size):
        self.memory = address

    def set_input_shape(self, name, shape):
        self.shapes.append(shape)
        self.ready = False
        return not self.api.capturing

    def set_tensor_address(self, name, address):
        return True

    def execute_async_v3(self, stream):
        self.ran.append("captured" if self.api.capturing else "called")
        possible, self.ready = self.ready or not self.api.capturing, True
        return possible


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """(engine for 32 to 64 pixels, its stand-in for the library)."""
    api, path = StandIn(), tmp_path / "g.engine"
    write_plan(
        path, b"engine", model="0" * 64, modes=Modes(), form=Form("fp16", None, None, None),
        sizes=((32, 32), (32, 32), (64, 64)), record={"architecture": dataclasses.asdict(Generator(depth=5, ngf=4))},
        batches=(1,), target="tensorrt", version="10", capabilities=("sm80",), gpu=None, stripped=False, parity={},
    )  # fmt: skip
    library = SimpleNamespace(api=api, logger=None, name="TensorRT", errors=[], take_errors=lambda: "not so")
    monkeypatch.setattr(tensorrt_engine, "not_supported_reasons", lambda target, device: [])
    monkeypatch.setattr(tensorrt_engine, "library", lambda target: library)
    monkeypatch.setattr(tensorrt_engine, "machine", lambda library, device: Machine("10", "sm80", "a GPU"))
    stream = SimpleNamespace(cuda_stream=1, device="cpu", wait_stream=lambda other: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", api.graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(capture, "_put_right", lambda device, pool: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: api.replays.append(1)))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return TensorRTEngine(path, "cpu"), api


def test_every_graph_has_a_context_that_ran_with_its_shape(stand_in):
    engine, api = stand_in
    for _ in range(7):
        for side in (32, 64):  # by turns
            engine.translate(torch.zeros(1, 3, side, side))
    shared, *of_graphs = api.contexts
    assert shared.ran == ["called"] * 6
    assert [context.ran for context in of_graphs] == [["called", "captured"]] * 2
    assert [context.shapes for context in of_graphs] == [[(1, 3, 32, 32)], [(1, 3, 64, 64)]]
    assert len(api.replays) == 2 * 3
    assert {context.memory for context in api.contexts} == {engine._workspace.data_ptr()}


def test_a_shape_is_set_where_it_changes(stand_in):
    engine, api = stand_in
    for side in (32, 32, 64, 64, 32):
        x = torch.zeros(1, 3, side, side)
        engine.enqueue(x, x.clone(), engine._stream)
    assert [shape[-1] for shape in api.contexts[0].shapes] == [32, 64, 32]


def test_an_engine_apart_has_its_own_context_and_workspace(stand_in):
    engine, api = stand_in
    other, x = engine.apart(), torch.zeros(1, 3, 32, 32)
    for one in (engine, other):
        for _ in range(5):
            one.translate(x)
    memory = [context.memory for context in api.contexts]  # of the engine, the other, and the graph of each
    assert memory == [engine._workspace.data_ptr(), other._workspace.data_ptr()] * 2
    assert memory[0] != memory[1]


def test_after_a_capture_that_broke_off_all_calls_are_uncaptured(stand_in, capsys):
    engine, api = stand_in
    api.broken = "not permitted"
    for _ in range(7):
        for side in (32, 64):
            assert engine.translate(torch.zeros(1, 3, side, side)).shape == (1, 3, side, side)
    assert sum(context.ran.count("captured") for context in api.contexts) == 1
    assert sum(context.ran.count("called") for context in api.contexts) == 14
    assert capsys.readouterr().err.count("called without a CUDA graph (the capture broke off: not permitted)") == 1


def test_what_tensorrt_rtx_compiles_is_kept_and_made_anew_where_it_is_refused(stand_in, monkeypatch):
    engine, api = stand_in
    path, timed = engine.path, {"ms": 1.0, "runs": 1, "batch": 1, "size": [32, 32], "gpu": "a GPU"}
    monkeypatch.setattr(tensorrt_engine, "latency", lambda *arguments: timed)
    update_plan(path, read_plan(path), target="tensorrt-rtx", latency=timed)  # as `build` leaves it: no kernels
    for _ in range(2):  # the second finds them
        assert not load._open_plan(path, "cpu")[0].compiles
        assert kernels(path).read_bytes() == b"kernels of this GPU"
    assert not TensorRTEngine(path, "cpu").compiles
    api.kernels = b"kernels of another driver"
    assert TensorRTEngine(path, "cpu").compiles
    load._open_plan(path, "cpu")
    assert kernels(path).read_bytes() == b"kernels of another driver"


def test_pictures_are_scaled_to_the_only_size_of_an_engine(stand_in, monkeypatch):
    engine, _ = stand_in
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert size_asked(Fitted("resize"), engine.describe()) is None
    engine.plan = dataclasses.replace(engine.plan, sizes=((32, 64),))
    assert size_asked(Fitted("resize"), engine.describe()) == (32, 64)


@pytest.mark.gpu
def test_a_foreign_engine_is_refused_in_one_line(foreign):
    capability = "sm{}{}".format(*torch.cuda.get_device_capability())
    update_plan(foreign, read_plan(foreign), capabilities=(capability,))
    with pytest.raises(EnvironmentFailed, match="refuses it") as error:
        TensorRTEngine(foreign)
    assert "\n" not in str(error.value)


# On a GPU


def target() -> str:
    """The library that builds for this GPU; none: skip."""
    try:
        return target_for("sm{}{}".format(*torch.cuda.get_device_capability()))
    except EnvironmentFailed as error:
        pytest.skip(str(error))


def network(**options):
    torch.manual_seed(0)
    net = build_generator(Generator(**{"depth": 5, "ngf": 16, **options})).eval()
    with torch.no_grad():
        net.up[-1].conv.weight.mul_(10)
    return net


def built(folder, **options):
    """An engine through the whole build: the gate has run it on this GPU."""
    from fastpix2pix.building.build import build

    save_network(folder / "g.safetensors", network(), modes=Modes())
    values = {"target": target(), "precision": "fp16", "size": "64", "gate_images": 3, **options}
    made = build(folder / "g.safetensors", folder / "g.engine", **values)
    assert "in place of" not in made.parity.ran
    return folder / "g.engine"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options, why",
    [
        ({"precision": "fp32"}, "no TF32"),
        ({"precision": "bf16", "norm_stats": "running"}, "recast, folded"),
        ({"noise": "fixed"}, "mask in the graph"),
        ({"noise": "random", "batch": "1,2,4"}, "masks as inputs"),
        ({"size": "32,64,96x128", "batch": "1,2,4", "pixels": "uint8", "noise": "fixed"}, "dynamic, pixels inside"),
        ({"precision": "int8", "calibration_images": 8}, "quantised"),
    ],
)
def test_engines_pass_the_gate_on_the_gpu_itself(tmp_path, options, why):
    built(tmp_path, **options)


@pytest.mark.gpu
def test_any_number_of_images_and_each_size(tmp_path):
    engine = TensorRTEngine(built(tmp_path, size="32,64,128", batch="2,2,4", precision="fp32"))
    net = network()
    batches = [torch.rand(*shape) * 2 - 1 for shape in ((1, 3, 64, 64), (5, 3, 32, 96), (9, 3, 64, 64))]
    with torch.no_grad():
        wanted = [net(x, Modes()) for x in batches]
    for _ in range(6):  # by turns; the last ones are replayed from graphs
        for x, y in zip(batches, wanted, strict=True):
            assert torch.allclose(engine.translate(x.cuda()).cpu(), y, atol=1e-3)
    assert all(call._graph for call in engine._calls.values())
    for size in ((160, 64), (48, 64)):
        with pytest.raises(InputError, match="takes 32x32 to 128x128"):
            engine.translate(torch.zeros(1, 3, *size, device="cuda"))


@pytest.mark.gpu
def test_random_noise_follows_the_number_of_the_image(tmp_path):
    engine = TensorRTEngine(built(tmp_path, noise="random", precision="fp32"))
    net, x = network(), torch.rand(1, 3, 64, 64) * 2 - 1
    for number in range(8):
        with torch.no_grad():
            wanted = net(x, Modes(noise="random"), number)
        assert torch.allclose(engine.translate(x.cuda(), number).cpu(), wanted, atol=1e-3)


@pytest.mark.gpu
def test_enqueue_writes_into_the_callers_memory_and_can_be_captured(tmp_path):
    engine = TensorRTEngine(built(tmp_path, precision="fp32"))
    x = torch.rand(1, 3, 64, 64, device="cuda") * 2 - 1
    y, stream = torch.zeros_like(x), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        engine.enqueue(x, y, stream)
    stream.synchronize()
    wanted = engine.translate(x)
    assert torch.allclose(y, wanted, atol=1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        engine.enqueue(x, y, stream)
    x.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.allclose(y, engine.translate(x), atol=1e-6)
    for bad in (x.half(), x[:, :2], x.cpu()):
        with pytest.raises(InputError, match="the engine takes"):
            engine.enqueue(bad, y, stream)
    with pytest.raises(InputError, match="not contiguous"):
        engine.enqueue(x.to(memory_format=torch.channels_last), y, stream)


@pytest.mark.gpu
def test_the_first_warm_up_fills_in_the_latency(tmp_path):
    path = built(tmp_path)
    engine = TensorRTEngine(path)
    update_plan(path, engine.plan, latency=None)
    engine = TensorRTEngine(path)
    found = engine.warm_up()
    assert found["ms"] > 0
    assert read_plan(path).latency == found
    assert engine.describe()["latency"] == found


@pytest.mark.gpu
def test_the_engine_itself_has_half_convolutions(tmp_path):
    text = TensorRTEngine(built(tmp_path)).inspect()
    assert "Half" in text or "FP16" in text or "Float16" in text

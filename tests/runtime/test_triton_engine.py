"""The generator in Triton kernels against the plain one: every mode and network, and the protocol of an engine."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastpix2pix.config import Generator, Modes
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.kernels._triton import triton
from fastpix2pix.kernels.conv_plan import ConvPlan, Problem, conv_candidates, conv_plan
from fastpix2pix.kernels.dispatch import environment_reasons, overlap_reasons, recorded
from fastpix2pix.model import Unet, build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime.load import load
from fastpix2pix.runtime.triton_engine import TritonEngine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")
gpu = pytest.mark.gpu
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=needs_triton)]
MODES = [Modes(s, n, seed=2**33 + 5) for s in ("image", "running") for n in ("off", "fixed", "random")]
CUT = {
    "fp32": 0.0,
    "fp16": 0.0,
    "bf16": 2**-7 if DEVICE.type == "cpu" else 0.0,
}  # the interpreter truncates bf16 stores
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def network(**options) -> Unet:
    """A small generator whose outputs fill [-1, 1], with statistics, gains and biases that matter."""
    torch.manual_seed(0)
    net = build_generator(Generator(**({"depth": 5, "ngf": 4} | options))).eval()
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if t.ndim == 4:
                t.mul_(12 if "up" in name else 6)
            elif name.endswith("running_var"):
                t.uniform_(0.5, 2)
            elif t.is_floating_point():
                t.add_(torch.randn_like(t), alpha=0.3)
    return net


def pictures(images: int = 2, height: int = 32, width: int = 32, channels: int = 3) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    x = torch.rand(images, height, width, channels, generator=draws) * 2 - 1
    return x.permute(0, 3, 1, 2).to(DEVICE)


def engine(net: Unet, modes: Modes, precision: str = "fp32", impl: str = "triton", **options) -> TritonEngine:
    return TritonEngine(net, modes, DEVICE, precision, impl=impl, **options)


def plain(net: Unet, modes: Modes, x: Tensor, first: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    own = type(net)(net.config)
    own.load_state_dict(net.state_dict())
    with torch.no_grad():
        return own.eval().to(DEVICE, dtype)(x.to(dtype), modes, first).double()


def assert_as_right_as_torch(net: Unet, modes: Modes, precision: str, x: Tensor, first: int, impl: str, **options):
    """|engine - f64| <= 2 |torch in the same type - f64| + a rounding of the output, in the mean and at worst."""
    exact = plain(net, modes, x, first)
    same = plain(net, modes, x, first, DTYPES[precision])
    found = engine(net, modes, precision, impl, **options).translate(x, first)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert exact.abs().mean() > 0.3  # a generator that says something
    slack = 2**-20 + 4 * CUT[precision]
    error, allowed = (found.double() - exact).abs(), (same - exact).abs()
    assert error.mean() <= 2 * allowed.mean() + slack / 4
    assert error.max() <= 2 * allowed.max() + 4 * slack


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("modes", MODES, ids=lambda m: f"{m.norm_stats} {m.noise}")
def test_every_mode_is_the_generators(modes, lazy, impl):
    assert_as_right_as_torch(network(), modes, "fp32", pictures(), 7, impl, lazy=lazy)


NETWORKS = [
    ({"norm": "instance"}, 3, Modes(noise="random"), "instance norm at batch 3, biases in front of it"),
    ({"norm": "none", "dropout": "none"}, 1, Modes(), "no normalisation"),
    ({"kind": "encoder_decoder"}, 1, Modes("running"), "no skips"),
    ({"up": "resize"}, 2, Modes(), "resize and 3x3 up-blocks"),
    ({"up": "resize"}, 1, Modes("running", "fixed"), "the same, folded but for dropout"),
    (
        {"in_channels": 1, "out_channels": 4, "ngf": 3, "dropout": "junyanz"},
        3,
        Modes("running", "random"),
        "odd widths",
    ),
]


@needs_triton
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("options", "images", "modes", "why"), NETWORKS, ids=[n[3] for n in NETWORKS])
def test_every_network(options, images, modes, why, lazy):
    net = network(**options)
    x = pictures(images, channels=net.config.in_channels)
    assert_as_right_as_torch(net, modes, "fp32", x, 2, "triton", lazy=lazy)


@needs_triton
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("statistics", ["image", "running"])
@pytest.mark.parametrize("lazy", [False, True])
def test_half_precision(precision, statistics, lazy):
    assert_as_right_as_torch(network(), Modes(statistics, "fixed"), precision, pictures(), 0, "triton", lazy=lazy)


def split(problem: Problem) -> ConvPlan:
    """Every block of the network comes as partial sums, for what follows it to add up."""
    return conv_plan(problem) if problem.flat else conv_plan(problem)._replace(tap_splits=1, channel_splits=2)


def whole(problem: Problem) -> ConvPlan:
    """No sum in parts: statistics come with it."""
    return conv_plan(problem)._replace(tap_splits=1, channel_splits=1)


def last(problem: Problem) -> ConvPlan:
    """Of the candidates."""
    return conv_candidates(problem)[-1]


@needs_triton
@pytest.mark.parametrize("choose", [split, last], ids=["split", "last"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("modes", [Modes(), Modes("running", "fixed")], ids=str)
def test_every_way_to_cut_the_products(modes, choose, lazy):
    assert_as_right_as_torch(network(), modes, "fp32", pictures(1), 0, "triton", choose=choose, lazy=lazy)


@needs_triton
def test_large_maps_are_normalised_by_their_readers():
    """Raw maps with tiles of statistics and no pass between the blocks; a wrong scale of one image would show."""
    net, x = network(dropout="none"), pictures(2, 64, 64)
    with recorded() as tape:
        assert_as_right_as_torch(net, Modes(), "fp32", x, 0, "triton", choose=whole, lazy=True)
    kernels = [entry.kernel for entry in tape]
    assert kernels.count("_finalise_kernel") >= 3 and kernels.count("_conv_kernel") == 10


@needs_triton
def test_folded_blocks_are_one_launch_each():
    """With running statistics a product writes both outputs, and an up-block its half of what the next one reads."""
    with recorded() as tape:
        assert_as_right_as_torch(network(), Modes("running"), "fp32", pictures(), 0, "triton", choose=whole, lazy=False)
    assert [entry.kernel for entry in tape] == 10 * ["_conv_kernel"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("height", "width"), [(32, 64), (96, 32)])
def test_the_last_block_as_one_convolution(impl, height, width):
    """Its pixels come in blocks of 2x2, which a map that is not square tells apart."""
    net, x = network(out_channels=2), pictures(1, height, width)
    assert engine(net, Modes(), impl=impl)._up[-1].geometry == (3, 1, 1, False)
    assert_as_right_as_torch(net, Modes("running"), "fp32", x, 0, impl)


def test_an_image_does_not_depend_on_its_batch():
    net, modes, x = network(), Modes(noise="random", seed=3), pictures(3)
    translator = engine(net, modes, impl="reference")
    together = translator.translate(x, 5)
    apart = torch.cat([translator.translate(x[i : i + 1], 5 + i) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, translator.translate(x, 6), atol=1e-3)  # other masks


def test_what_translate_returned_stays():
    translator = engine(network(), Modes(), impl="reference")
    first = translator.translate(pictures(1))
    kept = first.clone()
    translator.translate(-pictures(1))
    assert torch.equal(first, kept)


def test_enqueue_writes_the_callers_buffer():
    translator, x = engine(network(), Modes("running", "random", 4), impl="reference"), pictures()
    whole = torch.full((4, 3, 32, 32), torch.nan, device=DEVICE)  # not channels-last
    stream = torch.cuda.current_stream() if DEVICE.type == "cuda" else None
    translator.enqueue(x.contiguous(), whole[1:3], stream, first=9)
    torch.testing.assert_close(whole[1:3], translator.translate(x, 9))
    assert whole[0].isnan().all() and whole[3].isnan().all()


def test_an_engine_apart_shares_nothing_but_the_weights():
    one = engine(network(), Modes(noise="random"), impl="reference")
    other, x = one.apart(), pictures(1)
    assert torch.equal(one.translate(x, 5), other.translate(x, 5))
    assert other._counters.data_ptr() != one._counters.data_ptr()
    for mine, its in zip(one._down + one._up, other._down + other._up, strict=True):
        assert mine.w is its.w
        assert its.noise is None or its.noise.counters is other._counters


def test_the_network_is_neither_changed_nor_kept():
    net, x = network(), pictures(1)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    translator = engine(net, Modes("running"), impl="reference")
    wanted = translator.translate(x)
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name])
        t.zero_()
    assert torch.equal(translator.translate(x), wanted)


def test_refusals():
    translator = engine(network(), Modes(), impl="reference")
    for shape in ((1, 4, 32, 32), (1, 3, 32, 40), (1, 3, 0, 32)):
        with pytest.raises(InputError, match=r"\[N, 3, H, W\] with multiples of 32 is taken"):
            translator.translate(torch.zeros(shape, device=DEVICE))
    x = pictures(1)
    with pytest.raises(InputError, match=r"output \[1, 3, 32, 64\] .* \[1, 3, 32, 32\] is written"):
        translator.enqueue(x, torch.empty(1, 3, 32, 64, device=DEVICE))
    with pytest.raises(InputError, match="running"):
        engine(network(norm="instance"), Modes("running"), impl="reference")


def test_description():
    found = engine(network(), Modes(), "bf16", impl="reference").describe()
    assert json.loads(json.dumps(found)) == found
    assert found["backend"] == "triton" and found["precision"] == "bf16" and found["device"] == str(DEVICE)


@needs_triton
def test_backend_is_chosen_by_name(tmp_path):
    save_network(tmp_path / "m.safetensors", network())
    translator = load(tmp_path / "m.safetensors", "triton", device=str(DEVICE), noise="fixed", norm_stats="running")
    assert translator.engine.describe()["backend"] == "triton"
    x = pictures(1)[0]
    exact = plain(network(), Modes("running", "fixed"), x[None])[0]
    torch.testing.assert_close(translator(x).double(), exact, rtol=0, atol=1e-3 if DEVICE.type == "cpu" else 0.05)


WITHOUT = """
import torch
from fastpix2pix.config import Generator, Modes
from fastpix2pix.model import build_generator
from fastpix2pix.runtime.triton_engine import TritonEngine
TritonEngine(build_generator(Generator(depth=5, ngf=4)), Modes(), torch.device("cpu"))
"""


@pytest.mark.skipif(not environment_reasons("cpu") and triton is None, reason="triton is not installed")
def test_a_cpu_without_the_interpreter_is_refused():
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=root, env=clean, capture_output=True, text=True)
    assert EnvironmentFailed.__name__ in done.stderr
    assert "backend = triton cannot run" in done.stderr and "use backend = torch" in done.stderr


@gpu
def test_graph_gives_what_the_kernels_give_and_can_be_captured_by_others():
    modes, x = Modes(noise="random", seed=1), pictures()
    plainly, graphed = engine(network(), modes, "fp16", graph=False), engine(network(), modes, "fp16")
    for first in (0, 5):
        assert torch.equal(graphed.translate(x, first), plainly.translate(x, first))
    given, y = x.clone(), torch.empty_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graphed.enqueue(given, y, stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            graphed.enqueue(given, y, stream)
        given.copy_(-x)
        graph.replay()
    stream.synchronize()
    assert torch.equal(y, plainly.translate(-x))


@gpu
@pytest.mark.parametrize("modes", MODES[:4], ids=str)
@pytest.mark.parametrize("side", [32, 256])
def test_kernels_that_overlap_give_the_same_picture(modes, side):
    if reasons := overlap_reasons(DEVICE):
        pytest.skip("; ".join(reasons))
    net = network(depth=5 if side == 32 else 8, ngf=16)
    overlapped, plainly = (engine(net, modes, "bf16", overlap=on) for on in (True, False))
    for first in range(4):
        x = pictures(1 + first % 2, side, side) * (first + 1) / 4
        expected = plainly.translate(x, first)
        for _ in range(3):
            assert torch.equal(overlapped.translate(x, first), expected)


@gpu
def test_threads_may_share_an_engine_and_make_others():
    """One captured graph has one input; and captures, and the end of an engine, break captures of other threads."""
    shared, pictures_of = engine(network(), Modes(), "fp16", impl="reference"), [pictures() * n / 4 for n in range(4)]
    expected = [shared.translate(x).cpu() for x in pictures_of]
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for side in (32, 64):
                engine(network(), Modes(), "fp16", impl="reference").translate(pictures(1, side, side))
            for _ in range(20):
                if not torch.equal(shared.translate(pictures_of[number]).cpu(), expected[number]):
                    wrong.append(number)
        except RuntimeError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_kernels_do_not_overlap_on_a_cpu():
    with pytest.raises(EnvironmentFailed, match="overlap = True: kernels overlap on a GPU only"):
        TritonEngine(network(), Modes(), torch.device("cpu"), impl="reference", overlap=True)


@gpu
def test_no_memory_is_allocated_per_call():
    translator, x = engine(network(), Modes(), "fp16"), pictures()
    y, stream = torch.empty_like(x), torch.cuda.Stream()
    for _ in range(3):
        translator.enqueue(x, y, stream)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        translator.enqueue(x, y, stream)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_norms_without_parameters_have_none_to_fold():
    """Instance norm is affine-free here; a batch norm's parameters are folded exactly once."""
    folded = engine(network(), Modes("running"), impl="reference")
    assert {layer.norm for layer in (*folded._down, *folded._up)} == {"none"}
    dropped = engine(network(), Modes("running", "fixed"), impl="reference")
    assert sum(layer.norm == "running" for layer in dropped._up) == 3
    assert not isinstance(folded, nn.Module)

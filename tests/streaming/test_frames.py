"""Frames that the caller has: what comes out, in which order, and what is refused."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastpix2pix as f2p
from fastpix2pix.config import Generator, Modes
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.model import build_generator
from fastpix2pix.model.weights import save_network
from fastpix2pix.runtime.load import load
from fastpix2pix.runtime.translator import Translator
from fastpix2pix.runtime.triton_engine import TritonEngine
from tests.streaming.clips import HEIGHT, WIDTH, Identity, scene


class Slow(Identity):
    """Begins when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def translate(self, batch, first=0):
        self.begun.set()
        assert self.go.wait(20)
        return batch.clone()


class Broken(Identity):
    def translate(self, batch, first=0):
        raise RuntimeError("the engine broke")


def several(count: int) -> list[np.ndarray]:
    return [scene(number) for number in range(count)]


@pytest.mark.parametrize("options", [{}, {"norm_stats": "running"}, {"noise": "fixed", "seed": 3}])
def test_the_same_as_the_model_makes_of_images(model, options):
    g = load(model, device="cpu", **options)
    pictures = several(7)
    with f2p.Frames(g, HEIGHT, WIDTH) as frames:
        found = list(frames.translate(pictures))
    assert len(found) == 7
    for picture, output in zip(pictures, found, strict=True):
        assert output.shape == (HEIGHT, WIDTH, 3) and output.dtype == np.uint8
        assert np.abs(output.astype(int) - g(picture)).max() <= 1  # rounded once in either


def test_blue_first(model):
    g = load(model, device="cpu", norm_stats="running")
    picture = scene(1)
    with f2p.Frames(g, HEIGHT, WIDTH, pixels="bgr") as frames:
        (output,) = frames.translate([picture[..., ::-1].copy()])
    with f2p.Frames(g, HEIGHT, WIDTH) as frames:
        (expected,) = frames.translate([picture])
    np.testing.assert_array_equal(output[..., ::-1], expected)


@pytest.mark.parametrize("pixels", ["nv12", "yuv420", "rgba"])
def test_other_formats_in_and_out(identity, pixels):
    """What goes through a network that does nothing comes back, but for subsampled colours."""
    with f2p.Frames(identity, HEIGHT, WIDTH, pixels_out=pixels) as there:
        (middle,) = there.translate([scene(2)])
    assert middle.shape == ((HEIGHT, WIDTH, 4) if pixels == "rgba" else (HEIGHT * 3 // 2, WIDTH))
    with f2p.Frames(identity, HEIGHT, WIDTH, pixels=pixels, pixels_out="rgb") as back:
        (found,) = back.translate([middle])
    assert np.abs(found.astype(int) - scene(2)).mean() < (0.6 if pixels == "rgba" else 2.5)


def test_yuv_is_709_from_720_lines(identity):
    """A green picture has another luminance by either matrix."""

    def luminance(height: int, **given) -> int:
        green = np.zeros((height, 32, 3), np.uint8)
        green[..., 1] = 255
        with f2p.Frames(identity, height, 32, pixels_out="yuv420", **given) as frames:
            (found,) = frames.translate([green])
        return int(found[0, 0])

    assert [luminance(64), luminance(720)] == [145, 173]
    assert [luminance(64, matrix="bt709"), luminance(720, matrix="bt601")] == [173, 145]
    assert luminance(64, range="full") == 150


def test_odd_sizes_become_even_where_the_format_needs_it(identity):
    with f2p.Frames(identity, 33, 47, pixels_out="nv12") as frames:
        assert frames.shape == (34 * 3 // 2, 48)
        (found,) = frames.translate([scene(0, 33, 47)])
    assert found.shape == frames.shape
    with f2p.Frames(identity, 33, 47) as frames:
        assert frames.shape == (33, 47, 3)


def test_tags_come_back_in_order_and_a_frame_can_be_given_to_write_into(identity):
    into = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    with f2p.Frames(identity, HEIGHT, WIDTH) as frames:
        for number in range(3):
            assert frames.submit(scene(number), {"taken at": number})
        for number in range(3):
            picture, tag = frames.collect(into)
            assert picture is into and tag == {"taken at": number}
            assert np.abs(into.astype(int) - scene(number)).max() <= 1
        assert frames.collect(timeout=0.01) is None
        frames.finish()
        assert frames.collect() is None


def test_live_the_newest_frames_count():
    engine = Slow()
    with f2p.Frames(Translator(engine), HEIGHT, WIDTH, live=True) as frames:
        frames.submit(scene(0), 0)
        assert engine.begun.wait(20)
        for number in range(1, 6):
            assert frames.submit(scene(number), number)  # never waits
        engine.go.set()
        found = [frames.collect()[1] for _ in range(2)]
        frames.finish()
        assert frames.collect() is None
        assert found == [0, 5]
        assert frames.stats()["frames"]["dropped_oldest"] == 4
        assert not frames._tags  # nothing is kept of those that were dropped
        assert frames.describe()["policy"] == "drop-oldest"


def test_not_live_submit_waits_for_a_place():
    engine = Slow()
    with f2p.Frames(Translator(engine), HEIGHT, WIDTH) as frames:
        taken = [frames.submit(scene(n), n, timeout=0.05) for n in range(6)]
        assert taken == [True] * 4 + [False] * 2
        engine.go.set()
        frames.finish()
        assert [frames.collect()[1] for _ in range(4)] == [0, 1, 2, 3]


def test_frames_go_through_while_others_come_in(identity):
    """The first outputs are there before the last inputs are asked for."""
    asked, seen = [], []

    def camera():
        for number in range(12):
            asked.append(number)
            time.sleep(0.01)
            yield scene(number)

    with f2p.Frames(identity, HEIGHT, WIDTH) as frames:
        for _ in frames.translate(camera()):
            seen.append(len(asked))
    assert len(seen) == 12 and seen[0] < 12


@pytest.mark.parametrize("fit", ["pad", "resize", "crop", "tile"])
def test_fits(model, fit):
    g = load(model, device="cpu", norm_stats="running")
    options = {"tile": 32} if fit == "tile" else {}
    with f2p.Frames(g, HEIGHT, WIDTH, fit=fit, **options) as frames:
        assert frames.shape == ((HEIGHT, WIDTH, 3) if fit in ("pad", "tile") else (32, 32, 3))
        (found,) = frames.translate([scene(0)])
    assert found.shape == frames.shape


def test_steady(identity):
    """What stands still keeps a share of the last output."""
    first, second = (np.full((HEIGHT, WIDTH, 3), level, np.uint8) for level in (100, 101))
    with f2p.Frames(identity, HEIGHT, WIDTH, steady=0.9) as frames:
        found = [int(picture[0, 0, 0]) for picture in frames.translate([first, second])]
    assert found == [100, 100]


def test_gray(tmp_path):
    torch.manual_seed(0)
    save_network(tmp_path / "g.safetensors", build_generator(Generator(depth=5, ngf=4, in_channels=1, out_channels=1)))
    with f2p.Frames(load(tmp_path / "g.safetensors", device="cpu"), HEIGHT, WIDTH) as frames:
        (found,) = frames.translate([scene(0)])
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 0] == found[..., 2]).all() and found.std() > 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"pixels": "yuyv"}, "pixels = yuyv: allowed are rgb, bgr, rgba, nv12, yuv420"),
        ({"pixels_out": "gray"}, "pixels_out = gray: allowed are"),
        ({"codec": "libx264"}, "unknown option codec; allowed are fit, size, tile, live, steady, frames"),
        ({"fit": "tile"}, "fit = tile: a tile has other image statistics"),
        ({"frames": "cuda"}, r"frames = cuda: .*the model runs on cpu"),
        ({"matrix": "bt2020"}, "matrix"),
        ({"range": "tv"}, "range"),
    ],
)
def test_refused(identity, given, reason):
    with pytest.raises(InputError, match=reason):
        f2p.Frames(identity, HEIGHT, WIDTH, **given)


def test_frames_of_another_size_are_refused_and_the_next_is_taken(identity):
    with f2p.Frames(identity, HEIGHT, WIDTH) as frames:
        with pytest.raises(InputError, match="48"):
            frames.submit(scene(0, HEIGHT, WIDTH + 2))
        (found,) = frames.translate([scene(0)])
        assert found.shape == (HEIGHT, WIDTH, 3)


def test_what_the_engine_raises_is_raised():
    frames = f2p.Frames(Translator(Broken()), HEIGHT, WIDTH)
    with pytest.raises(EnvironmentFailed, match="the engine broke"):
        list(frames.translate(several(3)))
    frames.close()
    frames.close()


def test_closing_with_frames_inside_ends_all_threads():
    before = threading.active_count()
    engine = Slow()
    frames = f2p.Frames(Translator(engine), HEIGHT, WIDTH)
    frames.submit(scene(0))
    engine.go.set()
    frames.close()
    assert threading.active_count() == before
    with pytest.raises(EnvironmentFailed, match="closed"):
        frames.submit(scene(0))


def test_without_pyav(model):
    """Whoever has frames needs no FFmpeg."""
    code = f"""
import sys
sys.modules["av"] = None
import numpy as np, fastpix2pix as f2p
with f2p.Frames(f2p.load({str(model)!r}, device="cpu"), 32, 32) as frames:
    print(next(iter(frames.translate([np.zeros((32, 32, 3), np.uint8)]))).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(32, 32, 3)\n", done.stderr


@pytest.mark.gpu
def test_on_the_gpu(model):
    """From the host and from the GPU, and the same as on the CPU within half precision."""
    g = load(model, device="cuda", norm_stats="running", precision="fp32")
    wanted = load(model, device="cpu", norm_stats="running")(scene(4))
    with f2p.Frames(g, HEIGHT, WIDTH, frames="cuda") as frames:
        assert frames.describe()["device"].startswith("cuda")
        here, there = frames.translate([scene(4), torch.from_numpy(scene(4)).cuda()])
    np.testing.assert_array_equal(here, there)
    assert np.abs(here.astype(int) - wanted).max() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("noise", ["off", "random"])
def test_several_at_once_through_one_engine_of_the_gpu(noise):
    """Each has its own memory between the layers, and the engine's is left for other calls meanwhile."""
    net, modes = build_generator(Generator(depth=5, ngf=16, dropout="paper")).eval(), Modes("image", noise)
    g = Translator(TritonEngine(net, modes, torch.device("cuda"), "fp32", impl="reference"), {}, {"size": 64})
    pictures = [np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8) for n in range(4)]

    def outputs(picture) -> list[np.ndarray]:
        with f2p.Frames(g, 64, 64, frames="cuda") as frames:
            return list(frames.translate([picture] * 50))

    alone, beside = [outputs(picture) for picture in pictures], g(pictures[0])
    with ThreadPoolExecutor() as pool:
        together = pool.map(outputs, pictures)
        if noise == "off":
            assert all(np.array_equal(g(pictures[0]), beside) for _ in range(50))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
def test_made_while_the_caller_works_on_a_stream_of_its_own():
    net = build_generator(Generator(depth=5, ngf=4)).eval()
    g = Translator(TritonEngine(net, Modes("image", "fixed"), torch.device("cuda"), "fp32", impl="reference"), {}, {})
    with torch.cuda.stream(torch.cuda.Stream()):
        wanted = g(scene(4))
        torch.cuda._sleep(10**8)  # what the engine's copy begins on this stream comes after it
        with f2p.Frames(g, HEIGHT, WIDTH, frames="cuda") as frames:
            (found,) = frames.translate([scene(4)])
    assert np.abs(found.astype(int) - wanted).max() <= 1


SECOND_GPU = """
import numpy as np, torch
import fastpix2pix as f2p
from fastpix2pix.config import Generator, Modes
from fastpix2pix.model import build_generator
from fastpix2pix.runtime.engine import TorchEngine
from fastpix2pix.runtime.translator import Translator
from fastpix2pix.runtime.triton_engine import TritonEngine
net, gpu = build_generator(Generator(depth=5, ngf=4)).eval(), torch.device("cuda:1")
picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
for kind, more in ((TorchEngine, {}), (TritonEngine, {"impl": "reference"})):
    g = Translator(kind(net, Modes(norm_stats="image"), gpu, "fp32", **more), {}, {"size": 64})
    wanted = g(picture)
    with f2p.Frames(g, 64, 64, frames="cuda") as frames:
        for given in (picture, torch.from_numpy(picture).to(gpu)):
            assert frames.submit(given)
            assert np.abs(frames.collect(timeout=60)[0].astype(int) - wanted).max() <= 1
print(torch._C._cuda_hasPrimaryContext(0))
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_frames_on_the_second_gpu_while_nobody_uses_the_first():
    """In a process of its own: there, torch calls the first one current and has not made it so."""
    done = subprocess.run([sys.executable, "-c", SECOND_GPU], capture_output=True, text=True, timeout=300)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.gpu
def test_frames_are_made_while_other_threads_record_graphs_and_drop_engines():
    """An engine that goes while a graph is recorded would take the process with it."""
    net, stop, wrong = build_generator(Generator(depth=5, ngf=4)).eval(), threading.Event(), []

    def engine() -> TritonEngine:
        return TritonEngine(net, Modes(norm_stats="image"), torch.device("cuda"), "fp32", impl="reference")

    def record() -> None:
        while not stop.is_set():
            try:
                engine().translate(torch.zeros(1, 3, 32, 32, device="cuda"))
            except RuntimeError as error:
                wrong.append(error)

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            with f2p.Frames(Translator(engine(), {}, {"size": 64}), 64, 64, frames="cuda") as frames:
                assert frames.describe()["graph"] == "captured"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong

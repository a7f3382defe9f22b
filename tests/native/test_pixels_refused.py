"""What the pixel conversions refuse, with what was given and what is allowed."""

from typing import Any

import numpy as np
import pytest

from fastpix2pix.errors import InputError
from fastpix2pix.runtime.native import InputPlan, InputSpec, OutputPlan, OutputSpec

SIZES: dict[str, Any] = {"frame": (8, 8), "network": (8, 8)}
BAD_SPECS = {
    "format = 'yuyv'; allowed are rgb, bgr, rgba, nv12, yuv420": {"format": "yuyv"},
    "filter = 'lanczos'; allowed are bilinear, bicubic, area": {"filter": "lanczos"},
    "matrix = 'bt2020'; allowed are bt601, bt709": {"matrix": "bt2020"},
    "range = 'tv'; allowed are limited, full": {"range": "tv"},
    "layout = 'chw'; allowed are nchw, nhwc": {"layout": "chw"},
    "dtype = 'bfloat16'; allowed are float32, float16": {"dtype": "bfloat16"},
    r"a frame of 8x0 pixels; allowed are 1 to 32768 each way": {"frame": (0, 8)},
    r"a frame of -3x8 pixels": {"frame": (8, -3)},
    r"a frame of 8x32769 pixels": {"frame": (32769, 8)},
}
BAD_INPUTS = {
    r"border = 'wrap'; allowed are reflect, constant": {"border": "wrap"},
    r"fill = 256.0+; allowed are levels 0 to 255": {"fill": 256.0},
    r"fill = nan": {"fill": float("nan")},
    r"a network input of 32769x8 pixels": {"network": (8, 32769)},
    r"a crop of 4x8 at \(5, 0\) does not lie inside the frame of 8x8": {"crop": (0, 5, 8, 4)},
    r"a crop of 4x8 at \(-1, 0\)": {"crop": (0, -1, 8, 4)},
    r"a crop of 0x8 pixels": {"crop": (0, 0, 8, 0)},
    r"a picture of 8x9 at \(0, 0\) does not lie inside the network input of 8x8": {"place": (0, 0, 9, 8)},
    r"a crop of 8x8 at \(2147483647, 0\)": {"crop": (0, 2147483647, 8, 8)},
}
BAD_OUTPUTS = {
    r"a network output of 8x0 pixels": {"network": (0, 8)},
    r"a region of 9x1 at \(0, 0\) does not lie inside the network output of 8x8": {"region": (0, 0, 1, 9)},
}


@pytest.mark.parametrize(("message", "given"), [*BAD_SPECS.items(), *BAD_INPUTS.items()])
def test_refused_input_specs(message: str, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        InputSpec(**{"format": "rgb", **SIZES, **given})


@pytest.mark.parametrize(("message", "given"), [*BAD_SPECS.items(), *BAD_OUTPUTS.items()])
def test_refused_output_specs(message: str, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        OutputSpec(**{"format": "rgb", **SIZES, **given})


@pytest.mark.parametrize("threads", (0, -1, 65))
def test_refused_threads(threads: int) -> None:
    with pytest.raises(InputError, match=f"threads = {threads}; allowed are 1 to 64"):
        InputPlan(InputSpec("rgb", **SIZES), threads)
    with pytest.raises(InputError, match=f"threads = {threads}; allowed are 1 to 64"):
        OutputPlan(OutputSpec("rgb", **SIZES), threads)


GOOD = np.zeros((8, 8, 3), np.uint8)
BAD_FRAMES = {
    r"plane 0 \[8, 8, 4\] of format 'B'; allowed are 8 rows of 24 uint8 each \(rgb 8x8\)": np.zeros(
        (8, 8, 4), np.uint8
    ),
    r"plane 0 \[8, 8, 3\] of format 'f'": np.zeros((8, 8, 3), np.float32),
    r"plane 0 \[8, 8, 3\] of format 'b'": np.zeros((8, 8, 3), np.int8),
    r"plane 0 \[8, 8, 3\]": np.zeros((8, 16, 3), np.uint8)[:, ::2],
    r"a frame \[191\] of format 'B'; allowed are 192 contiguous uint8 \(rgb 8x8\), or a tuple of planes": bytes(191),
    r"a frame \[192\]": np.zeros(384, np.uint8)[::2],
    r"a frame of 2 planes; rgb has 1": (GOOD, GOOD),
    r"a frame of 0 planes": [],
    r"a frame of type str: it must be memory": "pixels",
    r"a plane of type NoneType: it must be memory": (None,),
}


@pytest.mark.parametrize("message", BAD_FRAMES)
def test_refused_frames(message: str) -> None:
    plan = InputPlan(InputSpec("rgb", **SIZES))
    with pytest.raises(InputError, match=message):
        plan.run(np.empty((3, 8, 8), np.float32), BAD_FRAMES[message])


def test_refused_planes_of_yuv() -> None:
    plan, network = InputPlan(InputSpec("yuv420", (9, 9), (9, 9))), np.empty((3, 9, 9), np.float32)
    y, u = np.zeros((9, 9), np.uint8), np.zeros((5, 5), np.uint8)
    with pytest.raises(InputError, match=r"plane 2 \[4, 5\] of format 'B'; allowed are 5 rows of 5 uint8"):
        plan.run(network, (y, u, u[:4]))
    with pytest.raises(InputError, match="a frame of 2 planes; yuv420 has 3"):
        plan.run(network, (y, u))
    with pytest.raises(InputError, match=r"a frame \[9, 9\] of format 'B'; allowed are 131 contiguous uint8"):
        plan.run(network, y)


def test_frames_that_cannot_be_written() -> None:
    plan, network = OutputPlan(OutputSpec("rgb", **SIZES)), np.zeros((3, 8, 8), np.float32)
    with pytest.raises(InputError, match="a frame of type bytes: it must be writable memory"):
        plan.run(bytes(192), network)
    locked = GOOD.copy()
    locked.flags.writeable = False
    with pytest.raises(InputError, match="a frame of type ndarray: it must be writable memory"):
        plan.run(locked, network)


@pytest.mark.parametrize(
    ("message", "network"),
    {
        r"a network tensor \[8, 8, 3\] of format 'f'; allowed is a contiguous float32 \[3, 8, 8\]": np.zeros(
            (8, 8, 3), np.float32
        ),
        r"a network tensor \[3, 8, 8\] of format 'd'": np.zeros((3, 8, 8)),
        r"a network tensor \[3, 8, 8\] of format 'e'": np.zeros((3, 8, 8), np.float16),
        r"a network tensor \[3, 8, 8\] of format '>f'": np.zeros((3, 8, 8), ">f4"),
        r"a network tensor \[2, 3, 8, 8\]": np.zeros((2, 3, 8, 8), np.float32),
        r"a network tensor \[3, 8, 8\] of format 'f'": np.zeros((8, 8, 3), np.float32).transpose(2, 0, 1),
        r"a network tensor of type list: it must be": [0.0],
    }.items(),
)
def test_refused_network_tensors(message: str, network: Any) -> None:
    with pytest.raises(InputError, match=message):
        OutputPlan(OutputSpec("rgb", **SIZES)).run(GOOD.copy(), network)
    with pytest.raises(InputError, match=message.replace("it must be", "it must be writable")):
        InputPlan(InputSpec("rgb", **SIZES)).run(network, GOOD)


def test_a_tensor_whose_memory_cannot_be_shared() -> None:
    torch = pytest.importorskip("torch")
    plan = OutputPlan(OutputSpec("rgb", **SIZES))
    with pytest.raises(InputError, match=r"a network tensor of type Parameter: its memory cannot be shared: .*grad"):
        plan.run(GOOD.copy(), torch.nn.Parameter(torch.zeros(3, 8, 8)))

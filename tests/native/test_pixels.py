"""The CPU's conversions are the specification's: the same bits as in float32, within rounding of float64."""

import itertools
from typing import Any

import numpy as np
import pytest

from fastpix2pix.runtime.native import InputPlan, InputSpec, OutputPlan, OutputSpec
from fastpix2pix.runtime.pixel_spec import frame_planes, network_input

FORMATS = ("rgb", "bgr", "rgba", "nv12", "yuv420")
LAYOUTS, TYPES = ("nchw", "nhwc"), ("float32", "float16")
MATRICES, RANGES, FILTERS = ("bt601", "bt709"), ("limited", "full"), ("bilinear", "bicubic", "area")

# frame, network, crop, place: (top, left, height, width)
GEOMETRIES: dict[str, dict[str, Any]] = {
    "as it is": {"frame": (12, 16), "network": (12, 16)},
    "odd": {"frame": (11, 17), "network": (11, 17)},
    "one pixel": {"frame": (1, 1), "network": (1, 1)},
    "one pixel, reflected to more": {"frame": (1, 1), "network": (3, 4), "place": (1, 1, 1, 1)},
    "one row": {"frame": (1, 9), "network": (1, 9)},
    "longer than a vector and than a bite": {"frame": (3, 1031), "network": (3, 1031)},
    "odd crop": {"frame": (13, 19), "network": (6, 8), "crop": (3, 5, 6, 8)},
    "crop of one pixel at the corner": {"frame": (13, 19), "network": (1, 1), "crop": (12, 18, 1, 1)},
    "padded": {"frame": (7, 9), "network": (16, 16), "place": (4, 3, 7, 9)},
    "padded by more than its size": {"frame": (3, 2), "network": (16, 16), "place": (5, 9, 3, 2)},
    "reduced": {"frame": (37, 53), "network": (16, 16)},
    "enlarged": {"frame": (5, 7), "network": (16, 24)},
    "reduced to a pixel": {"frame": (9, 31), "network": (1, 1)},
    "more rows in a window than are added at once": {"frame": (80, 41), "network": (2, 3)},
    "one axis only": {"frame": (16, 31), "network": (16, 16)},
    "letterbox of an odd crop": {
        "frame": (33, 51),
        "network": (32, 32),
        "crop": (1, 3, 31, 45),
        "place": (5, 0, 22, 32),
    },
}

LARGE = (  # enough pixels for several threads
    {"frame": (401, 719), "network": (401, 719)},
    {"frame": (401, 919), "network": (96, 80), "crop": (1, 3, 399, 913), "place": (5, 0, 80, 80)},
    {"frame": (97, 53), "network": (705, 659), "place": (3, 9, 699, 641)},
    {"frame": (701, 719), "network": (2, 3)},  # fewer rows than threads
)


def planes_of(format: str, size: tuple[int, int], seed: int = 0, padding: int = 0) -> list[Any]:
    """Random planes; with `padding` their rows lie that many bytes further apart."""
    height, width = size
    h, w = (height + 1) // 2, (width + 1) // 2
    shapes: dict[str, list[tuple[int, ...]]] = {
        "rgba": [(height, width, 4)],
        "nv12": [(height, width), (h, w, 2)],
        "yuv420": [(height, width), (h, w), (h, w)],
    }
    rng = np.random.default_rng(seed)
    planes = []
    for shape in shapes.get(format, [(height, width, 3)]):
        row = int(np.prod(shape[1:]))
        memory = rng.integers(0, 256, (shape[0], row + padding), dtype=np.uint8)
        planes.append(memory[:, :row].reshape(shape) if not padding else _strided(memory, shape))
    return planes


def _strided(memory: Any, shape: tuple[int, ...]) -> Any:
    inner = np.cumprod((1, *shape[:0:-1]))[:-1][::-1]
    return np.lib.stride_tricks.as_strided(memory, shape, (memory.strides[0], *inner))


def empty_network(options: dict[str, Any]) -> Any:
    height, width = options["network"]
    shape = (height, width, 3) if options.get("layout") == "nhwc" else (3, height, width)
    return np.full(shape, np.nan, options.get("dtype", "float32"))


def units_of(options: dict[str, Any], seed: int = 1) -> Any:
    """A network's output over more than -1..1, as networks without a last tanh have it."""
    shape = empty_network(options).shape
    return np.random.default_rng(seed).uniform(-1.2, 1.2, shape).astype(options.get("dtype", "float32"))


def check_input(options: dict[str, Any], threads: int = 1, padding: int = 0) -> Any:
    planes = planes_of(options["format"], options["frame"], padding=padding)
    got = empty_network(options)
    InputPlan(InputSpec(**options), threads).run(got, tuple(planes))
    np.testing.assert_array_equal(got, network_input(planes, **options, real=np.float32), strict=True)
    exact = network_input(planes, **{**options, "dtype": "float64"}, real=np.float64)
    step = 2**-11 if options.get("dtype") == "float16" else 0.0
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=0, atol=step + 4e-6)
    return got


def check_output(options: dict[str, Any], threads: int = 1, padding: int = 0) -> None:
    output = units_of(options)
    planes = planes_of(options["format"], options["frame"], padding=padding)
    OutputPlan(OutputSpec(**options), threads).run(tuple(planes), output)
    wanted = frame_planes(output, **options, real=np.float32)
    exact = frame_planes(output, **options, real=np.float64)
    for got, same, near in zip(planes, wanted, exact, strict=True):
        np.testing.assert_array_equal(got, same, strict=True)
        difference = np.abs(got.astype(int) - near)
        # a value within float32's rounding of x.5; chroma's mean of four puts many exactly there in float16
        assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def way_back(geometry: dict[str, Any]) -> dict[str, Any]:
    """The geometry of the output that undoes an input's: what lay at `place` fills the whole frame."""
    given = {"frame": geometry["frame"], "network": geometry["network"]}
    return {**given, "region": geometry["place"]} if "place" in geometry else given


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_format_and_geometry(format: str, name: str) -> None:
    geometry = GEOMETRIES[name]
    for layout, dtype in itertools.product(LAYOUTS, TYPES):
        check_input({"format": format, **geometry, "layout": layout, "dtype": dtype})
        check_output({"format": format, **way_back(geometry), "layout": layout, "dtype": dtype})


@pytest.mark.parametrize("format", ("nv12", "yuv420"))
@pytest.mark.parametrize(("matrix", "range"), list(itertools.product(MATRICES, RANGES)))
def test_every_matrix_and_range(format: str, matrix: str, range: str) -> None:
    for name in ("odd", "reduced"):
        geometry = GEOMETRIES[name]
        check_input({"format": format, **geometry, "matrix": matrix, "range": range})
        check_output({"format": format, **way_back(geometry), "matrix": matrix, "range": range})


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_filter(filter: str, format: str) -> None:
    for name in ("reduced", "enlarged", "letterbox of an odd crop", "reduced to a pixel", "one axis only"):
        geometry = GEOMETRIES[name]
        for layout in LAYOUTS:
            check_input({"format": format, **geometry, "filter": filter, "layout": layout})
            check_output({"format": format, **way_back(geometry), "filter": filter, "layout": layout})


@pytest.mark.parametrize("fill", (0.0, 114.0, 255.0))
@pytest.mark.parametrize("format", ("rgb", "nv12"))
def test_constant_borders(fill: float, format: str) -> None:
    options = {"format": format, **GEOMETRIES["letterbox of an odd crop"], "border": "constant", "fill": fill}
    got = check_input(options)
    assert (got[:, :5] == np.float32(fill) / np.float32(127.5) - 1).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", (2, 3, 64))
def test_threads_and_strided_planes_change_nothing(format: str, threads: int) -> None:
    for geometry in (*LARGE, GEOMETRIES["one pixel"]):
        check_input({"format": format, **geometry}, threads, padding=5)
        check_output({"format": format, **way_back(geometry)}, threads, padding=5)


@pytest.mark.parametrize("format", FORMATS)
def test_frames_come_as_one_buffer_planes_or_upside_down(format: str) -> None:
    size = (9, 14)
    planes = planes_of(format, size)
    plan = InputPlan(InputSpec(format, size, size))
    wanted = network_input(planes, format=format, frame=size, network=size, real=np.float32)
    whole = np.concatenate([plane.ravel() for plane in planes])
    frames = [
        whole,
        whole.tobytes(),
        bytearray(whole),
        tuple(planes),
        [plane.reshape(len(plane), -1) for plane in planes],
    ]
    for frame in [*frames, whole[None]] if len(planes) > 1 else [*frames, planes[0]]:
        got = np.empty_like(wanted)
        plan.run(got, frame)
        np.testing.assert_array_equal(got, wanted)
    flipped = [plane[::-1] for plane in planes]
    plan.run(got, flipped)
    np.testing.assert_array_equal(got, network_input(flipped, format=format, frame=size, network=size, real=np.float32))


def test_torch_tensors_share_their_memory() -> None:
    torch = pytest.importorskip("torch")
    size = (6, 8)
    [frame] = planes_of("rgb", size)
    network = torch.full((1, 3, *size), torch.nan)
    InputPlan(InputSpec("rgb", size, size)).run(network, torch.from_numpy(frame))
    np.testing.assert_array_equal(
        network[0].numpy(), network_input([frame], format="rgb", frame=size, network=size, real=np.float32)
    )
    back = torch.zeros((*size, 3), dtype=torch.uint8)
    OutputPlan(OutputSpec("rgb", size, size)).run(back, network)
    np.testing.assert_array_equal(back.numpy(), frame)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ("rgb", "bgr", "rgba"))
def test_all_levels_come_back_as_they_were(format: str, layout: str, dtype: str) -> None:
    [frame] = planes_of(format, (16, 48))
    frame[..., :3] = np.arange(16 * 48).reshape(16, 48, 1) % 256
    options: dict[str, Any] = {
        "format": format,
        "frame": (16, 48),
        "network": (16, 48),
        "layout": layout,
        "dtype": dtype,
    }
    network, back = empty_network(options), np.empty_like(frame)
    InputPlan(InputSpec(**options)).run(network, frame)
    OutputPlan(OutputSpec(**options)).run(back, network)
    np.testing.assert_array_equal(back[..., :3], frame[..., :3])
    assert format != "rgba" or (back[..., 3] == 255).all()


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("range", RANGES)
@pytest.mark.parametrize("format", ("nv12", "yuv420"))
def test_colours_of_flat_blocks_come_back(format: str, matrix: str, range: str) -> None:
    rng = np.random.default_rng(3)
    rgb = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    same: dict[str, Any] = {"frame": (16, 20), "network": (16, 20)}
    units, planes, again, back = (
        empty_network(same),
        planes_of(format, (16, 20)),
        empty_network(same),
        np.empty_like(rgb),
    )
    InputPlan(InputSpec("rgb", **same)).run(units, rgb)
    OutputPlan(OutputSpec(format, **same, matrix=matrix, range=range)).run(tuple(planes), units)
    InputPlan(InputSpec(format, **same, matrix=matrix, range=range)).run(again, tuple(planes))
    OutputPlan(OutputSpec("rgb", **same)).run(back, again)
    # 8 bits hold a colour to half a level of Y, U and V, and V weighs up to 1.6 (full) or 1.8 (limited) in red
    assert np.abs(back.astype(int) - rgb).max() <= (2 if range == "limited" else 1) + 1


def test_known_colours_of_bt709() -> None:
    """White, black, red and blue as ITU-R BT.709 has them in limited range."""
    rgb = np.zeros((8, 2, 3), np.uint8)
    rgb[0:2], rgb[4:6, :, 0], rgb[6:8, :, 2] = 255, 255, 255
    units, planes = np.empty((3, 8, 2), np.float32), planes_of("yuv420", (8, 2))
    InputPlan(InputSpec("rgb", (8, 2), (8, 2))).run(units, rgb)
    OutputPlan(OutputSpec("yuv420", (8, 2), (8, 2))).run(tuple(planes), units)
    assert planes[0][::2, 0].tolist() == [235, 16, 63, 32]
    assert planes[1][:, 0].tolist() == [128, 128, 102, 240]
    assert planes[2][:, 0].tolist() == [128, 128, 240, 118]


@pytest.mark.parametrize("dtype", TYPES)
def test_values_no_network_should_give(dtype: str) -> None:
    values = [np.nan, np.inf, -np.inf, 7.0, -7.0, 0.0, -0.0, 1.0, -1.0, 2.0**-24, -(2.0**-24)]
    output = np.array(values, dtype).reshape(1, 1, -1).repeat(3, axis=0)
    frame = np.empty((1, len(values), 3), np.uint8)
    OutputPlan(OutputSpec("rgb", (1, len(values)), (1, len(values)), dtype=dtype)).run(frame, output)
    assert frame[0, :, 0].tolist() == [0, 255, 0, 255, 0, 128, 128, 255, 0, 128, 127]


def test_a_nan_that_weighs_nothing_does_not_spread() -> None:
    options: dict[str, Any] = {"format": "rgb", "frame": (16, 16), "network": (12, 12)}
    output = units_of(options)
    output[:, 0] = np.nan
    frame = np.empty((16, 16, 3), np.uint8)
    OutputPlan(OutputSpec(**options)).run(frame, output)
    np.testing.assert_array_equal(frame, frame_planes(output, **options, real=np.float32)[0])
    assert (frame[0] == 0).all() and (frame[8:] > 0).any()


def test_resizing_is_pillows() -> None:
    """Pillow rounds between its two passes and computes in fixed point: within one level."""
    from PIL import Image

    rng = np.random.default_rng(5)
    image = rng.integers(80, 176, (90, 150, 3), dtype=np.uint8)  # so that nothing is clipped between the passes
    for filter, method in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        for size in ((32, 32), (128, 200)):
            units, got = np.empty((*size, 3), np.float32), np.empty((*size, 3), np.uint8)
            InputPlan(InputSpec("rgb", (90, 150), size, filter=filter, layout="nhwc")).run(units, image)
            OutputPlan(OutputSpec("rgb", size, size, layout="nhwc")).run(got, units)
            wanted = np.asarray(Image.fromarray(image).resize(size[::-1], method))
            assert np.abs(got.astype(int) - wanted).max() <= 1

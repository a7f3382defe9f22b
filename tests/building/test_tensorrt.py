import re
import signal

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from fastpix2pix.building.tensorrt import (
    Layer,
    build_engine,
    layers,
    not_supported_reasons,
    parsed,
    precisions,
    shapes,
    wanted,
)
from fastpix2pix.config import Build, Form, Generator, Modes
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.runtime.tensorrt_library import library, missing, target_for

KNOWN = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


def rtx(**options) -> Build:
    return Build(target="tensorrt-rtx", **options)


# What a target cannot honour


@pytest.mark.parametrize(
    "build, precision, here, said",
    [
        (rtx(), "fp16", None, "no GPU here to build for; say which: capabilities = sm75,sm80"),
        (rtx(capabilities="sm90"), "fp16", None, "does not know sm90, only .*use target = tensorrt, on the GPU"),
        (rtx(capabilities="sm100"), "fp16", None, "does not know sm100"),
        (rtx(capabilities="sm80,hopper"), "fp16", None, "does not know hopper"),
        (rtx(), "fp16", "sm90", "does not know sm90"),
        (rtx(capabilities="sm80,sm89"), "fp8", None, "fp8 needs sm89 or later, not sm80"),
        (rtx(capabilities="sm75"), "bf16", None, "bf16 needs sm80 or later, not sm75"),
        (rtx(capabilities="sm80", timing_cache="f"), "fp16", None, "timing_cache = f would stay empty"),
        (rtx(capabilities="sm80", version_compatible=True), "fp16", "sm80", "version_compatible = True needs"),
        (rtx(capabilities="sm80", refit=True), "fp16", None, "refit = True only on a GPU"),
        (rtx(capabilities="sm80", strip=True), "fp16", None, "strip = True only on a GPU"),
        (Build(target="tensorrt"), "fp16", None, "none is used here; target = tensorrt-rtx with capabilities = sm80"),
        (
            Build(target="tensorrt", capabilities="sm80"),
            "fp16",
            "sm80",
            "capabilities = sm80 belongs to target = tensorrt-rtx",
        ),
        (Build(target="tensorrt"), "fp8", "sm80", "fp8 needs sm89"),
        (Build(capabilities="sm80"), "fp16", "sm80", "capabilities = sm80 belongs to engines"),
        (Build(workspace=64), "fp16", None, "workspace = 64 belongs to engines"),
        (Build(timing_cache="f"), "fp16", None, "timing_cache = f belongs to engines"),
        (Build(version_compatible=True), "fp16", None, "version_compatible = True belongs to engines"),
        (Build(refit=True), "fp16", None, "refit = True belongs to engines"),
        (Build(strip=True), "fp16", None, "strip = True belongs to engines"),
    ],
)
def test_what_a_target_cannot_honour_is_said_before(build, precision, here, said):
    reasons = not_supported_reasons(build, precision, KNOWN if build.target == "tensorrt-rtx" else (), here)
    assert len(reasons) == 1
    assert re.search(said, reasons[0])


@pytest.mark.parametrize(
    "build, precision, here",
    [
        (rtx(capabilities="sm80,sm86,sm89,sm120"), "int8", None),
        (rtx(capabilities="sm89"), "fp8", None),
        (rtx(workspace=256), "bf16", "sm80"),
        (rtx(refit=True, strip=True), "fp16", "sm86"),
        (Build(target="tensorrt", version_compatible=True, refit=True, strip=True, timing_cache="f"), "fp8", "sm90"),
        (Build(pixels="uint8", batch="1,2,4"), "bf16", None),
    ],
)
def test_what_it_can_is_not_refused(build, precision, here):
    assert not_supported_reasons(build, precision, KNOWN if build.target == "tensorrt-rtx" else (), here) == []


def test_all_reasons_at_once():
    build = rtx(capabilities="sm90", refit=True, timing_cache="f")
    assert len(not_supported_reasons(build, "fp16", KNOWN, None)) == 3


def test_which_gpus_are_meant():
    assert wanted(rtx(capabilities=" sm80, SM86 ,sm80"), "sm75") == ("sm80", "sm86")
    assert wanted(rtx(), "sm86") == ("sm86",)
    assert wanted(rtx(), None) == ()


# The library


def test_capabilities_are_those_of_the_binding():
    found = library("tensorrt-rtx").capabilities
    assert set(KNOWN) <= set(found)
    assert not {"sm90", "sm100"} & set(found)
    assert list(found) == sorted(found, key=lambda name: int(name[2:]))


def test_which_target_runs_on_a_gpu():
    assert target_for("sm86") == "tensorrt-rtx"
    assert target_for("sm80") == "tensorrt-rtx" if missing("tensorrt") else "tensorrt"
    if missing("tensorrt"):
        with pytest.raises(EnvironmentFailed, match="does not know sm90; TensorRT is not installed; pip install"):
            target_for("sm90")
    else:
        assert target_for("sm90") == "tensorrt"


def test_a_missing_library_names_its_installation():
    if not missing("tensorrt"):
        pytest.skip("the full TensorRT is installed")
    with pytest.raises(EnvironmentFailed, match=r"TensorRT is not installed; pip install 'fastpix2pix\[tensorrt13\]'"):
        library("tensorrt")
    with pytest.raises(InputError, match="allowed are tensorrt, tensorrt-rtx"):
        library("openvino")


def save(path, nodes, input_shape, *, dtype=T.FLOAT, output="y", weights=(), opset=20):
    x = helper.make_tensor_value_info("input", dtype, input_shape)
    y = helper.make_tensor_value_info(output, dtype, None)
    tensors = [numpy_helper.from_array(value, name) for name, value in weights]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def conv(path, shape, dtype=T.FLOAT):
    """input -> conv 3x3 -> relu."""
    kind = np.float32 if dtype == T.FLOAT else np.float16
    w = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(kind)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    return save(path, nodes, shape, dtype=dtype, weights=[("w", w)])


def test_layers_of_the_network_have_the_types_of_the_file(tmp_path):
    path = conv(tmp_path / "half.onnx", [1, 3, 32, 32], T.FLOAT16)
    with parsed(library("tensorrt-rtx"), path) as (_, network):
        found = layers(network)
    assert [(x.kind, x.precision) for x in found if x.kind != "CONSTANT"] == [
        ("CONVOLUTION", "fp16"),
        ("ACTIVATION", "fp16"),
    ]
    assert precisions(found) == {"convolution": {"fp16": 1}, "activation": {"fp16": 1}}


def test_precisions_count_kinds():
    found = [Layer("a", "CONVOLUTION", "fp16"), Layer("b", "CONVOLUTION", "fp32"), Layer("c", "CONVOLUTION", "fp16")]
    assert precisions(found) == {"convolution": {"fp16": 2, "fp32": 1}}


def test_every_error_of_the_parser_is_said(tmp_path):
    nodes = [helper.make_node("Det", ["input"], ["h"]), helper.make_node("Unique", ["h"], ["y"])]
    path = save(tmp_path / "bad.onnx", nodes, [4, 4])
    with pytest.raises(InputError, match=r"TensorRT-RTX .* cannot parse .*bad.onnx:\n.*Det(.|\n)*Unique"):
        build_engine(library("tensorrt-rtx"), path, rtx(), {}, ["sm80"])


@pytest.mark.parametrize("content, said", [("hello", "is it an ONNX file"), ("import this", "cannot parse")])
def test_a_file_that_is_no_onnx_is_refused(tmp_path, content, said):
    (tmp_path / "x.onnx").write_text(content)
    with pytest.raises(InputError, match=said):
        build_engine(library("tensorrt-rtx"), tmp_path / "x.onnx", rtx(), {}, ["sm80"])


def test_one_file_for_many_gpus_and_progress(tmp_path):
    path = conv(tmp_path / "a.onnx", [1, 3, 32, 32])
    seen = []
    found = build_engine(
        library("tensorrt-rtx"), path, rtx(workspace=64), {}, ["sm80", "sm86", "sm89", "sm120"],
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert len(found.data) > 1000
    assert len(found.layers) >= 2
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert all(done <= total for done, total in seen)
    assert seen[-1][0] == seen[-1][1]


def test_stopping_ends_the_build(tmp_path):
    path = conv(tmp_path / "a.onnx", [1, 3, 32, 32])
    with pytest.raises(KeyboardInterrupt):
        build_engine(library("tensorrt-rtx"), path, rtx(), {}, ["sm80"], stop=lambda: True)


def test_an_error_of_the_callers_progress_ends_the_build_and_arrives(tmp_path, capfd):
    def progress(done, total):
        raise ZeroDivisionError

    path = conv(tmp_path / "a.onnx", [1, 3, 32, 32])
    with pytest.raises(ZeroDivisionError):
        build_engine(library("tensorrt-rtx"), path, rtx(), {}, ["sm80"], progress=progress)
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_ends_the_build(tmp_path, capfd):
    """The signal comes while the library builds; an exception out of its callbacks would be swallowed there."""
    seen = []

    def progress(done, total):
        seen.append(done)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)

    path = conv(tmp_path / "a.onnx", [1, 3, 32, 32])
    with pytest.raises(KeyboardInterrupt):
        build_engine(library("tensorrt-rtx"), path, rtx(), {}, ["sm80"], progress=progress)
    assert seen == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capfd.readouterr() == ("", "")


def test_dynamic_inputs_need_shapes(tmp_path):
    path = conv(tmp_path / "a.onnx", ["n", 3, "h", "w"])
    found = library("tensorrt-rtx")
    with pytest.raises(InputError, match="dynamic axes are input"):
        build_engine(found, path, rtx(), {}, ["sm80"])
    ends = (1, 3, 32, 32), (2, 3, 64, 64), (4, 3, 128, 96)
    assert build_engine(found, path, rtx(), {"input": ends}, ["sm80"]).data
    with pytest.raises((InputError, EnvironmentFailed)):
        build_engine(found, path, rtx(), {"input": (ends[2], ends[1], ends[0])}, ["sm80"])


def test_the_timing_cache_is_a_file(tmp_path):
    """TensorRT-RTX keeps an empty one, through the same calls; the target's own check refuses the option before."""
    path, file = conv(tmp_path / "a.onnx", [1, 3, 32, 32]), tmp_path / "folder" / "cache"
    for _ in range(2):  # made, then read
        build_engine(library("tensorrt-rtx"), path, rtx(timing_cache=str(file)), {}, ["sm80"])
        assert file.stat().st_size > 100
    file.write_bytes(b"a photo")
    with pytest.raises(InputError, match="not a timing cache"):
        build_engine(library("tensorrt-rtx"), path, rtx(timing_cache=str(file)), {}, ["sm80"])
    assert file.read_bytes() == b"a photo"


def test_a_failing_build_says_why_the_library_failed(tmp_path):
    """Refit needs a GPU: asked for past the check before, the library's own words arrive."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU it builds")
    path = conv(tmp_path / "a.onnx", [1, 3, 32, 32])
    with pytest.raises(EnvironmentFailed, match=r"did not build .*a.onnx: .*CUDA_SUCCESS"):
        build_engine(library("tensorrt-rtx"), path, rtx(refit=True), {}, ["sm80"])


# Generators. Convolutions of a depth of 5: 5 down, 5 up; 7 of the 10 blocks have a norm.


IMAGE, RUNNING = Modes("image"), Modes("running")


@pytest.mark.parametrize(
    "precision, capabilities, modes, options, why",
    [
        ("fp32", ["sm75"], IMAGE, {}, "the oldest"),
        ("fp16", ["sm80"], IMAGE, {}, "the usual one"),
        ("fp16", ["sm86", "sm120"], RUNNING, {}, "folded"),
        ("fp16", ["sm120"], IMAGE, {"up": "resize", "norm": "instance"}, "resized up-blocks, instance norm"),
        ("bf16", ["sm80", "sm86", "sm120"], IMAGE, {}, "transposed convolutions recast"),
        ("bf16", ["sm89"], RUNNING, {}, "folded"),
        ("int8", ["sm80", "sm86", "sm89", "sm120"], IMAGE, {}, "one file for all"),
        ("int8", ["sm89"], RUNNING, {"kind": "encoder_decoder", "in_channels": 1}, "quantised and folded"),
        ("fp8", ["sm89"], RUNNING, {}, "quantised"),
    ],
)
def test_every_layer_has_the_precision_asked_for(exports, precision, capabilities, modes, options, why):
    path = exports(Form(precision, 1, 32, 32), modes, **options).path
    found = build_engine(library("tensorrt-rtx"), path, rtx(), {}, capabilities)
    assert len(found.data) > 10000
    table = precisions(found.layers)
    convolutions = [x.precision for x in found.layers if x.kind in ("CONVOLUTION", "DECONVOLUTION")]
    thin = "fp16" if precision in ("int8", "fp8") else precision  # the first and the last layer
    assert convolutions == [thin, *[precision] * 8, thin]
    assert table.pop("normalization", {}) == ({"fp32": 7} if modes == IMAGE else {})
    assert not {"reduce", "batch_normalization", "scale"} & set(table), "no norm in other words"


@pytest.mark.parametrize(
    "precision, modes, pixels, why",
    [
        ("bf16", Modes("running", "random"), "uint8", "masks of every image as inputs, pixels in the graph"),
        ("int8", IMAGE, "float", "quantised"),
    ],
)
def test_dynamic_shapes_build_for_all_gpus(exports, precision, modes, pixels, why):
    made = exports(Form(precision, None, None, None, pixels), modes)
    options = rtx(size="32,64,96x128", batch="1,2,4", pixels=pixels)
    given = shapes(Generator(depth=5, ngf=4), modes, made.form, options.sizes, options.batches)
    assert tuple(given) == made.inputs
    assert build_engine(library("tensorrt-rtx"), made.path, options, given, ["sm80", "sm86", "sm89", "sm120"]).data


def test_fp8_is_refused_by_the_library_where_the_check_before_says_so(exports):
    path = exports(Form("fp8", 1, 32, 32), RUNNING).path
    with pytest.raises(EnvironmentFailed, match="fp8"):
        build_engine(library("tensorrt-rtx"), path, rtx(), {}, ["sm80"])
    assert not_supported_reasons(rtx(capabilities="sm80"), "fp8", KNOWN, None)

"""Exported files: what ONNX Runtime computes from them, and what is in them."""

import json
import sys
from dataclasses import asdict

import onnx
import pytest
import torch

from fastpix2pix.building import onnx_graph
from fastpix2pix.building.onnx_graph import export_onnx
from fastpix2pix.config import Form, Generator, Modes, from_record
from fastpix2pix.errors import EnvironmentFailed, InputError
from fastpix2pix.runtime.onnx_engine import OnnxEngine

F32, F16, BF16 = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16"))
ANY = {"batch": None, "height": None, "width": None}


def exported(net, path, form, modes=None, **options):
    """The model and what export_onnx says about it."""
    file = export_onnx(net, modes or Modes(), path / "x.onnx", form, **({"record": {}} | options))
    return onnx.load(file.path), file


def types_of(model) -> dict[str, int]:
    """Element type of every tensor of a graph, by onnx's own inference."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {i.name: i.data_type for i in graph.initializer}


def operators(model) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    "options, modes, form, why",
    [
        ({}, Modes("image"), ANY, "the default generator, any size"),
        ({}, Modes("running", "random", 7), ANY, "folded; masks per image"),
        ({"norm": "instance", "up": "resize"}, Modes("image", "fixed"), ANY, "no affine part; one mask for a batch"),
        ({"depth": 6, "in_channels": 1, "out_channels": 4}, Modes("running"), {"batch": None}, "64x128, gray to four"),
        (
            {"kind": "encoder_decoder", "in_channels": 4, "out_channels": 2},
            Modes("image", "fixed"),
            {},
            "baked",
        ),
        ({"norm": "none", "dropout": "junyanz", "depth": 6}, Modes("running", "fixed"), {"batch": 3}, "batch 3"),
        ({"dropout": "none", "up": "resize", "in_channels": 2}, Modes("running", "random"), ANY, "no mask to give"),
    ],
)
def test_fp32_parity(network, pictures, tmp_path, options, modes, form, why):
    """Sizes from the least one on, with a batch of 1 and 2, whatever shape the graph was traced with."""
    net = network(**options)
    least = net.config.multiple
    model, file = exported(net, tmp_path, Form(**({"height": least, "width": 2 * least} | form)), modes)
    engine = OnnxEngine(file.path)
    sizes = [(least, least), (least, 3 * least), (4 * least, 2 * least)] if form == ANY else [(least, 2 * least)]
    for size in sizes:
        for count, first in ((1, 0), (2, 5)):
            x = pictures(count, net.config.in_channels, *size)
            with torch.no_grad():
                wanted = net(x, modes, first)
            got = engine.translate(x, first)
            assert got.shape == wanted.shape
            assert (got - wanted).abs().max() <= 1e-5, (why, size, count)
            assert wanted.std() > 0.05
    assert [i.name for i in model.graph.input] == list(file.inputs)


@pytest.mark.parametrize("norm_stats", ["image", "running"])
@pytest.mark.parametrize("precision, half", [("fp32", F32), ("fp16", F16), ("bf16", BF16)])
def test_types_are_in_the_graph(exports, norm_stats, precision, half):
    file = exports(Form(precision, 1, 32, 32), Modes(norm_stats))
    model = onnx.load(file.path)
    types, found = types_of(model), operators(model)
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            assert {types[name] for name in (*node.input, *node.output)} == {half}, node.name
        if node.op_type in ("InstanceNormalization", "Tanh"):
            assert {types[name] for name in (*node.input, *node.output)} == {F32}, node.name
    norms = [op for op in found if "Norm" in op]
    assert norms == (["InstanceNormalization"] * 7 if norm_stats == "image" else [])
    # what a norm written out would leave
    assert not {"ReduceMean", "Sqrt", "BatchNormalization"} & set(found)
    assert (found.count("Conv"), found.count("ConvTranspose"), found.count("DepthToSpace")) == (
        (10, 0, 5) if precision == "bf16" else (5, 5, 0)
    )
    casts = {"fp32": 0}.get(precision, 2 + (14 if norm_stats == "image" else 0))
    assert found.count("Cast") == casts  # none that is not needed
    assert types["input"] == types["output"] == F32
    assert file.opset == {"bf16": 22}.get(precision, 20)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", file.opset)}
    assert file.bytes == file.path.stat().st_size


def test_uint8_goes_through_casts_alone(exports):
    """TensorRT takes uint8 as the input of a cast and as the output of one, nowhere else."""
    model = onnx.load(exports(Form("bf16", **ANY, pixels="uint8"), Modes("running", "random")).path)
    types = types_of(model)
    eight = {name for name, kind in types.items() if kind == onnx.TensorProto.UINT8}
    assert eight == {"input", "output", "mask_0", "mask_1", "mask_2"}
    assert [n.op_type for n in model.graph.node if eight & set(n.input)] == ["Cast"] * 4
    assert [n.op_type for n in model.graph.node if eight & set(n.output)] == ["Cast"]
    for value in (*model.graph.input[:1], *model.graph.output):
        dims = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        assert dims[0] == "batch" and dims[3] == 3 and all(isinstance(d, str) for d in dims[1:3])


@pytest.mark.parametrize("form, wanted", [({}, [1, 3, 32, 64]), (ANY, ["batch", 3, "32*height", "32*width"])])
def test_axes_are_fixed_or_named(network, tmp_path, form, wanted):
    modes = Modes("running", "fixed")
    model, file = exported(network(), tmp_path, Form(**({"height": 32, "width": 64} | form)), modes)
    shapes = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert shapes["input"] == shapes["output"] == wanted
    if not form:  # the masks of the one size are constants
        assert file.inputs == ("input",)
        assert operators(model).count("Mul") == 3
    else:
        assert shapes["mask_1"] == [1, 16, "4*height", "4*width"]


def test_metadata_is_the_record_with_modes_and_form(network, tmp_path):
    net, modes, form = network(dropout="junyanz"), Modes("running", "fixed", 9), Form("fp16", 2, 32, 64)
    record = {"direction": "BtoA", "step": 12, "modes": {"norm_stats": "image", "noise": "off"}, "size": 64}
    model, _ = exported(net, tmp_path, form, modes, record=record)
    (found,) = model.metadata_props
    content = json.loads(found.value)
    assert found.key == "fastpix2pix"
    assert content | {"direction": "BtoA", "step": 12, "size": 64, "network": "generator"} == content
    assert from_record(Generator, content["architecture"]) == net.config
    assert from_record(Modes, content["modes"]) == modes
    assert from_record(Form, content["form"]) == form


def test_an_export_is_quiet_repeatable_and_knows_no_places(exports, network, pictures, tmp_path, capfd, recwarn):
    """Repeatable, so that the hash of a file can be a key."""
    form = Form("int8", 1, 32, 32)
    first = exports(form).path.read_bytes()
    capfd.readouterr()
    recwarn.clear()
    _, second = exported(network(), tmp_path, form, calibration=pictures(2, 3, 32, 32).split(1))
    assert second.path.read_bytes() == first
    for text in (str(tmp_path), "site-packages", ".py", "stack_trace", "pkg.torch"):
        assert text.encode() not in first, text
    assert capfd.readouterr() == ("", "")
    assert len(recwarn) == 0


@pytest.mark.parametrize(
    "form, options, match",
    [
        (Form(height=48, width=64), {}, r"size 48x64: a generator of depth 5 takes multiples of 32"),
        (Form("int8", 1, 32, 32), {}, r"precision = int8: needs images to calibrate on"),
        (
            Form("fp8", 1, 32, 32),
            {"calibration": [torch.zeros(1, 3, 64, 64)]},
            r"a calibration image of 64x64: the graph takes 32x32",
        ),
    ],
)
def test_refusals_leave_no_file(network, tmp_path, form, options, match):
    with pytest.raises(InputError, match=match):
        exported(network(), tmp_path, form, **options)
    assert list(tmp_path.iterdir()) == []


def test_too_large_for_one_file(network, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_MOST_BYTES", 10_000)
    with pytest.raises(InputError, match=r"GiB of weights in fp16: one ONNX file holds 2 GiB"):
        exported(network(), tmp_path, Form("fp16", 1, 32, 32))


def test_without_the_exporter_it_says_what_to_install(network, tmp_path, monkeypatch):
    def nothing(name):
        return None if name == "onnxscript" else object()

    monkeypatch.setattr(onnx_graph, "find_spec", nothing)
    with pytest.raises(EnvironmentFailed, match=r"made with onnxscript: pip install 'fastpix2pix\[onnx\]'"):
        exported(network(), tmp_path, Form(height=32, width=32))


def test_importing_the_exporter_loads_no_onnx():
    """`doctor`, `infer` and the help work without it."""
    import subprocess

    code = "import fastpix2pix.building.onnx_graph, fastpix2pix.building.stand_in, fastpix2pix.runtime.load, sys"
    code += "; print(*sorted({m.split('.')[0] for m in sys.modules} & {'onnx', 'onnxruntime', 'onnxscript'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert asdict(Form())["precision"] == "fp32"

"""From a generator to an ONNX file: strongly typed, the precision is in the graph."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Form, Generator, Modes
from ..errors import EnvironmentFailed, InputError
from ..files import written_aside
from ..model import Unet
from ..model.weights import FORMAT, KEY
from ..runtime.engine import INPUT, OUTPUT
from ..runtime.masks import mask_shape
from .exportable import Exportable
from .quantise import quantised

OPSETS = {"bf16": 22}  # the first whose Conv takes bf16
_OPSET = 20
_MOST_BYTES = 2**31 - 2**24  # of weights: a protobuf ends at 2 GiB


@dataclass(frozen=True)
class OnnxFile:
    """What export_onnx wrote."""

    path: Path
    form: Form
    modes: Modes
    inputs: tuple[str, ...]  # the image, then dropout masks
    opset: int
    bytes: int


def export_onnx(
    net: Unet,  # fp32
    modes: Modes,
    path: Path,
    form: Form,
    *,
    record: Mapping[str, Any],  # of the model, for the file's metadata
    calibration: Sequence[Tensor] = (),  # [1, C, H, W] fp32 in [-1, 1]: images to quantise on, for int8 and fp8
) -> OnnxFile:
    """Write the generator as ONNX and check it; see Exportable for what the graph is.

    Its metadata holds the model's record with `modes` and `form`, so that runtime/onnx_engine.py needs nothing else.
    Raises InputError for a form the generator has not, EnvironmentFailed where the exporter is not installed.
    """
    import_onnx()
    import onnx

    _check(net, form, calibration)
    graph = Exportable(net, modes, form).eval()
    if (size := sum(buffer.nbytes for buffer in graph.buffers())) > _MOST_BYTES:
        raise InputError(f"{size / 2**30:.1f} GiB of weights in {form.precision}: one ONNX file holds 2 GiB")
    with _quiet():
        model = _exported(graph, net, modes, form)
        if form.precision in ("int8", "fp8"):
            model = quantised(model, net.config, modes, form, calibration)
    _drop_notes(model)
    content = {
        **record,
        "format": FORMAT,
        "network": "generator",
        "architecture": dataclasses.asdict(net.config),
        "modes": dataclasses.asdict(modes),
        "form": dataclasses.asdict(form),
    }
    onnx.helper.set_model_props(model, {KEY: json.dumps(content)})
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    with written_aside(path) as aside:
        aside.write_bytes(data)
    opset = next(o.version for o in model.opset_import if not o.domain)
    return OnnxFile(path, form, modes, (INPUT, *graph.inputs), opset, len(data))


def import_onnx() -> None:
    """EnvironmentFailed where what the export needs is not installed."""
    if absent := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise EnvironmentFailed(f"an ONNX file is made with {', '.join(absent)}: pip install 'fastpix2pix[onnx]'")


def _check(net: Unet, form: Form, calibration: Sequence[Tensor]) -> None:
    multiple = net.config.multiple
    if form.height is not None and form.width is not None and (form.height % multiple or form.width % multiple):
        raise InputError(
            f"size {form.height}x{form.width}: a generator of depth {net.config.depth} takes multiples of {multiple}"
        )
    if form.precision in ("int8", "fp8") and not calibration:
        raise InputError(f"precision = {form.precision}: needs images to calibrate on, none were given")
    for height, width in (image.shape[2:] for image in calibration):
        if form.height not in (None, height) or form.width not in (None, width):
            raise InputError(f"a calibration image of {height}x{width}: the graph takes {form.height}x{form.width}")


def _exported(graph: Exportable, net: Unet, modes: Modes, form: Form) -> Any:
    """The ModelProto of a graph."""
    config = net.config
    n, height, width = form.batch or 2, form.height or 2 * config.multiple, form.width or 2 * config.multiple
    if form.pixels == "uint8":
        args = [torch.zeros(n, height, width, config.in_channels, dtype=torch.uint8)]
    else:
        args = [torch.zeros(n, config.in_channels, height, width)]
    for block in graph.inputs.values():
        images = n if modes.noise == "random" else 1
        args.append(torch.zeros(images, *mask_shape(config, block, height, width), dtype=torch.uint8))
    program = torch.onnx.export(
        graph,
        tuple(args),
        dynamo=True,
        opset_version=OPSETS.get(form.precision, _OPSET),
        input_names=[INPUT, *graph.inputs],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _name_axes(model, graph, config, modes, form)
    return model


def _name_axes(model: Any, graph: Exportable, config: Generator, modes: Modes, form: Form) -> None:
    """Name the axes that the form leaves open, in place of the sizes that were traced.

    No node holds a size: all are convolutions, or work on elements or on all pixels of a channel. Tracing the axes as
    symbols would take five times as long.
    """
    if form.batch is not None and form.height is not None:
        return
    del model.graph.value_info[:]  # the sizes between
    for value in (*model.graph.input, *model.graph.output):
        block = graph.inputs.get(value.name)
        rows = 1 if block is None and form.pixels == "uint8" else 2
        scale = config.multiple if block is None else 2 ** (block + 1)  # pixels per pixel of the innermost level
        names = {}
        if form.batch is None and (block is None or modes.noise == "random"):
            names[0] = "batch"
        if form.height is None:
            names |= {rows: f"{scale}*height", rows + 1: f"{scale}*width"}
        for axis, name in names.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name


def _drop_notes(model: Any) -> None:
    """What exporter and quantiser wrote about themselves: places in source files, names of tools."""
    del model.metadata_props[:]
    for item in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del item.metadata_props[:]
        item.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporter and quantiser warn about packages they do not need and about their own use of torch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

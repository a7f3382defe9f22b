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
from torch.export import Dim

from ..config import Form, Modes
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


def _exported(graph: Exportable, net: Unet, modes: Modes, form: Form) -> Any:
    """The ModelProto of a graph."""
    config = net.config
    # the exporter takes a size of 1 for a constant, so dynamic axes are shown with 2 and more
    n, height, width = form.batch or 2, form.height or 2 * config.multiple, form.width or 2 * config.multiple
    if form.pixels == "uint8":
        image = torch.zeros(n, height, width, config.in_channels, dtype=torch.uint8)
        rows, columns = 1, 2
    else:
        image = torch.zeros(n, config.in_channels, height, width)
        rows, columns = 2, 3
    batch: dict[int, Any] = {0: Dim("batch")} if form.batch is None else {}
    tall, wide = Dim("height"), Dim("width")  # of the innermost level

    def sides(rows: int, columns: int, scale: int) -> dict[int, Any]:
        if form.height is not None:
            return {}
        return {rows: scale * tall, columns: scale * wide}

    args, shapes = [image], [batch | sides(rows, columns, config.multiple)]
    for block in graph.inputs.values():
        channels, h, w = mask_shape(config, block, height, width)
        random = modes.noise == "random"
        args.append(torch.zeros(n if random else 1, channels, h, w, dtype=torch.uint8))
        scale = 2 ** (block + 1)  # pixels of the mask per pixel of the innermost level
        shapes.append((batch if random else {}) | sides(2, 3, scale))
    program = torch.onnx.export(
        graph,
        tuple(args),
        dynamo=True,
        opset_version=OPSETS.get(form.precision, _OPSET),
        input_names=[INPUT, *graph.inputs],
        output_names=[OUTPUT],
        dynamic_shapes=(shapes[0], *([tuple(shapes[1:])] if graph.inputs else [])),
        verbose=False,
    )
    assert program is not None
    return program.model_proto


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

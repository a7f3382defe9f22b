"""int8 and fp8: Q/DQ nodes around every convolution but the thin first and last ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Form, Generator, Modes
from ..data.images import to_uint8
from ..runtime.engine import INPUT
from ..runtime.masks import Masks

CONVOLUTIONS = ("Conv", "ConvTranspose")
_INT8_LARGEST, _FP8_LARGEST = 127.0, 448.0  # numbers of the two types
_LEAST_SCALE = 2.0**-20  # what fp16 still holds with some bits


def quantised(
    model: Any,  # ModelProto of an fp16 graph
    config: Generator,
    modes: Modes,
    form: Form,  # int8 or fp8
    calibration: Sequence[Tensor],  # [1, C, H, W] fp32 in [-1, 1], of a size the graph takes
) -> Any:
    """The model with inputs and weights of its convolutions quantised; a ModelProto.

    int8 by ONNX Runtime's static quantiser: symmetric, one scale per tensor and per output channel of a weight, the
    largest magnitude seen on the calibration images, biases as they are. fp8 (e4m3fn) has the same nodes and ranges.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    convolutions = [node.name for node in model.graph.node if node.op_type in CONVOLUTIONS]
    with tempfile.TemporaryDirectory(prefix="fastpix2pix-") as scratch:
        given, path = Path(scratch) / "fp16.onnx", Path(scratch) / "int8.onnx"
        onnx.save(model, given)  # of a model in memory the quantiser moves the weights out
        quantize_static(
            given,
            path,
            _Reader(config, modes, form, calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(CONVOLUTIONS),
            nodes_to_exclude=[convolutions[0], convolutions[-1]],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": list(CONVOLUTIONS),
            },
        )
        made = onnx.load(path)
    return _as_fp8(made, model) if form.precision == "fp8" else made


def _reader(config: Generator, modes: Modes, form: Form, images: Sequence[Tensor]) -> Iterator[dict[str, np.ndarray]]:
    """What the graph takes, for every image."""
    masks = Masks(config, modes, form)
    for number, image in enumerate(images):
        batch = image.expand(form.batch or 1, -1, -1, -1)
        height, width = batch.shape[2:]
        given = to_uint8(batch).permute(0, 2, 3, 1) if form.pixels == "uint8" else batch
        feed = {INPUT: given.numpy()}
        for name in masks.names:
            feed[name] = masks(name, len(batch), height, width, number).numpy()
        yield feed


class _Reader:
    """ONNX Runtime's calibration protocol."""

    def __init__(self, config: Generator, modes: Modes, form: Form, images: Sequence[Tensor]) -> None:
        self._feeds = _reader(config, modes, form, images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _as_fp8(
    made: Any,  # int8, changed in place
    model: Any,  # the fp16 graph it was made of
) -> Any:
    """Ranges of int8 as ranges of e4m3fn; weights are rounded again, from fp16."""
    from onnx import TensorProto, helper, numpy_helper

    plain = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    tensors = {i.name: i for i in made.graph.initializer}
    scales: dict[str, np.ndarray] = {}
    axes = {}
    for node in made.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            data, scale, zero = node.input
            if scale not in scales:
                wide = numpy_helper.to_array(tensors[scale]).astype(np.float32) * (_INT8_LARGEST / _FP8_LARGEST)
                scales[scale] = np.maximum(wide, _LEAST_SCALE).astype(np.float16)
                tensors[scale].CopyFrom(numpy_helper.from_array(scales[scale], scale))
                shape = tensors[zero].dims
                zeros = np.zeros(shape, np.uint8).tobytes()
                tensors[zero].CopyFrom(helper.make_tensor(zero, TensorProto.FLOAT8E4M3FN, shape, zeros, raw=True))
            if data in tensors:
                axes[data] = (scale, helper.get_node_attr_value(node, "axis"))
    for name, (scale, axis) in axes.items():
        weight = plain[name.removesuffix("_quantized")].astype(np.float32)
        steps = scales[scale].astype(np.float32).reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
        levels = torch.from_numpy(weight / steps).clamp(-_FP8_LARGEST, _FP8_LARGEST).to(torch.float8_e4m3fn)
        raw = levels.view(torch.uint8).numpy().tobytes()
        tensors[name].CopyFrom(helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, weight.shape, raw, raw=True))
    del made.graph.value_info[:]  # says int8
    return made

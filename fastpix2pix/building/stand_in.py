"""An exported graph on ONNX Runtime's CPU, whatever its precision: what the gate runs where the engine cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.onnx_engine import OnnxEngine
from .gate import Run


def stand_in(path: Path) -> tuple[Run, str]:
    """(what translates, what it is) for a file of export_onnx. Runs the file's own graph and weights, on the CPU.

    ONNX Runtime's CPU has no kernels for bf16 and fp8, and takes fp16 for fp32 from one end of a chain of nodes to the
    other, which flatters it. So every node of a half graph is computed in fp32 and its result rounded, as a GPU does
    with sums in fp32; fp8 is rounded by casts to the type and back.
    """
    import onnx

    model = onnx.load(path)
    types = {tensor.data_type for tensor in model.graph.initializer}
    for half, name in ((onnx.TensorProto.FLOAT16, "fp16"), (onnx.TensorProto.BFLOAT16, "bf16")):
        if half in types:
            if fp8 := onnx.TensorProto.FLOAT8E4M3FN in types:
                _cast_fp8(model)
            _round_nodes(model, half)
            what = f"ONNX Runtime on the CPU, rounded to {name} after every node{' and to fp8 by casts' if fp8 else ''}"
            return OnnxEngine(model.SerializeToString()).translate, what
    return OnnxEngine(path).translate, "ONNX Runtime on the CPU"


def _round_nodes(model: Any, half: int) -> None:
    """Compute every node of type `half` in fp32 between casts: from `half`, which is exact, and back."""
    from onnx import TensorProto, helper, numpy_helper, shape_inference

    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    rounded = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == half}
    for tensor in model.graph.initializer:
        if tensor.data_type == half:
            wide = numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Cast":
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if name in rounded:
                node.input[i] = f"{name}_for_{node.output[0]}"
                nodes.append(helper.make_node("Cast", [name], [node.input[i]], to=TensorProto.FLOAT))
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in rounded:
                node.output[i] = f"{name}_fp32"
                nodes.append(helper.make_node("Cast", [node.output[i]], [name], to=half))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)


def _cast_fp8(model: Any) -> None:
    """Divide and cast for QuantizeLinear, cast and multiply for DequantizeLinear; weights as the numbers they are."""
    from onnx import TensorProto, helper, numpy_helper

    tensors = {i.name: i for i in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            nodes.append(node)
            continue
        (data, scale, _), (out,) = node.input, node.output
        if data in tensors:  # a weight
            axis, levels = helper.get_node_attr_value(node, "axis"), numpy_helper.to_array(tensors[data])
            steps = numpy_helper.to_array(tensors[scale]).astype("float32")
            wide = levels.astype("float32") * steps.reshape([-1 if d == axis else 1 for d in range(levels.ndim)])
            tensors[data].CopyFrom(numpy_helper.from_array(wide.astype("float16"), data))
            nodes.append(helper.make_node("Identity", [data], [out]))
            continue
        between = f"{out}_between"
        if node.op_type == "QuantizeLinear":
            nodes.append(helper.make_node("Div", [data, scale], [between]))
            nodes.append(helper.make_node("Cast", [between], [out], to=TensorProto.FLOAT8E4M3FN, saturate=1))
        else:
            nodes.append(helper.make_node("Cast", [data], [between], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Mul", [between, scale], [out]))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)

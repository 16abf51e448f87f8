"""Parameters, multiply-accumulates and activation bytes of an ONNX file, from its graph."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, numpy_helper, shape_inference

_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "FusedConv")
_PRODUCTS = ("MatMul", "MatMulInteger", "QLinearMatMul", "Gemm")


def onnx_cost(path: Path) -> tuple[int, int | None, int, int | None]:
    """Return (num_params, macs, weight_bytes, peak_activation_bytes) for one picture.

    Stored floating or integer tensors with more than one dimension, and biases and norms with one,
    count as parameters; shapes and other int64 constants do not. macs and peak_activation_bytes are
    None where the graph's shapes cannot be inferred.
    """
    model = onnx.load(path)
    weights = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_type != TensorProto.INT64 and tensor.dims
    }
    num_params = sum(math.prod(tensor.dims) for tensor in weights.values())
    num_bytes = sum(numpy_helper.to_array(t, str(path.parent)).nbytes for t in weights.values())
    shapes = _shapes(model)
    macs: int | None = 0
    for node in model.graph.node:
        count = _node_macs(node, shapes)
        macs = None if macs is None or count is None else macs + count
    return num_params, macs, num_bytes, _peak_bytes(model, shapes)


def _shapes(model: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return tensor name to (shape, bytes an element) for a batch of one."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    del single.graph.value_info[:]
    stored = {tensor.name for tensor in single.graph.initializer}
    for value in single.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in stored and dims:
            dims[0].dim_value = 1
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(single, data_prop=True).graph
    shapes = {}
    for value in [*inferred.value_info, *inferred.input, *inferred.output]:
        tensor_type = value.type.tensor_type
        dims = tensor_type.shape.dim
        if tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            size = onnx.helper.tensor_dtype_to_np_dtype(tensor_type.elem_type).itemsize
            shapes[value.name] = (tuple(dim.dim_value for dim in dims), size)
    for tensor in single.graph.initializer:
        shapes[tensor.name] = (tuple(tensor.dims), 0)  # weights take no activation memory
    return shapes


def _node_macs(node: Any, shapes: dict[str, tuple[tuple[int, ...], int]]) -> int | None:
    """Return the multiply-accumulates of one node, None if a shape is unknown."""
    if node.op_type in _CONVOLUTIONS:
        weight = shapes.get(node.input[3 if node.op_type == "QLinearConv" else 1])
        output = shapes.get(node.output[0])
        if weight is None or output is None:
            return None
        return math.prod(output[0]) * math.prod(weight[0][1:])
    if node.op_type in _PRODUCTS:
        left = shapes.get(node.input[0])
        output = shapes.get(node.output[0])
        if left is None or output is None:
            return None
        transposed = any(a.name == "transA" and a.i == 1 for a in node.attribute)
        return math.prod(output[0]) * left[0][0 if transposed else -1]
    return 0


def _peak_bytes(model: Any, shapes: dict[str, tuple[tuple[int, ...], int]]) -> int | None:
    """Return the largest sum of live tensors over the nodes in order; None for unknown shapes."""
    nodes = model.graph.node
    last_read = {name: index for index, node in enumerate(nodes) for name in node.input}
    last_read |= {value.name: len(nodes) for value in model.graph.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    live = {value.name for value in model.graph.input if value.name not in stored}
    peak = 0
    for index, node in enumerate(nodes):
        live |= {name for name in node.output if name}
        if any(name not in shapes for name in live):
            return None
        peak = max(peak, sum(math.prod(shapes[name][0]) * shapes[name][1] for name in live))
        live = {name for name in live if last_read.get(name, -1) > index}
    return peak

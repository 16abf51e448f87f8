"""The smallest ONNX file that can be measured: one linear layer on 1x8x8 pictures."""

import onnx
from onnx import TensorProto, helper


def write_linear(path, *, width=3, num_layers=1):
    """Write ``num_layers`` more products of ``width`` behind a product of the pixels."""
    weights = [
        helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 64]),
        helper.make_tensor("weight0", TensorProto.FLOAT, [64, width], [0.01] * 64 * width),
    ]
    nodes = [
        helper.make_node("Reshape", ["images", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight0"], ["state0"]),
    ]
    for layer in range(1, num_layers):
        size = [width, width]
        weight = helper.make_tensor(
            f"weight{layer}", TensorProto.FLOAT, size, [1 / width] * width**2
        )
        weights.append(weight)
        nodes.append(
            helper.make_node("MatMul", [f"state{layer - 1}", weight.name], [f"state{layer}"])
        )
    nodes.append(helper.make_node("Identity", [f"state{num_layers - 1}"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path

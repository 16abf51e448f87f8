"""One pass of a network that averages a picture and its mirror image, for C to run it twice.

The file runs both in one batch. In C that would take twice the memory for intermediate results,
which is what a microcontroller has least of.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, numpy_helper

_COLUMNS = 3  # axis of NCHW


def one_pass(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the graph for the picture as it is; None where the file does not average in this way.

    The mean of what it gives for a picture and for its mirror image is what the whole file gives.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    producers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def values(name: str) -> list[int]:
        found = constants.get(name)
        return [] if found is None else numpy_helper.to_array(found).reshape(-1).tolist()

    def mirrors(node: NodeProto) -> bool:
        if node.op_type != "Concat" or len(node.input) != 2 or _axis(node) != 0:
            return False
        gather = producers.get(node.input[1])
        if gather is None or gather.op_type != "Gather" or _axis(gather) != _COLUMNS:
            return False
        columns = values(gather.input[1])
        backwards = columns == list(range(len(columns)))[::-1]
        return backwards and gather.input[0] == node.input[0]

    def averages(node: NodeProto) -> bool:
        if node.op_type != "ReduceMean" or values(node.input[1]) != [0]:
            return False
        view = producers.get(node.input[0])
        return view is not None and view.op_type == "Reshape" and values(view.input[1])[:1] == [2]

    pairs = [node for node in graph.node if mirrors(node)]
    means = [node for node in graph.node if averages(node)]
    if len(pairs) != 1 or len(means) != 1:
        return None
    both_logits = producers[means[0].input[0]].input[0]
    _replace(graph, {pairs[0].output[0]: pairs[0].input[0], means[0].output[0]: both_logits})
    return changed


def _axis(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def _replace(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Let what reads a name read another; drop the nodes that nothing reads any more."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    # The graph's output keeps its name.
    output = graph.output[0].name
    if output in names:
        for node in graph.node:
            node.input[:] = [output if name == names[output] else name for name in node.input]
            if output in node.output:
                node.output[0] = f"{output}_of_both"
            elif names[output] in node.output:
                node.output[:] = [output if n == names[output] else n for n in node.output]
    wanted, kept = {output}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in wanted]
    kept_constants = [TensorProto.FromString(tensor.SerializeToString()) for tensor in constants]
    del graph.initializer[:]
    graph.initializer.extend(kept_constants)

"""One pass of a network that averages a picture and its mirror image, for C to run it twice.

The file runs both in one batch. In C that would take twice the memory for intermediate results,
which is what a microcontroller has least of.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, numpy_helper

_COLUMNS = 3  # axis of NCHW
# What comes before the mirroring: the normalisation, the order and mixture of the colours.
_BY_PIXEL = ("Mul", "Add", "Sub", "Div", "Cast", "Gather", "ReduceSum")


def one_pass(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the graph for the picture as it is; None where the file does not average in this way.

    The mean of what it gives for a picture and for its mirror image is what the whole file gives.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    search = _Search(changed.graph)
    pairs = [node for node in changed.graph.node if search.mirrors(node)]
    means = [node for node in changed.graph.node if search.averages(node)]
    if len(pairs) != 1 or len(means) != 1:
        return None
    _pass_on(pairs[0], pairs[0].input[0])
    _pass_on(means[0], search.producers[means[0].input[0]].input[0])
    _drop_unread(changed.graph)
    return changed


class _Search:
    """Finds the two places where a graph becomes one of both ways and of one way again."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producers = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}

    def mirrors(self, node: NodeProto) -> bool:
        """Whether a node joins the picture, normalised at most, and its mirror image."""
        if node.op_type != "Concat" or len(node.input) != 2 or _axis(node) != 0:
            return False
        gather = self.producers.get(node.input[1])
        if gather is None or gather.op_type != "Gather" or _axis(gather) != _COLUMNS:
            return False
        columns = self._values(gather.input[1])
        backwards = columns == list(range(len(columns)))[::-1]
        return backwards and gather.input[0] == node.input[0] and self._is_by_pixel(node.input[0])

    def averages(self, node: NodeProto) -> bool:
        """Whether a node is the mean over the first axis, of two, of a reshaped tensor."""
        # Without a second input it is the mean of everything.
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            return False
        if self._values(node.input[1]) != [0]:
            return False
        view = self.producers.get(node.input[0])
        if view is None or view.op_type != "Reshape":
            return False
        return self._values(view.input[1])[:1] == [2]

    def _is_by_pixel(self, name: str) -> bool:
        node = self.producers.get(name)
        if node is None:
            return True
        if node.op_type not in _BY_PIXEL or (node.op_type == "Gather" and _axis(node) != 1):
            return False
        return all(self._is_by_pixel(given) for given in node.input)

    def _values(self, name: str) -> list[int]:
        found = self.constants.get(name)
        return [] if found is None else numpy_helper.to_array(found).reshape(-1).tolist()


def _axis(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def _pass_on(node: NodeProto, name: str) -> None:
    """Let a node give what it gets as this input."""
    del node.attribute[:]
    node.op_type = "Identity"
    node.input[:] = [name]


def _drop_unread(graph: onnx.GraphProto) -> None:
    read, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if read & set(node.output):
            read |= set(node.input)
            kept.append(NodeProto.FromString(node.SerializeToString()))
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    kept_tensors = [TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(kept_tensors)

"""Graphs of a single exit, and of the choice: what lies behind an exit is a branch of an ``If``.

stem, head 0, confidence 0
If confident: logits 0
else: next layers, head 1, confidence 1
      If confident: logits 1
      else: ...
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from understudy.export.onnx_file import OUTPUT_NAME

EXIT_NAME = "exit"


def with_choice(
    proto: onnx.ModelProto, *, thresholds: Sequence[float], temperatures: Sequence[float]
) -> onnx.ModelProto:
    """Return a graph that leaves at the first exit where every picture of the batch is confident.

    Confidence is the largest probability of the logits over the temperature; it has to be at least
    the threshold.

    Args:
        proto: its outputs are the logits of every exit, shallow to deep; it is left alone.
        thresholds: of every exit but the last; above 1 nothing leaves there.
        temperatures: of every exit; that of the last decides nothing.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    stages = _Stages(graph, thresholds, temperatures)
    nodes, tensors = stages.rest(0)
    logits = helper.make_tensor_value_info(
        OUTPUT_NAME, TensorProto.FLOAT, _dims(proto.graph.output[0])
    )
    number = helper.make_tensor_value_info(EXIT_NAME, TensorProto.INT64, [])
    for field in ("node", "initializer", "output"):
        graph.ClearField(field)
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    graph.output.extend([logits, number])
    return made


def only_exit(proto: onnx.ModelProto, number: int) -> onnx.ModelProto:
    """Return the graph of one exit alone: what its logits depend on.

    Args:
        proto: its outputs are the logits of every exit; it is left alone.
        number: of the exit.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph, output = made.graph, made.graph.output[number]
    nodes = [graph.node[index] for index in sorted(_ancestors(graph, output.name))]
    names = {name for node in nodes for name in _reads(node)}
    kept = [tensor for tensor in graph.initializer if tensor.name in names]
    for node in nodes:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                if name == output.name:
                    field[index] = OUTPUT_NAME
    output.name = OUTPUT_NAME
    parts = (("node", nodes), ("initializer", kept), ("output", [output]))
    for name, values in parts:
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        graph.ClearField(name)
        getattr(graph, name).extend(copies)
    return made


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]


class _Stages:
    """Which nodes and stored tensors each exit needs besides those of the exits before it."""

    def __init__(
        self, graph: onnx.GraphProto, thresholds: Sequence[float], temperatures: Sequence[float]
    ) -> None:
        self.thresholds, self.temperatures = thresholds, temperatures
        self.outputs = [value.name for value in graph.output]
        self.dims = _dims(graph.output[0])
        stored = {tensor.name: tensor for tensor in graph.initializer}
        taken: set[int] = set()
        placed: set[str] = set()
        self.nodes: list[list[onnx.NodeProto]] = []
        self.tensors: list[list[onnx.TensorProto]] = []
        for output in self.outputs:
            needed = _ancestors(graph, output) - taken
            taken |= needed
            # In their old order, which is one in which they can run.
            self.nodes.append([graph.node[index] for index in sorted(needed)])
            names = {name for node in self.nodes[-1] for name in _reads(node) if name in stored}
            # Where they are first read: runtimes prepare weights only beside their layer.
            self.tensors.append([stored[name] for name in sorted(names - placed)])
            placed |= names

    def rest(self, number: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Return nodes and tensors of an exit and of all behind it; they make the outputs.

        The names of the outputs are those of the file at the first exit, and others inside.
        """
        nodes, tensors = list(self.nodes[number]), list(self.tensors[number])
        outputs = _output_names(number)
        if number == len(self.outputs) - 1:
            return nodes + _leave(self.outputs[number], number, outputs), tensors
        decision, constants = self._decision(number)
        stay_nodes, stay_tensors = self.rest(number + 1)
        leaving = _leave(self.outputs[number], number, _branch_names(number))
        choice = helper.make_node(
            "If",
            [f"exit_{number}_confident"],
            list(outputs),
            name=f"exit_{number}_choice",
            then_branch=self._branch(f"leave_{number}", leaving, [], _branch_names(number)),
            else_branch=self._branch(
                f"stay_{number}", stay_nodes, stay_tensors, _output_names(number + 1)
            ),
        )
        return [*nodes, *decision, choice], [*tensors, *constants]

    def _branch(
        self,
        name: str,
        nodes: Iterable[onnx.NodeProto],
        tensors: Iterable[onnx.TensorProto],
        outputs: tuple[str, str],
    ) -> onnx.GraphProto:
        values = [
            helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, self.dims),
            helper.make_tensor_value_info(outputs[1], TensorProto.INT64, []),
        ]
        return helper.make_graph(list(nodes), name, [], values, initializer=list(tensors))

    def _decision(self, number: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Return the nodes that find out whether the whole batch is confident, as in Python."""
        prefix = f"exit_{number}_"
        constants: dict[str, np.ndarray[Any, Any]] = {
            "temperature": np.array(self.temperatures[number], np.float32),
            "threshold": np.array(self.thresholds[number], np.float32),
            "class_axis": np.array([1], np.int64),
        }
        tensors = [numpy_helper.from_array(v, prefix + name) for name, v in constants.items()]

        def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
            names = [prefix + name if name != logits else name for name in inputs]
            return helper.make_node(
                kind, names, [prefix + output], name=prefix + output + "_node", **attributes
            )

        logits = self.outputs[number]
        nodes = [
            node("Div", [logits, "temperature"], "scaled"),
            node("Softmax", ["scaled"], "probabilities", axis=1),
            node("ReduceMax", ["probabilities", "class_axis"], "confidences", keepdims=0),
            # The least sure picture decides for the batch.
            node("ReduceMin", ["confidences"], "confidence", keepdims=0),
            node("GreaterOrEqual", ["confidence", "threshold"], "confident"),
        ]
        return nodes, tensors


def _output_names(number: int) -> tuple[str, str]:
    if number == 0:
        return OUTPUT_NAME, EXIT_NAME
    return f"{OUTPUT_NAME}_from_{number}", f"{EXIT_NAME}_from_{number}"


def _branch_names(number: int) -> tuple[str, str]:
    return f"{OUTPUT_NAME}_at_{number}", f"{EXIT_NAME}_at_{number}"


def _leave(source: str, number: int, outputs: tuple[str, str]) -> list[onnx.NodeProto]:
    """Return the nodes that answer with one exit's logits and its number."""
    value = numpy_helper.from_array(np.array(number, np.int64))
    return [
        helper.make_node("Identity", [source], [outputs[0]], name=outputs[0] + "_node"),
        helper.make_node("Constant", [], [outputs[1]], name=outputs[1] + "_node", value=value),
    ]


def _ancestors(graph: onnx.GraphProto, output: str) -> set[int]:
    """Return the nodes that a value depends on, by their index."""
    made_by = {name: index for index, node in enumerate(graph.node) for name in node.output}
    found: set[int] = set()
    waiting = [output]
    while waiting:
        index = made_by.get(waiting.pop())
        if index is not None and index not in found:
            found.add(index)
            waiting += _reads(graph.node[index])
    return found


def _reads(node: onnx.NodeProto) -> list[str]:
    """Return what a node reads, in its own branches too."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            names += [name for inner in graph.node for name in _reads(inner)]
    return names

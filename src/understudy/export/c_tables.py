"""Activations between int8 values as tables of 256 entries.

ONNX Runtime computes, say, a hard swish of int8 values in float32: it dequantises, computes and
quantises again. On a microcontroller that is four times the memory and many instructions; each of
the 256 values has but one result, which is looked up instead.
"""

from __future__ import annotations

import re
import textwrap

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto

from understudy.errors import ModelError, problem

# Element i of the result is made of element i of the operands alone.
_ELEMENTWISE = frozenset(
    {"Relu", "LeakyRelu", "Clip", "Elu", "Selu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"}
    | {"Softplus", "Erf", "Abs", "Neg", "Exp", "Sqrt", "Add", "Sub", "Mul", "Div", "Max", "Min"}
)
_SHAPE = (1, 256)  # the axis of a scale, where a node names one, is 1
_DTYPES: dict[int, type] = {TensorProto.UINT8: np.uint8, TensorProto.INT8: np.int8}


Tables = dict[str, np.ndarray]


def with_tables(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Tables]:
    """Return the graph with one operator for each such chain, and by its name the chain's results.

    The results are what ONNX Runtime computes, for the bytes 0 to 255, so they stay as they were.
    ONNX has no operator for this; ``BitwiseNot`` stands in for it until ``insert_tables``.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    search = _Search(changed)
    tables: Tables = {}
    for end in [node for node in changed.graph.node if node.op_type == "QuantizeLinear"]:
        chain = search.chain(end)
        if chain is None:
            continue
        first, nodes = chain
        name = f"understudy_table_{len(tables)}"
        tables[name] = search.table(first, nodes, end)
        del end.attribute[:]
        end.op_type, end.name = "BitwiseNot", name
        end.input[:] = [first.input[0]]
        search.drop([first, *nodes])
    return changed, tables


def insert_tables(code: str, tables: Tables) -> str:
    """Return generated code with the tables, and look-ups where the stand-ins were."""
    for name, table in tables.items():
        ctype = "int8_t" if table.dtype == np.int8 else "uint8_t"
        values = ", ".join(str(value) for value in table.tolist())
        array = f"const EMX_UNUSED {ctype} {name}[256] = {{\n{textwrap.fill(values, 96)}\n}};\n"
        function = re.compile(
            rf"(?P<head>EMX_NODE_FN void \w+_{name}\(.*?)"
            r"ref_scalar_[iu]8_bitwise_not\((?P<value>input0[^)]*)\)",
            re.S,
        )
        code, count = function.subn(rf"{array}\n\g<head>{name}[(uint8_t)\g<value>]", code)
        if count != 1:
            raise ModelError(
                problem(
                    "the C code generator wrote BitwiseNot in a form that is not known",
                    expected="emx-onnx-cgen 1.4",
                    mend="Install that version.",
                )
            )
    return code


class _Search:
    """Finds what lies between an 8-bit tensor and the next."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.ends = {value.name for value in self.graph.output}

    def chain(self, end: NodeProto) -> tuple[NodeProto, list[NodeProto]] | None:
        """Return the DequantizeLinear and the operators, in their order, that lead to ``end``.

        None where more than one tensor leads there, or something else reads what is between.
        """
        if not self._has_one_scale(end):
            return None
        found: list[NodeProto] = []
        firsts: list[NodeProto] = []
        wanted = [end.input[0]]
        while wanted:
            node = self.producers.get(wanted.pop())
            if node is None:
                return None
            if node in found or node in firsts:
                continue
            if node.op_type == "DequantizeLinear":
                firsts.append(node)
            elif node.op_type in _ELEMENTWISE:
                found.append(node)
                wanted += [name for name in node.input if name and not self._is_number(name)]
            else:
                return None
        if not found or len(firsts) != 1 or not self._has_one_scale(firsts[0]):
            return None
        if self._dtype(firsts[0]) != self._dtype(end):
            return None
        inner = {name for node in (firsts[0], *found) for name in node.output}
        readers = [n for n in self.graph.node if inner & set(n.input)]
        if inner & self.ends or any(n not in found and n is not end for n in readers):
            return None
        return firsts[0], [node for node in self.graph.node if node in found]

    def table(self, first: NodeProto, nodes: list[NodeProto], end: NodeProto) -> np.ndarray:
        """Return the result for each byte."""
        dtype = self._dtype(first)
        names = {name for node in (first, *nodes, end) for name in node.input}
        graph = onnx.helper.make_graph(
            [first, *nodes, end],
            "table",
            [onnx.helper.make_tensor_value_info(first.input[0], dtype, _SHAPE)],
            [onnx.helper.make_tensor_value_info(end.output[0], self._dtype(end), None)],
            [tensor for name, tensor in self.constants.items() if name in names],
        )
        model = onnx.helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        values: np.ndarray = np.arange(256, dtype=np.uint8).view(_DTYPES[dtype]).reshape(_SHAPE)
        results: np.ndarray = session.run(None, {first.input[0]: values})[0]
        return results.reshape(-1)

    def drop(self, nodes: list[NodeProto]) -> None:
        """Remove nodes that nothing reads any more."""
        for node in nodes:
            self.graph.node.remove(node)

    def _is_number(self, name: str) -> bool:
        return name in self.constants and np.prod(self.constants[name].dims) == 1

    def _has_one_scale(self, node: NodeProto) -> bool:
        given = [name in self.constants for name in node.input[1:]]
        one_scale = len(given) == 2 and all(given) and self._is_number(node.input[1])
        return one_scale and self._dtype(node) in _DTYPES

    def _dtype(self, node: NodeProto) -> int:
        return int(self.constants[node.input[2]].data_type)

"""An int8 ONNX graph, and what ONNX Runtime would otherwise guess of it made explicit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

# Of a bias in int32: half of what fits.
_MAX_LEVEL = 2.0**30


class Int8Graph:
    """An ONNX graph with its nodes and constants by the name of what they give."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.graph = proto.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output}

    def dequantize(self, name: str) -> NodeProto | None:
        """Return the node that gives this tensor if it is a DequantizeLinear."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def array(self, name: str) -> np.ndarray | None:
        """Return a constant."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def add_constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant and return its name."""
        tensor = numpy_helper.from_array(values, name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def add_dequantize(self, name: str, inputs: Iterable[str], *, axis: int | None) -> str:
        """Add a DequantizeLinear and return the name of its output."""
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        node = onnx.helper.make_node(
            "DequantizeLinear", list(inputs), [name], name=f"{name}_node", **attributes
        )
        self.graph.node.append(node)
        self.producers[name] = node
        return name

    def quantize_bias(self, node: NodeProto) -> None:
        """Give a quantised node its bias in int32, in units of input scale times weight scale.

        Without it the last layer, whose output is not quantised, would run in float32.
        """
        features, weight = self.dequantize(node.input[0]), self.dequantize(node.input[1])
        bias = self.array(node.input[2]) if len(node.input) > 2 else None
        if features is None or weight is None or bias is None or bias.dtype != np.float32:
            return
        scale, scales = self.array(features.input[1]), self.array(weight.input[1])
        is_constant = self.array(weight.input[0]) is not None
        if scale is None or scales is None or scale.size != 1 or not is_constant:
            return
        units = np.float32(scale.reshape(())) * scales.reshape(-1)
        if units.size not in (1, bias.size):
            return
        needed = np.abs(bias).astype(np.float64) / _MAX_LEVEL
        coarse = np.maximum(units, needed.max() if units.size == 1 else needed).astype(np.float32)
        if (coarse > units).any():
            self._coarsen(node, weight, ratio=(coarse / units).astype(np.float64))
        units = coarse
        levels = np.round(bias.astype(np.float64) / units)
        name = node.output[0]
        levels_name = self.add_constant(f"{name}_bias_int32", levels.astype(np.int32))
        one = units.size == 1
        scale_name = self.add_constant(f"{name}_bias_scale", units.reshape(()) if one else units)
        node.input[2] = self.add_dequantize(
            f"{name}_bias", [levels_name, scale_name], axis=None if one else 0
        )

    def _coarsen(self, node: NodeProto, weight: NodeProto, *, ratio: np.ndarray) -> None:
        """Give a node's weight scales that are so many times as large, and fitting integers.

        A dead input (squeezed channels that are always 0, say) has so small a scale that the bias
        leaves int32, and what ONNX Runtime makes of that is wrong. Beside a bias of 2^30 units the
        weights, of at most 128 * 255 units each, are rounding.
        """
        integers, scales = self.array(weight.input[0]), self.array(weight.input[1])
        assert integers is not None, "its scales are constants"
        assert scales is not None, "read before"
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
        shape = [1] * integers.ndim
        if ratio.size > 1:
            shape[axis] = ratio.size
        rounded = np.round(integers / ratio.reshape(shape)).astype(integers.dtype)
        name = f"{node.output[0]}_coarse"
        inputs = [
            self.add_constant(f"{name}_integers", rounded),
            self.add_constant(f"{name}_scales", (scales * ratio.reshape(scales.shape)).astype("f")),
            *weight.input[2:],
        ]
        is_one = ratio.size == 1
        node.input[1] = self.add_dequantize(name, inputs, axis=None if is_one else axis)

    def keep_float(self, node: NodeProto) -> None:
        """Keep ONNX Runtime from quantising the float weight of a node between int8 tensors.

        It does so (with one scale for all channels) where the input is dequantised with one scale;
        with the same scale written once for each channel it leaves the weight alone.
        """
        features, weight = self.dequantize(node.input[0]), self.array(node.input[1])
        if features is None or weight is None or weight.dtype != np.float32:
            return
        scale, zero_point = (self.array(name) for name in features.input[1:3])
        if scale is None or zero_point is None or scale.size != 1:
            return
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        is_row = node.op_type == "Gemm" and not attributes.get("transB", 0)
        num_channels = weight.shape[0 if is_row else 1] * attributes.get("group", 1)
        name = f"{node.output[0]}_float"
        scale_name = self.add_constant(f"{name}_scale", scale.reshape(1).repeat(num_channels))
        zero_name = self.add_constant(f"{name}_zero", zero_point.reshape(1).repeat(num_channels))
        node.input[0] = self.add_dequantize(
            f"{name}_input", [features.input[0], scale_name, zero_name], axis=1
        )

    def narrow_input(self, node: NodeProto) -> None:
        """Spend no step of the input's integers on values that the node does not tell apart.

        What a hard swish or hard sigmoid makes of values beyond some bound is what it makes of the
        bound. Training with int8 arithmetic has narrowed its ranges itself.
        """
        given = self.dequantize(node.input[0])
        before = None if given is None else self.producers.get(given.input[0])
        if given is None or before is None or self._num_readers(given.output[0]) != 1:
            return
        scale, zero_point = (self.array(name) for name in given.input[1:3])
        if scale is None or zero_point is None or scale.size != 1:
            return
        integers = np.iinfo(zero_point.dtype)
        step, zero = float(scale.reshape(())), int(zero_point.reshape(()))
        low, high = step * (integers.min - zero), step * (integers.max - zero)
        lowest, highest = _flat_beyond(node)
        if (low >= lowest - step and high <= highest + step) or self._num_readers(
            given.input[0]
        ) != 1:
            return
        low, high = max(low, lowest), min(high, highest)
        step = (high - low) / (integers.max - integers.min)
        zero = round(integers.min - low / step)
        name = f"{node.output[0]}_input"
        names = [
            self.add_constant(f"{name}_scale", np.full(scale.shape, step, np.float32)),
            self.add_constant(f"{name}_zero", np.full(zero_point.shape, zero, zero_point.dtype)),
        ]
        before.input[1:], given.input[1:] = names, names

    def _num_readers(self, name: str) -> int:
        return sum(list(node.input).count(name) for node in self.graph.node)

    def sort(self) -> None:
        """Put added nodes before those that read them, and drop what nothing reads."""
        outputs = [value.name for value in self.graph.output]
        wanted, ordered, done = list(outputs), [], set()
        while wanted:
            node = self.producers.get(wanted[-1])
            if node is None or node.output[0] in done:
                wanted.pop()
                continue
            missing = [
                name
                for name in node.input
                if name in self.producers and self.producers[name].output[0] not in done
            ]
            if missing:
                wanted += missing[::-1]
                continue
            ordered.append(node)
            done.add(node.output[0])
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in ordered]
        read = {name for node in nodes for name in node.input}
        kept = [
            TensorProto.FromString(tensor.SerializeToString())
            for tensor in self.graph.initializer
            if tensor.name in read
        ]
        self.graph.ClearField("node")
        self.graph.ClearField("initializer")
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(kept)


def _flat_beyond(node: NodeProto) -> tuple[float, float]:
    """Return the bounds beyond which a hard swish or hard sigmoid does not change."""
    if node.op_type == "HardSwish":
        return -3.0, math.inf
    slope = {"alpha": 0.2, "beta": 0.5} | {a.name: a.f for a in node.attribute}
    return -slope["beta"] / slope["alpha"], (1 - slope["beta"]) / slope["alpha"]

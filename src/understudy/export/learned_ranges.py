"""What quantisation-aware training learned of each layer: ranges, and steps of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from understudy.export.tracing import module_name

_ATEN = torch.ops.aten
WEIGHTED = (
    _ATEN.conv1d.default,
    _ATEN.conv2d.default,
    _ATEN.conv2d.padding,
    _ATEN.linear.default,
)
# Done within the kernel of the layer before them.
FUSED = (_ATEN.relu.default, _ATEN.relu_.default, _ATEN.relu6.default, _ATEN.hardtanh.default)

Bounds = tuple[float, float]


@dataclass(frozen=True)
class LayerRanges:
    """What one run of a convolution or linear layer reads and gives; None: not quantised.

    Attributes:
        layer: the module's name.
        inputs, outputs: (smallest, largest) value, 0 among them.
        weight_scales: float32 [number of channels], of one step of the weights as they are folded.
    """

    layer: str
    inputs: Bounds | None
    outputs: Bounds | None
    weight_scales: Tensor | None = None


def learned_ranges(graph: GraphModule) -> list[LayerRanges]:
    """Return the ranges of a ``convert_pt2e`` graph, a row each run of a layer, in their order."""
    rows = []
    for node in graph.graph.nodes:
        if node.target in WEIGHTED:
            features = node.args[0]
            inputs = _range(features) if _is(features, "dequantize_per_tensor") else None
            scales = _weight_scales(graph, node.args[1])
            rows.append(LayerRanges(module_name(node), inputs, _output_range(node), scales))
    return rows


def _weight_scales(graph: GraphModule, weight: Any) -> Tensor | None:
    if not _is(weight, "dequantize_per_channel"):
        return None
    scales: Tensor = attrgetter(str(weight.args[1].target))(graph)
    return scales.detach().float()


def _output_range(node: Node) -> Bounds | None:
    users = list(node.users)
    while len(users) == 1 and users[0].target in FUSED:
        users = list(users[0].users)
    if len(users) == 1 and _is(users[0], "quantize_per_tensor"):
        return _range(users[0])
    return None


def _is(node: object, operator: str) -> bool:
    """Whether this is the operator of torchao's or PyTorch's own library of that name."""
    name = str(getattr(node, "target", "")).split(".")
    return operator in name


def _range(node: Node) -> Bounds:
    scale, zero_point, smallest, largest = (float(a) for a in node.args[1:5])  # type: ignore[arg-type]
    return scale * (smallest - zero_point), scale * (largest - zero_point)

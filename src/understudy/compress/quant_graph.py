"""Changes to a captured network: convolutions that train quickly, and mirror images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from understudy.models.fast_depthwise import conv2d_depthwise

_ATEN = torch.ops.aten
_ATEN_CONV2D = _ATEN.conv2d.default
_GROUPS = 6  # position of aten::conv2d's ``groups``


def grouped_conv2d(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Any:
    """Compute aten's conv2d, by the native kernels where they differ by rounding only."""
    sizes = stride, padding, dilation, groups
    filtered = conv2d_depthwise(features, weight, bias, *sizes)
    return _ATEN_CONV2D(features, weight, bias, *sizes) if filtered is None else filtered


def use_native_convolutions(graph: GraphModule) -> None:
    """Let the convolutions with groups train in the native kernels where those know them."""
    for node in graph.graph.find_nodes(op="call_function", target=_ATEN_CONV2D):
        if len(node.args) > _GROUPS:
            node.target = grouped_conv2d
    graph.recompile()


def restore_convolutions(graph: GraphModule) -> None:
    """Give the convolutions their standard operator back."""
    for node in graph.graph.find_nodes(op="call_function", target=grouped_conv2d):
        node.target = _ATEN_CONV2D
    graph.recompile()


def average_mirrored(graph: GraphModule, *, width: int, num_classes: int) -> None:
    """Make a graph of one input and output answer for pictures and their mirror images.

    That is what ``models.build.both_ways`` does with a network.

    Args:
        graph: pictures NCHW to logits NK; changed in place.
        width: W.
        num_classes: K.
    """
    (pictures,) = graph.graph.find_nodes(op="placeholder")
    users = list(pictures.users)
    graph.register_buffer("mirrored_columns", torch.arange(width - 1, -1, -1))
    with graph.graph.inserting_after(pictures):
        columns = graph.graph.get_attr("mirrored_columns")
    with graph.graph.inserting_after(columns):
        mirrored = graph.graph.call_function(_ATEN.index_select.default, (pictures, 3, columns))
    with graph.graph.inserting_after(mirrored):
        both = graph.graph.call_function(_ATEN.cat.default, ([pictures, mirrored],))
    for user in users:
        user.replace_input_with(pictures, both)
    output = graph.graph.output_node()
    logits: Any = output.args[0]
    with graph.graph.inserting_before(output):
        halves = graph.graph.call_function(_ATEN.view.default, (logits, [2, -1, num_classes]))
        mean = graph.graph.call_function(_ATEN.mean.dim, (halves, [0]))
    output.args = (mean,)
    graph.graph.lint()
    graph.recompile()

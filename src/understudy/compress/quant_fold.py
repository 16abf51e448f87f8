"""Batch norm folded into the convolution before it, in a captured graph that goes on training.

In the file the two are one convolution with the weight ``w * scale``, where ``scale = gamma /
sqrt(running variance + eps)``; that product is what must be rounded. So the training graph scales
the weight before it is rounded, and the batch norm after that computes what it did on the result
divided by the scale (Krishnamoorthi 2018, section 3.2.2).

torchao has the same rewriting, by pattern matching: for each network it captures some hundred small
patterns, which takes a hundred times as long as the conversion itself, and it sets every eps to
1e-5 and every momentum to 0.1.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from understudy.models.fast_norm import scaled_norm

CONVOLUTIONS = (torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default)
_ATEN_BATCH_NORM = torch.ops.aten.batch_norm.default
# Positions of aten::batch_norm's arguments, and of the convolution's bias after them.
SCALE, SHIFT, MEAN, VARIANCE, LEARNS, EPS, BIAS = 1, 2, 3, 4, 5, 7, 9
# A scale of zero would be divided by; this one adds nothing that float32 could show.
_MIN_NORM_SCALE = 1e-8


def batch_norm(*args: Any) -> Any:
    """Compute aten's batch norm, under a name that torchao's own folding does not look for."""
    return _ATEN_BATCH_NORM(*args)


def norm_scale(gamma: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """Return the factor [C] that a batch norm in evaluation multiplies its input by."""
    inverse = (variance + eps).rsqrt()
    return inverse if gamma is None else gamma * inverse


def scaled_weight(weight: Tensor, gamma: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """Return the weight of the convolution that the two layers become."""
    scale = norm_scale(gamma, variance, eps)
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


def folded_norm(
    features: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    learns: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
    bias: Tensor | None,
) -> Any:
    """Compute the batch norm of what the convolution with its own weight and bias would have given.

    Args:
        features: of the convolution with the scaled weight and without bias.
        bias: of the convolution.

    The others are those of aten's batch norm.
    """
    shape = (1, -1, *[1] * (features.dim() - 2))
    scale = norm_scale(gamma, variance, eps)
    if not learns:  # the scales of weight and norm cancel
        shift = (-mean if bias is None else bias - mean) * scale
        return features + (shift if beta is None else shift + beta).reshape(shape)
    factor = scale.reciprocal()  # a division's gradient takes three more passes over the features
    if gamma is not None and beta is not None and bias is None:
        parts = factor, gamma, beta, mean, variance
        normalised = scaled_norm(features, *parts, momentum=momentum, eps=eps)
        if normalised is not None:
            return normalised
    features = features * factor.reshape(shape)
    if bias is not None:
        features = features + bias.reshape(shape)
    return batch_norm(features, gamma, beta, mean, variance, True, momentum, eps, cudnn)


def lift_zero_scales(model: nn.Module) -> None:
    """Replace scales of batch norms that are (nearly) zero, as channels that were pruned have."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            scale = module.weight.data
            scale[scale.abs() < _MIN_NORM_SCALE] = _MIN_NORM_SCALE


def norm_nodes(graph: GraphModule) -> list[Node]:
    """Return the batch norms of a graph of ``prepare_norms``, folded or not."""
    return [node for node in graph.graph.nodes if node.target in (batch_norm, folded_norm)]


def prepare_norms(graph: GraphModule, float_nodes: Iterable[Node]) -> None:
    """Fold every batch norm that can be into its convolution, but for convolutions kept in float.

    Args:
        graph: captured in training mode; changed in place.
    """
    kept = set(float_nodes)
    for norm in graph.graph.find_nodes(op="call_function", target=_ATEN_BATCH_NORM):
        norm.target = batch_norm
        conv: Any = norm.args[0]
        tracked = norm.args[VARIANCE] is not None
        if conv.target in CONVOLUTIONS and len(conv.users) == 1 and tracked and conv not in kept:
            _split(graph, conv, norm)
    graph.graph.lint()
    graph.recompile()


def _split(graph: GraphModule, conv: Node, norm: Node) -> None:
    features, weight, *rest = conv.args
    scale_args = norm.args[SCALE], norm.args[VARIANCE], norm.args[EPS]
    with graph.graph.inserting_before(conv):
        scaled = graph.graph.call_function(scaled_weight, (weight, *scale_args))
    bias = rest[0] if rest else None
    conv.args = (features, scaled, None, *rest[1:])
    norm.target = folded_norm
    norm.args = (*norm.args, bias)
    scaled.meta = dict(weight.meta)  # type: ignore[union-attr]
    scaled.meta["nn_module_stack"] = conv.meta.get("nn_module_stack")


@torch.no_grad()
def merge_norms(graph: GraphModule) -> None:
    """Make each folded pair one convolution with a bias; changes the graph in place.

    The scaled weight, which goes into the rounding, becomes a constant.
    """
    for norm in norm_nodes(graph):
        if norm.target is not folded_norm:
            continue
        conv: Any = norm.args[0]
        (scaled,) = (node for node in _sources(conv.args[1]) if node.target is scaled_weight)
        name = str(scaled.args[0].target).replace(".", "_")
        gamma, variance = _value(graph, norm.args[SCALE]), _value(graph, norm.args[VARIANCE])
        eps = float(norm.args[EPS])  # type: ignore[arg-type]
        bias = -_value(graph, norm.args[MEAN])
        if norm.args[BIAS] is not None:
            bias = bias + _value(graph, norm.args[BIAS])
        bias = bias * norm_scale(gamma, variance, eps)
        if norm.args[SHIFT] is not None:
            bias = bias + _value(graph, norm.args[SHIFT])
        weight = scaled_weight(_value(graph, scaled.args[0]), gamma, variance, eps)
        weight_node = _constant(graph, f"{name}_folded", weight, before=scaled)
        scaled.replace_all_uses_with(weight_node)
        bias_node = _constant(graph, f"{name}_bias", bias, before=conv)
        conv.update_arg(2, bias_node)
        norm.replace_all_uses_with(conv)
        for node in (norm, scaled):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def restore_norms(graph: GraphModule) -> None:
    """Give the batch norms that stay their standard operator back."""
    for norm in norm_nodes(graph):
        norm.target = _ATEN_BATCH_NORM
    graph.recompile()


def _sources(node: Node) -> list[Any]:
    return [node, *node.all_input_nodes]


def _value(graph: GraphModule, node: Any) -> Any:
    return None if node is None else operator.attrgetter(node.target)(graph)


def _constant(graph: GraphModule, name: str, value: Tensor, *, before: Node) -> Node:
    # A convolution that runs several times becomes several, each with its own norm in it.
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    name = next(free for free in itertools.chain([name], numbered) if not hasattr(graph, free))
    graph.register_buffer(name, value.detach().clone())
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(name)
    node.meta = {**before.meta, "val": value}
    return node

"""Batch norm folded into the layer before it: the same function with fewer passes over memory."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from understudy.models.strided_pointwise import StridedPointwise
from understudy.teachers.tap_points import TapPoint

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def folded(module: nn.Module) -> nn.Module:
    """Return a copy with every batch norm that follows a convolution or linear layer folded in.

    What cannot be traced is left as it is, and its parts are tried one by one. Tapped layers stay
    what they are, and their insides are folded apart. The module must be in evaluation mode.
    """
    copied = copy.deepcopy(module)
    if isinstance(copied, TapPoint):
        copied.layer = _folded_inside(copied.layer)
        return copied
    try:
        tracer = _Tracer()
        graph = tracer.trace(copied)
        traced = fx.GraphModule(tracer.root, graph, type(copied).__name__)
    except Exception:
        # Tracing runs foreign code on symbols: anything may be raised, and none of it matters.
        for name, child in copied.named_children():
            setattr(copied, name, folded(child))
        return copied
    layers = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(layers[node.target], BATCH_NORMS):
            _fold_one(traced, node, layers, calls)
    traced.delete_all_unused_submodules()
    for part in [part for part in traced.modules() if isinstance(part, TapPoint)]:
        part.layer = _folded_inside(part.layer)
    traced.graph.lint()
    traced.recompile()
    return traced.eval()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, TapPoint | StridedPointwise)
        return own or super().is_leaf_module(m, module_qualified_name)


def _folded_inside(layer: nn.Module) -> nn.Module:
    # A layer without parts has nothing to fold, and traced it would be no layer any more.
    return folded(layer) if any(layer.children()) else layer


def _fold_one(
    traced: fx.GraphModule, node: fx.Node, layers: dict[str, nn.Module], calls: list[fx.node.Target]
) -> None:
    norm, before = layers[str(node.target)], node.args[0]
    if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
        return
    layer = layers[str(before.target)]
    # A layer that is called twice cannot carry the norm of one call.
    if calls.count(before.target) > 1 or getattr(norm, "running_mean", None) is None:
        return
    fused: nn.Module
    if isinstance(layer, CONVOLUTIONS) and isinstance(norm, BATCH_NORMS):
        fused = fuse_conv_bn_eval(layer, norm)
    elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        fused = fuse_linear_bn_eval(layer, norm)
    else:
        return
    traced.set_submodule(str(before.target), fused)
    with torch.no_grad():
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)

"""Taps that survive folding and fusing: a tapped layer becomes one that keeps its features.

A hook sits on a module that is called. Tracing a network for folding takes its larger modules
apart, and folding and fusing change what the small ones compute. A ``TapPoint`` is a module that
tracing leaves whole: what it holds is made faster by itself, and nothing is fused across its edge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import ModelError
from understudy.models.embedding import (
    ClassifierCall,
    classifier_hook,
    classifying,
    first_tensor,
    may_classify,
    own_copy,
)
from understudy.models.taps import EMBEDDING, Tap, as_kind, inner_network

Features = dict[str, Tensor]


class TapPoint(nn.Module):
    """A tapped layer. Every call appends its features, in each asked kind, to ``kept``.

    Args:
        layer: the layer itself.
        taps: what to keep: of what it gives; for "embedding" of what it is given.
    """

    # Fusing asks this of a layer between two others: it may change a tensor it is given.
    inplace = True

    def __init__(self, layer: nn.Module, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.layer = layer
        self.taps = tuple(taps)
        self.kept: list[tuple[str, Tensor]] = []

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return what the layer returns."""
        output = self.layer(*inputs, **options)
        for tap in self.taps:
            features = first_tensor(output)
            if tap.name == EMBEDDING:
                calls: list[ClassifierCall] = []
                classifier_hook(calls)(self.layer, inputs, options, output)
                features = calls[0].embedding_ND if calls else None
            if features is None:
                raise ModelError(f"'{tap.name}' gave no features in this forward pass")
            # A copy: what follows may write over its input.
            self.kept.append((tap.key, as_kind(own_copy(features), tap.kind)))
        return output


def with_tap_points(model: nn.Module, taps: Sequence[Tap], images_NCHW: Tensor) -> nn.Module:
    """Return a copy in which every tapped layer is a ``TapPoint``; the model itself without taps.

    Args:
        model: images to logits, in evaluation mode.
        taps: that the network has (``check_taps``).
        images_NCHW: two or more pictures, which show where the embedding is.
    """
    if not taps:
        return model
    copied = copy.deepcopy(model)
    network = inner_network(copied)
    by_layer: dict[nn.Module, list[Tap]] = {}
    for tap in taps:
        if tap.name == EMBEDDING:
            layer = _classifier(copied, images_NCHW)
        else:
            layer = network.get_submodule(tap.name)
        by_layer.setdefault(layer, []).append(tap)
    points = {layer: TapPoint(layer, layer_taps) for layer, layer_taps in by_layer.items()}
    for parent in list(copied.modules()):
        for name, child in list(parent._modules.items()):
            if child in points and not isinstance(parent, TapPoint):
                parent._modules[name] = points[child]
    return copied


def collecting(
    network: nn.Module, run: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], tuple[Tensor, Features]]:
    """Return a function from images to (logits_NK, features); ``run`` calls the network.

    It may call it several times, on consecutive parts of the images.
    """
    points = [module for module in network.modules() if isinstance(module, TapPoint)]

    def run_and_collect(images_NCHW: Tensor) -> tuple[Tensor, Features]:
        take(points)
        logits_NK = run(images_NCHW)
        return logits_NK, take(points)

    return run_and_collect


def take(points: Sequence[TapPoint]) -> Features:
    """Return the features that the points have kept, in the order of the calls, and forget them."""
    parts: dict[str, list[Tensor]] = {}
    for point in points:
        for key, features in point.kept:
            parts.setdefault(key, []).append(features)
        point.kept.clear()
    return {key: kept[0] if len(kept) == 1 else torch.cat(kept) for key, kept in parts.items()}


def _classifier(model: nn.Module, images_NCHW: Tensor) -> nn.Module:
    """Return the layer that is given the embedding, as ``Taps`` finds it."""
    calls: list[ClassifierCall] = []
    hook = classifier_hook(calls)
    network = inner_network(model)
    candidates = [module for module in network.modules() if may_classify(module)]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in candidates]
    outputs: list[Tensor] = []
    handles.append(network.register_forward_hook(lambda *call: outputs.append(call[-1])))
    try:
        with torch.no_grad():
            model(images_NCHW)
    finally:
        for handle in handles:
            handle.remove()
    logits_NK = first_tensor(outputs)
    call = None if logits_NK is None else classifying(calls, logits_NK)
    if call is None:
        raise ModelError(f"no linear layer of this network gives its logits for '{EMBEDDING}'")
    return call.module

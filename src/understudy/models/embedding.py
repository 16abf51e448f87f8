"""Finds what the last linear classifier of a network reads, in networks of any make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from understudy.models.feature_kinds import full_dtype


def first_tensor(output: Any) -> Tensor | None:
    """Return the first floating-point tensor in a module's output, in tuples and mappings too."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, list | tuple):
        return None
    tensors = (first_tensor(part) for part in output)
    return next((tensor for tensor in tensors if tensor is not None), None)


def own_copy(features: Tensor) -> Tensor:
    """Return a copy that shares no memory, in float32 at least."""
    return features.to(full_dtype(features), copy=True)


@dataclass(frozen=True, eq=False)
class ClassifierCall:
    """One call of a layer that may be the classifier: its input and output, without positions."""

    module: nn.Module
    embedding_ND: Tensor
    scores_NK: Tensor


def may_classify(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or a 1x1 convolution, or multiplies like one."""
    if isinstance(module, nn.Linear):
        return True
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    # Other people's layers with a matrix, such as cosine classifiers.
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def classifier_hook(classified: list[ClassifierCall]) -> Callable[..., None]:
    """Return a forward hook (with keyword inputs) that adds each call to the list."""

    def keep(module: nn.Module, inputs: Any, named_inputs: Any, output: Any) -> None:
        given, scores = first_tensor((inputs, named_inputs)), first_tensor(output)
        if given is None or scores is None or min(given.dim(), scores.dim()) < 2:
            return
        channel_dim = 1 if isinstance(module, nn.Conv2d) else -1
        rows = own_copy(_mean_rows(given, channel_dim))
        classified.append(ClassifierCall(module, rows, _mean_rows(scores.detach(), channel_dim)))

    return keep


def _mean_rows(features: Tensor, channel_dim: int) -> Tensor:
    """Return [N, C], the mean over every dimension but the first and that of the channels."""
    if features.dim() == 2:
        return features
    return features.movedim(channel_dim, -1).flatten(1, -2).mean(dim=1)


def classifying(classified: list[ClassifierCall], logits: Tensor) -> ClassifierCall | None:
    """Return the call that gave the logits: the last with their values, or with their shape."""
    fitting = [call for call in classified if call.scores_NK.shape == logits.shape]
    if len(fitting) > 1:
        logits = logits.detach()
        same = [c for c in fitting if torch.allclose(c.scores_NK.to(logits.dtype), logits)]
        fitting = same or fitting
    return fitting[-1] if fitting else None

"""Squeeze-and-excitation in training, in fewer passes over memory by the native kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from understudy.models.native import address, channel_kernels


def gated(
    features_NCHW: Tensor, gates_of: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]
) -> Tensor:
    """Return ``features * gates_of(means)``, the means [N, C, 1, 1] of the features over places.

    The caller has found that ``native.suits_kernels`` and that the kernels exist. The gradient with
    respect to the features is taken in two passes over them, where autograd takes eight.

    Args:
        features_NCHW: float32, channels last, at least 16 channels.
        gates_of: the means to gates of the same shape, by operations that autograd follows.
        parameters: all that ``gates_of`` trains.
    """
    result: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
        features_NCHW, gates_of, *parameters
    )
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, gates_of: Callable[[Tensor], Tensor], *parameters: Tensor
    ) -> Tensor:
        means = _sums(features, None) / (features.shape[2] * features.shape[3])
        # A graph of its own for the few numbers of the gates; autograd works on it in backward.
        with torch.enable_grad():
            means = means[:, :, None, None].requires_grad_()
            gates = gates_of(means)
        ctx.save_for_backward(features)
        ctx.graph = means, gates, parameters
        return _scaled(features, gates.detach(), None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (features,) = ctx.saved_tensors
        means, gates, parameters = ctx.graph
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        of_gates = _sums(gradient, features)[:, :, None, None]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # Kept: a caller that keeps the outer graph may come again.
        of_means, *of_trained = torch.autograd.grad(
            gates, [means, *trained], of_gates, retain_graph=True
        )
        found = iter(of_trained)
        of_parameters = [next(found) if each.requires_grad else None for each in parameters]
        offset = of_means / (features.shape[2] * features.shape[3])
        return _scaled(gradient, gates.detach(), offset), None, *of_parameters


def _sums(features: Tensor, others: Tensor | None) -> Tensor:
    """Return [N, C], the sums over places of the features or of their product with others."""
    library = channel_kernels()
    assert library is not None
    sums = features.new_empty(features.shape[:2])
    library.place_sums(address(features), address(others), address(sums), *_sizes(features))
    return sums


def _scaled(features: Tensor, scale_NC: Tensor, offset_NC: Tensor | None) -> Tensor:
    library = channel_kernels()
    assert library is not None
    result = torch.empty_like(features)
    scale = scale_NC.reshape(features.shape[:2]).contiguous()
    offset = None if offset_NC is None else offset_NC.reshape(features.shape[:2]).contiguous()
    pointers = address(features), address(scale), address(offset), address(result)
    library.place_scale(*pointers, *_sizes(features))
    return result


def _sizes(features: Tensor) -> tuple[int, int, int, int]:
    num_images, num_channels, height, width = features.shape
    return num_images, height * width, num_channels, torch.get_num_threads()

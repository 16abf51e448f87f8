"""Batch norm in training, with what comes after it, in fewer passes over memory.

The modules stay plain ``nn.BatchNorm2d``, ``nn.ReLU`` and ``nn.Hardswish``: pruning, quantisation,
hooks and exports find what they know, and only the call that trains them together is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from understudy.models.native import address, channel_kernels, suits_kernels

# Activations of kernels_norm.c.
_IDENTITY, _RELU, _HARD_SWISH = range(3)
_ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: _RELU, nn.Hardswish: _HARD_SWISH}


def norm_activation(norm: nn.Module, activation: nn.Module | None, features_NCHW: Tensor) -> Tensor:
    """Return ``activation(norm(features_NCHW))``; by one kernel where that is the same.

    That is: in training, on a CPU with AVX2 and the native kernels, for float32 channels-last
    features of at least 16 channels, with plain modules that nothing hooks and no trace of the
    graph. Gradients differ from PyTorch's by rounding only, and not with the number of threads.

    Args:
        norm: over the channels; its running averages move as PyTorch moves them.
        activation: after it; None: the function ``relu``.
        features_NCHW: of the norm's channels.
    """
    modules = [] if activation is None else [activation]
    kind = _RELU if activation is None else _ACTIVATIONS.get(type(activation))
    if kind is not None and _suits_kernels(features_NCHW, norm, *modules):
        return _normalised(norm, features_NCHW, added_NCHW=None, activation=kind)
    normalised: Tensor = norm(features_NCHW)
    return F.relu(normalised) if activation is None else activation(normalised)


def norm_add(norm: nn.Module, features_NCHW: Tensor, added_NCHW: Tensor | None) -> Tensor:
    """Return ``norm(features_NCHW) + added_NCHW`` by one kernel, as ``norm_activation`` does.

    Args:
        norm: over the channels.
        features_NCHW: of the norm's channels.
        added_NCHW: the input of a residual block, of the same shape; None for nothing.
    """
    like = added_NCHW is None or (
        type(added_NCHW) is Tensor
        and added_NCHW.shape == features_NCHW.shape
        and added_NCHW.dtype == torch.float32
        and added_NCHW.is_contiguous(memory_format=torch.channels_last)
    )
    if like and _suits_kernels(features_NCHW, norm):
        return _normalised(norm, features_NCHW, added_NCHW=added_NCHW, activation=_IDENTITY)
    result: Tensor = norm(features_NCHW)
    return result if added_NCHW is None else result + added_NCHW


def _suits_kernels(features: Tensor, norm: nn.Module, *others: nn.Module) -> bool:
    # Tools put modules of their own in this place.
    if type(norm) is not nn.BatchNorm2d or not suits_kernels(features, norm, *others):
        return False
    return (
        norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.weight.dtype == torch.float32
        and features.shape[1] == norm.num_features
        and features.numel() > features.shape[1]
        and channel_kernels() is not None
    )


def scaled_norm(
    features_NCHW: Tensor,
    factor_C: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    *,
    momentum: float,
    eps: float,
) -> Tensor | None:
    """Return the norm in training of ``features_NCHW * factor_C`` without writing that product.

    The running averages move as ``torch.nn.functional.batch_norm`` moves them. None: the kernels do
    not suit these features, and nothing was done.
    """
    tensors = factor_C, weight_C, bias_C, running_mean_C, running_var_C
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return None
    enough = features_NCHW.numel() > features_NCHW.shape[1]
    if not enough or not suits_kernels(features_NCHW) or channel_kernels() is None:
        return None
    running = running_mean_C, running_var_C
    result: Tensor = _Norm.apply(  # type: ignore[no-untyped-call]
        features_NCHW, weight_C, bias_C, None, factor_C, running, (eps, momentum, _IDENTITY)
    )
    return result


def _normalised(
    norm: nn.Module, features: Tensor, *, added_NCHW: Tensor | None, activation: int
) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    running = norm.running_mean, norm.running_var
    settings = norm.eps, norm.momentum, activation
    result: Tensor = _Norm.apply(  # type: ignore[no-untyped-call]
        features, norm.weight, norm.bias, added_NCHW, None, running, settings
    )
    return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        added: Tensor | None,
        factor: Tensor | None,
        running: tuple[Tensor, Tensor],
        settings: tuple[float, float, int],
    ) -> Tensor:
        library = channel_kernels()
        assert library is not None
        num_channels = features.shape[1]
        result = torch.empty_like(features)
        saved = features.new_empty(3, num_channels)
        given = (address(tensor) for tensor in (features, factor, weight, bias, added, *running))
        pointers = *given, address(result), address(saved)
        sizes = features.numel() // num_channels, num_channels
        if library.norm_forward(*pointers, *sizes, *settings, torch.get_num_threads()):
            raise MemoryError("no memory for the batch norm's sums")
        ctx.save_for_backward(features, weight, bias, factor, saved)
        ctx.eps, _, ctx.activation = settings
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        library = channel_kernels()
        assert library is not None
        features, weight, bias, factor, saved = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        result = torch.empty_like(features)
        both = features.new_empty(2, features.shape[1])
        inputs = address(features), address(gradient), address(bias), address(saved)
        outputs = address(result), address(both[0]), address(both[1])
        num_channels = features.shape[1]
        sizes = features.numel() // num_channels, num_channels
        settings = ctx.activation, torch.get_num_threads()
        if library.norm_backward(*inputs, *outputs, *sizes, *settings):
            raise MemoryError("no memory for the batch norm's sums")
        added_gradient = gradient if ctx.needs_input_grad[3] else None
        factor_gradient = None
        if factor is not None and ctx.needs_input_grad[4]:
            # A norm does not change with the scale of its input but for eps, which this is about.
            factor_gradient = ctx.eps * weight * both[0] * (saved[2] / factor) ** 2 / factor
        return result, both[0], both[1], added_gradient, factor_gradient, None, None

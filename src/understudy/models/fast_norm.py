"""Batch norm with ReLU in training, in fewer passes over memory by the native kernels.

The modules stay plain ``nn.BatchNorm2d`` and ``nn.ReLU``: pruning, quantisation, hooks and exports
find what they know, and only the call that trains them together is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from understudy.models.native import address, convolution_kernels

_MIN_CHANNELS = 16  # LANES of kernels_norm.c


class NormSequential(nn.Sequential):
    """``nn.Sequential`` that trains each batch norm with a ReLU after it as ``norm_relu`` does."""

    def forward(self, features: Tensor) -> Tensor:
        modules = list(self)
        position = 0
        while position < len(modules):
            module = modules[position]
            after = modules[position + 1] if position + 1 < len(modules) else None
            if isinstance(module, nn.BatchNorm2d) and isinstance(after, nn.ReLU):
                features = norm_relu(module, after, features)
                position += 2
            else:
                features = module(features)
                position += 1
        return features


def norm_relu(norm: nn.Module, activation: nn.Module, features_NCHW: Tensor) -> Tensor:
    """Return ``activation(norm(features_NCHW))``; by one kernel where that is the same.

    That is: in training, on a CPU with AVX-512 and the native kernels, for float32 channels-last
    features of at least 16 channels, with plain modules that nothing hooks and no trace of the
    graph. Gradients differ from PyTorch's by rounding only, and not with the number of threads.

    Args:
        norm: over the channels; its running averages move as PyTorch moves them.
        activation: after it.
        features_NCHW: of the norm's channels.
    """
    if not _suits_kernels(norm, activation, features_NCHW):
        result: Tensor = activation(norm(features_NCHW))
        return result
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    fused: Tensor = _NormReLU.apply(  # type: ignore[no-untyped-call]
        features_NCHW, norm.weight, norm.bias, norm
    )
    return fused


def _suits_kernels(norm: nn.Module, activation: nn.Module, features: Tensor) -> bool:
    # Tools put modules of their own in these places, and tracers tensors of their own.
    if type(norm) is not nn.BatchNorm2d or type(activation) is not nn.ReLU:
        return False
    if type(features) is not Tensor or not norm.training or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch.is_autocast_enabled("cpu") or _is_hooked(norm) or _is_hooked(activation):
        return False
    fits = (
        norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and features.device.type == "cpu"
        and features.dtype == norm.weight.dtype == torch.float32
        and features.dim() == 4
        and features.shape[1] == norm.num_features >= _MIN_CHANNELS
        and features.numel() > features.shape[1]
        and features.is_contiguous(memory_format=torch.channels_last)
    )
    return fits and convolution_kernels() is not None


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d
    ) -> Tensor:
        library = convolution_kernels()
        assert library is not None
        num_channels = features.shape[1]
        result = torch.empty_like(features)
        saved = features.new_empty(3, num_channels)
        running = address(norm.running_mean), address(norm.running_var)
        pointers = address(features), address(weight), address(bias), *running
        sizes = features.numel() // num_channels, num_channels
        settings = norm.eps, norm.momentum, 1, torch.get_num_threads()
        if library.norm_forward(*pointers, address(result), address(saved), *sizes, *settings):
            raise MemoryError("no memory for the batch norm's sums")
        ctx.save_for_backward(features, bias, saved)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        library = convolution_kernels()
        assert library is not None
        features, bias, saved = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        result = torch.empty_like(features)
        both = features.new_empty(2, features.shape[1])
        inputs = address(features), address(gradient), address(bias), address(saved)
        outputs = address(result), address(both[0]), address(both[1])
        num_channels = features.shape[1]
        sizes = features.numel() // num_channels, num_channels, 1, torch.get_num_threads()
        if library.norm_backward(*inputs, *outputs, *sizes):
            raise MemoryError("no memory for the batch norm's sums")
        return result, both[0], both[1], None

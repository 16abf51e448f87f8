"""Depthwise convolution that trains faster on CPUs, in the native kernels.

PyTorch's depthwise convolution is quick forward and slow backward on a CPU. The modules stay plain
``nn.Conv2d``, as in ``fast_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from understudy.models.native import address, channel_kernels, suits_kernels


def is_depthwise(module: nn.Module) -> bool:
    """Return whether this is a convolution of each channel apart."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels


def depthwise(convolution: nn.Module, features_NCHW: Tensor) -> Tensor:
    """Return ``convolution(features_NCHW)``, by the kernels where that differs by rounding only.

    That is: where ``norm_activation`` is replaced too, for a depthwise convolution that
    ``conv2d_depthwise`` knows.

    Args:
        convolution: any module that takes the features.
        features_NCHW: of its input channels.
    """
    # Tools put modules of their own in this place.
    if (
        type(convolution) is nn.Conv2d
        and convolution.padding_mode == "zeros"
        and isinstance(convolution.padding, tuple)
        and suits_kernels(features_NCHW, convolution)
    ):
        filtered = conv2d_depthwise(
            features_NCHW,
            convolution.weight,
            convolution.bias,
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            convolution.groups,
        )
        if filtered is not None:
            return filtered
    result: Tensor = convolution(features_NCHW)
    return result


def conv2d_depthwise(
    features_NCHW: Tensor,
    weight: Tensor,
    bias_C: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor | None:
    """Return ``torch.nn.functional.conv2d`` of the same arguments; None: nothing was done.

    Done are float32 depthwise convolutions without bias, of one output for each channel and an odd
    square kernel, padded to keep the sides, of features that suit the kernels.
    """
    kernel = weight.shape[-1]
    if (
        not 1 < groups == weight.shape[0] == features_NCHW.shape[1]
        or bias_C is not None
        or weight.dtype != torch.float32
        or kernel % 2 == 0
        or weight.shape[1:] != (1, kernel, kernel)
        or stride[0] != stride[1]
        or tuple(padding) != (kernel // 2, kernel // 2)
        or tuple(dilation) != (1, 1)
        or not suits_kernels(features_NCHW)
        or channel_kernels() is None
    ):
        return None
    filtered: Tensor = _Depthwise.apply(  # type: ignore[no-untyped-call]
        features_NCHW, weight, stride[0]
    )
    return filtered


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.stride = stride
        return _filtered(features, _rows(weight), stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        library = channel_kernels()
        assert library is not None
        features, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        kernel, stride = weight.shape[2], ctx.stride
        sizes = _sizes(features, kernel, stride)
        features_gradient = weight_gradient = None
        if ctx.needs_input_grad[0] and stride == 1:
            # The gradient of a convolution is one with the kernel turned round.
            features_gradient = _filtered(gradient, _rows(weight.flip(2, 3)), 1)
        elif ctx.needs_input_grad[0]:
            features_gradient = torch.empty_like(features)
            rows = _rows(weight)
            pointers = address(gradient), address(rows), address(features_gradient)
            _made(library.depthwise_back(*pointers, *sizes))
        if ctx.needs_input_grad[1]:
            rows = features.new_empty(kernel * kernel, features.shape[1])
            pointers = address(features), address(gradient), address(rows)
            _made(library.depthwise_weights(*pointers, *sizes))
            weight_gradient = rows.t().reshape(weight.shape)
        return features_gradient, weight_gradient, None


def _filtered(features: Tensor, rows: Tensor, stride: int) -> Tensor:
    library = channel_kernels()
    assert library is not None
    num_images, num_channels, height, width = features.shape
    sides = -(-height // stride), -(-width // stride)
    output = torch.empty((num_images, num_channels, *sides), memory_format=torch.channels_last)
    kernel = int(rows.shape[0] ** 0.5)
    pointers = address(features), address(rows), address(output)
    _made(library.depthwise(*pointers, *_sizes(features, kernel, stride)))
    return output


def _made(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for one picture, or for the gradient's sums")


def _rows(weight: Tensor) -> Tensor:
    """Return [kernel * kernel, C] of a weight [C, 1, kernel, kernel]."""
    return weight.flatten(1).t().contiguous()


def _sizes(features: Tensor, kernel: int, stride: int) -> tuple[int, ...]:
    num_images, num_channels, height, width = features.shape
    threads = torch.get_num_threads()
    return num_images, height, width, num_channels, kernel, stride, threads

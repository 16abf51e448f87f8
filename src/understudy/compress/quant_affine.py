"""The arithmetic of int8: scales, zero points, and rounding in float (fake quantisation).

Weights are symmetric and have a scale for each output channel, activations are affine uint8 with
one scale (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", equation 1): ``value = scale * (q - zero_point)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from understudy.models.native import address, kernels

# Seven bits of int8, symmetric as TFLite demands. Where a processor has no VNNI instructions, ONNX
# Runtime and OpenVINO add two products of activation and weight in 16 bits: 2 * 255 * 63 fits,
# 2 * 255 * 127 does not, and answers are then others than elsewhere.
WEIGHT_MAX = 63
# Of a depthwise convolution, whose kernels in both runtimes add products in 32 bits everywhere.
DEPTHWISE_WEIGHT_MAX = 127
ACTIVATION_MIN, ACTIVATION_MAX = 0, 255
# A channel whose weights are all (nearly) zero would get a scale so small that its bias, in units
# of input scale times weight scale, leaves int32. All channels share the scale of their output, so
# a channel 4096 times below the largest one has no digit in it to lose.
_MIN_RELATIVE_SCALE = 2.0**-12
_MIN_SCALE = 2.0**-24


def largest_weight(shape: Sequence[int], num_groups: int) -> int:
    """Return the largest integer that a layer's weights are rounded to.

    Args:
        shape: of the weights, output channels first.
        num_groups: of the convolution; 1 for a linear layer.
    """
    is_depthwise = len(shape) > 2 and shape[1] == 1 and num_groups == shape[0] > 1
    return DEPTHWISE_WEIGHT_MAX if is_depthwise else WEIGHT_MAX


def weight_scales(weight: Tensor, *, largest: int) -> Tensor:
    """Return the scale of each output channel, float32 [channels].

    Args:
        weight: of a convolution or linear layer, output channels first.
        largest: integer that the largest weight of a channel becomes.
    """
    scales = weight.detach().abs().amax(dim=list(range(1, weight.dim()))).float() / largest
    floor = (scales.max() * _MIN_RELATIVE_SCALE).clamp(min=_MIN_SCALE)
    return torch.maximum(scales, floor)


def activation_scale(minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point) of activations between two values; zero is always in the range.

    Args:
        minimum: float, one value; ``maximum`` likewise.

    Returns:
        float32 [1] and int32 [1]. Zero falls on the zero point exactly, so that padding is exact.
    """
    low = minimum.detach().reshape(1).float().clamp(max=0)
    high = maximum.detach().reshape(1).float().clamp(min=0)
    scale = ((high - low) / (ACTIVATION_MAX - ACTIVATION_MIN)).clamp(min=_MIN_SCALE)
    zero_point = (ACTIVATION_MIN - torch.round(low / scale)).clamp(ACTIVATION_MIN, ACTIVATION_MAX)
    return scale, zero_point.to(torch.int32)


def fake_quantize_weight(weight: Tensor, scales: Tensor, *, largest: int) -> Tensor:
    """Return the weight rounded to int8 and back; gradients pass where nothing was clipped."""
    zero_points = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zero_points, 0, -largest, largest)


def fake_quantize_activation(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the values rounded to uint8 and back; gradients pass where nothing was clipped."""
    if _is_dense(values) and kernels() is not None:
        rounded: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
            values, scale.item(), zero_point.item()
        )
        return rounded
    return torch.fake_quantize_per_tensor_affine(
        values, scale, zero_point, ACTIVATION_MIN, ACTIVATION_MAX
    )


def value_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value."""
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)  # in the order of the memory: PyTorch would copy it
    low, high = torch.aminmax(values)
    return low, high


def _is_dense(values: Tensor) -> bool:
    """Whether the values are what the kernel takes: float32 without gaps, and no trace of them."""
    if type(values) is not Tensor or torch.compiler.is_compiling():
        return False
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return False
    last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return last or values.is_contiguous()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float, zero_point: float) -> Tensor:
        library = kernels()
        assert library is not None
        result = torch.empty_like(values)
        ctx.save_for_backward(values)
        ctx.settings = scale, zero_point, ACTIVATION_MIN, ACTIVATION_MAX, torch.get_num_threads()
        library.fake_quantize(address(values), address(result), values.numel(), *ctx.settings)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        library = kernels()
        assert library is not None
        (values,) = ctx.saved_tensors
        gradient, result = gradients[0], torch.empty_like(values)
        if gradient.stride() != values.stride():
            gradient = torch.empty_like(values).copy_(gradient)
        pointers = address(values), address(gradient), address(result)
        library.fake_quantize_back(*pointers, values.numel(), *ctx.settings)
        return result, None, None

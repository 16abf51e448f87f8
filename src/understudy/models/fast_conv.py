"""A 3x3 convolution that trains faster on CPUs: Winograd's F(4x4, 3x3) in the native kernels.

It computes what ``torch.nn.Conv2d`` computes, with rounding differences of about 1e-5 of the
largest output (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks").
"""

from __future__ import annotations

from ctypes import CDLL
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from understudy.models.native import address, kernels

_NUM_POINTS = 36
_LANES = 16

# G of F(4x4, 3x3): a kernel row of three weights to six points.
_WEIGHT_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


class FastConv3x3(nn.Conv2d):
    """``nn.Conv2d`` with kernel 3, stride 1 and padding 1, faster in training where it can be.

    That is: on a CPU with the native kernels, in float32, with channels-last pictures whose sides
    are multiples of 4, and channel counts that are multiples of 16. Everywhere else, in evaluation
    and in exports it is ``nn.Conv2d`` itself. Parameters and their names are the same.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, features_NCHW: Tensor) -> Tensor:
        library = self._usable_kernels(features_NCHW)
        if library is None:
            return super().forward(features_NCHW)
        result: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
            features_NCHW, self.weight, self.bias, library
        )
        return result

    def _usable_kernels(self, features_NCHW: Tensor) -> CDLL | None:
        if not self.training or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        fits = (
            features_NCHW.device.type == "cpu"
            and features_NCHW.dtype == self.weight.dtype == torch.float32
            and features_NCHW.dim() == 4
            and features_NCHW.numel() > 0
            and features_NCHW.is_contiguous(memory_format=torch.channels_last)
            and features_NCHW.shape[2] % 4 == features_NCHW.shape[3] % 4 == 0
            and self.in_channels % _LANES == self.out_channels % _LANES == 0
        )
        return kernels() if fits else None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, library: CDLL
    ) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.has_bias = bias is not None
        ctx.library = library
        return _convolve(library, features, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        features_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            # The gradient of a convolution is one with the kernel turned round.
            turned = weight.flip(2, 3).transpose(0, 1)
            features_gradient = _convolve(ctx.library, gradient, turned, None)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            weight_gradient, bias_gradient = _weight_gradient(ctx.library, features, gradient)
        return features_gradient, weight_gradient, bias_gradient if ctx.has_bias else None, None


def _convolve(library: CDLL, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_images, num_inputs, height, width = features.shape
    num_outputs = weight.shape[0]
    transform = torch.tensor(_WEIGHT_TRANSFORM)
    points = torch.einsum("ia,jb,ocab->ijco", transform, transform, weight).contiguous()
    output = torch.empty(
        (num_images, num_outputs, height, width), memory_format=torch.channels_last
    )
    sizes = (num_images, height, width, num_inputs, num_outputs, torch.get_num_threads())
    failed = library.convolve(
        address(features), address(points), address(bias), address(output), *sizes
    )
    if failed:
        raise MemoryError("no memory for the convolution's scratch space")
    return output


def _weight_gradient(library: CDLL, features: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    num_images, num_inputs, height, width = features.shape
    num_outputs = gradient.shape[1]
    num_threads = torch.get_num_threads()
    sums = torch.zeros(num_threads, _NUM_POINTS, num_inputs, num_outputs)
    bias_sums = torch.zeros(num_threads, num_outputs)
    sizes = (num_images, height, width, num_inputs, num_outputs, num_threads)
    failed = library.weight_gradient(
        address(features), address(gradient), address(sums), address(bias_sums), *sizes
    )
    if failed:
        raise MemoryError("no memory for the gradient's scratch space")
    transform = torch.tensor(_WEIGHT_TRANSFORM)
    points = sums.sum(0).view(6, 6, num_inputs, num_outputs)
    weight_gradient = torch.einsum("ia,jb,ijco->ocab", transform, transform, points)
    return weight_gradient, bias_sums.sum(0)

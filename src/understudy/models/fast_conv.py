"""A 3x3 convolution that trains faster on CPUs, in the native kernels.

It computes what ``torch.nn.Conv2d`` computes: by Winograd's F(4x4, 3x3) with rounding differences
of about 1e-5 of the largest output (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural
Networks"), and directly for the 1 or 3 channels of pictures.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from understudy.models.dropout import LeakyReLUDropout, Mask, leaky_relu_mask
from understudy.models.native import address, convolution_kernels, suits_kernels

_NUM_POINTS = 36
_NUM_SHARES = 8  # SHARES of kernels.c
_LANES = 16
_FEW_CHANNELS = (1, 3)

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

    That is: on a CPU with AVX2 and the native kernels, in float32, with channels-last pictures
    whose sides are multiples of 4 (8 for a first layer), and with channel counts that are multiples
    of 16 (inputs also 1 or 3). Everywhere else, in evaluation and in exports, it is ``nn.Conv2d``
    itself. Parameters and their names are the same.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        bias: whether there is one.
        activation: leaky ReLU and dropout on the output, then done in the same pass over memory.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        activation: LeakyReLUDropout | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        self.activation = activation

    def forward(self, features_NCHW: Tensor) -> Tensor:
        activation = self.activation
        if not self._suits_kernels(features_NCHW):
            output = super().forward(features_NCHW)
            return output if activation is None else activation(output)
        mask = None
        if activation is not None and activation.training and activation.negative_slope >= 0:
            mask = activation.next_mask()
        result: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
            features_NCHW, self.weight, self.bias, mask
        )
        return result if activation is None or mask is not None else activation(result)

    def _suits_kernels(self, features_NCHW: Tensor) -> bool:
        if not self.training or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        return _fits_kernels(self, features_NCHW)


def conv3x3(
    convolution: nn.Module, features_NCHW: Tensor, activation: nn.LeakyReLU | None = None
) -> Tensor:
    """Return ``convolution(features_NCHW)``; by the kernels where a ``FastConv3x3`` would use them.

    For plain modules, which other tools know: those that nothing hooks, and no trace of the graph.

    Args:
        convolution: any module that takes the features.
        features_NCHW: of its input channels.
        activation: after the convolution, then in the same pass over memory.
    """
    after = [] if activation is None else [activation]
    fits = (
        isinstance(convolution, nn.Conv2d)
        and _is_plain(convolution)
        and all(type(module) is nn.LeakyReLU and module.negative_slope >= 0 for module in after)
        and suits_kernels(features_NCHW, convolution, *after, min_channels=1)
        and convolution.kernel_size == (3, 3)
        and convolution.stride == convolution.padding == convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and _fits_kernels(convolution, features_NCHW)
    )
    if not fits:
        result: Tensor = convolution(features_NCHW)
        return result if activation is None else activation(result)
    mask = None if activation is None else leaky_relu_mask(activation.negative_slope)
    convolved: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
        features_NCHW, convolution.weight, convolution.bias, mask
    )
    return convolved


def _is_plain(convolution: nn.Conv2d) -> bool:
    if type(convolution) is FastConv3x3:
        return convolution.activation is None
    return type(convolution) is nn.Conv2d


def _fits_kernels(convolution: nn.Conv2d, features_NCHW: Tensor) -> bool:
    few = convolution.in_channels in _FEW_CHANNELS
    multiple = 8 if few else 4
    fits = (
        features_NCHW.device.type == "cpu"
        and features_NCHW.dtype == convolution.weight.dtype == torch.float32
        and features_NCHW.dim() == 4
        and features_NCHW.numel() > 0
        and features_NCHW.is_contiguous(memory_format=torch.channels_last)
        and features_NCHW.shape[2] % multiple == features_NCHW.shape[3] % multiple == 0
        and (few or convolution.in_channels % _LANES == 0)
        and convolution.out_channels % _LANES == 0
    )
    return fits and convolution_kernels() is not None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask | None
    ) -> Tensor:
        result = _convolve(features, weight, bias, mask)
        ctx.save_for_backward(features, weight, None if mask is None else result)
        ctx.has_bias = bias is not None
        ctx.mask = mask
        return result

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        features, weight, result = ctx.saved_tensors
        if ctx.mask is None:
            gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        else:
            gradient = ctx.mask.multiply(gradients[0], result)
        features_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            if features.shape[1] in _FEW_CHANNELS:
                features_gradient = conv2d_input(  # type: ignore[no-untyped-call]
                    features.shape, weight, gradient, padding=1
                )
            else:
                # The gradient of a convolution is one with the kernel turned round.
                turned = weight.flip(2, 3).transpose(0, 1)
                features_gradient = _convolve(gradient, turned, None, None)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            weight_gradient, bias_gradient = _weight_gradient(features, gradient)
        return features_gradient, weight_gradient, bias_gradient if ctx.has_bias else None, None


def kernel_points(weight: Tensor) -> Tensor:
    """Return [36, in * out], what the native convolution takes, of a weight [out, in, 3, 3]."""
    return _weight_transform() @ weight.permute(2, 3, 1, 0).reshape(9, -1)


def _convolve(features: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask | None) -> Tensor:
    library = convolution_kernels()
    assert library is not None
    num_images, num_inputs, height, width = features.shape
    num_outputs = weight.shape[0]
    if num_inputs in _FEW_CHANNELS:
        points = weight.permute(2, 3, 1, 0).contiguous()
        kernel = library.convolve_few
    else:
        points = kernel_points(weight)
        kernel = library.convolve
    output = torch.empty(
        (num_images, num_outputs, height, width), memory_format=torch.channels_last
    )
    pointers = address(features), address(points), address(bias), address(output)
    sizes = (num_images, height, width, num_inputs, num_outputs, torch.get_num_threads())
    if kernel(*pointers, *sizes, None if mask is None else mask.arguments()):
        raise MemoryError("no memory for the convolution's scratch space")
    return output


def _weight_gradient(features: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    library = convolution_kernels()
    assert library is not None
    num_images, num_inputs, height, width = features.shape
    num_outputs = gradient.shape[1]
    few = num_inputs in _FEW_CHANNELS
    kernel = library.weight_gradient_few if few else library.weight_gradient
    sums = torch.zeros(_NUM_SHARES, 9 if few else _NUM_POINTS, num_inputs * num_outputs)
    bias_sums = torch.zeros(_NUM_SHARES, num_outputs)
    pointers = address(features), address(gradient), address(sums), address(bias_sums)
    sizes = (num_images, height, width, num_inputs, num_outputs, torch.get_num_threads())
    if kernel(*pointers, *sizes):
        raise MemoryError("no memory for the gradient's scratch space")
    rows = sums.sum(0) if few else _points_to_weights(sums.sum(0))
    weight_gradient = rows.view(3, 3, num_inputs, num_outputs).permute(3, 2, 0, 1)
    return weight_gradient, bias_sums.sum(0)


def _points_to_weights(points: Tensor) -> Tensor:
    """Return [9, M], the transposed weight transform of [36, M], one axis of the kernel at a time.

    Sums of products and no matrix product: how that adds up depends on the number of threads on
    some processors, and a training must not.
    """
    transform = torch.tensor(_WEIGHT_TRANSFORM)
    grid = points.view(6, 6, -1)
    rows = sum(transform[k].view(3, 1, 1) * grid[k] for k in range(6))
    assert isinstance(rows, Tensor)
    both = sum(transform[k].view(1, 3, 1) * rows[:, k : k + 1] for k in range(6))
    assert isinstance(both, Tensor)
    return both.reshape(9, -1)


@functools.cache
def _weight_transform() -> Tensor:
    """Return [36, 9]: the nine weights of a kernel to its 36 points."""
    transform = torch.tensor(_WEIGHT_TRANSFORM)
    return torch.kron(transform, transform)

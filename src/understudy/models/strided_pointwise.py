"""1x1 convolutions with a stride, kept off oneDNN kernels that write past their memory.

In oneDNN, which computes PyTorch's convolutions on CPUs, the weight gradient of a 1x1 convolution
with a stride writes past its workspace where pictures lie channels last and the input has fewer
channels than a vector: 8 with AVX2, 16 with AVX-512 (oneDNN issue 6035, open in the release that
torch 2.13.0 carries). Gradients are wrong, or the process hangs or ends in "corrupted size vs.
prev_size". A convolution of stride 1 on every second pixel is the same and has no such fault.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Of an AVX-512 vector; AVX2 has 8.
NUM_LANES = 16


class StridedPointwise(nn.Conv2d):
    """A convolution of 1x1 pixels with a stride that picks its pixels first while it learns."""

    @property
    def is_narrow(self) -> bool:
        """Whether its input, which pruning may have cut, has fewer channels than a vector."""
        return self.in_channels < NUM_LANES

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """Return what ``nn.Conv2d`` does."""
        traced = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
        if traced or not self.is_narrow or not torch.is_grad_enabled():
            return super().forward(features_NCHW)
        down, across = self.stride
        return functional.conv2d(features_NCHW[:, :, ::down, ::across], self.weight, self.bias)


def guard_strided_pointwise(network: nn.Module) -> None:
    """Make every such convolution of the network, in place, one that is safe to train.

    Its weights, their names and the exported graph stay as they are.
    """
    for module in network.modules():
        if type(module) is not nn.Conv2d or module.groups != 1 or module.stride == (1, 1):
            continue
        if module.kernel_size == (1, 1) and module.padding in ((0, 0), "valid"):
            module.__class__ = StridedPointwise


def has_narrow_strides(network: nn.Module) -> bool:
    """Return whether a graph captured from the network must not be trained channels last.

    It holds the convolutions with their strides.
    """
    return any(isinstance(m, StridedPointwise) and m.is_narrow for m in network.modules())

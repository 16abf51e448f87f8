"""Depthwise-separable networks (Howard et al. 2017, "MobileNets"), scaled to a few kilobytes.

A 3x3 stem, then stages of blocks [depthwise k x k, batch norm, ReLU, pointwise 1x1, batch norm,
ReLU], global average pooling and one linear layer. Channel counts that are multiples of 8, better
of 16, train about three times faster on CPUs, and a stride in the first block of a stage keeps the
dear full-resolution depthwise gradients few.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from understudy.models.fast_depthwise import depthwise
from understudy.models.fast_layers import FastSequential
from understudy.models.fast_norm import norm_activation

CHANNEL_MULTIPLE = 8


class SeparableBlock(nn.Module):
    """Depthwise then pointwise convolution, each with batch norm and ReLU; NCHW to NCHW."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, kernel: int, residual: bool
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels,
            in_channels,
            kernel,
            stride,
            padding=kernel // 2,
            groups=in_channels,
            bias=False,
        )
        self.depthwise_norm = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU(inplace=True)
        self.residual = residual and stride == 1 and in_channels == out_channels

    def forward(self, features_NCHW: Tensor) -> Tensor:
        features = depthwise(self.depthwise, features_NCHW)
        features = norm_activation(self.depthwise_norm, self.activation, features)
        features = norm_activation(self.pointwise_norm, self.activation, self.pointwise(features))
        return features + features_NCHW if self.residual else features


class SeparableNet(nn.Module):
    """A depthwise-separable classifier.

    Args:
        num_classes: K of the logits.
        in_channels: 3 for colour, 1 for gray.
        stages: (channels, stride) of the stem and of each stage after it; a stage's stride is its
            first block's.
        depth: blocks in each stage after the stem.
        width: factor on all channels; the result is rounded to multiples of 8 unless it is 1.
        kernel: odd size of the depthwise kernels.
        residual: add the input of a block that keeps its shape.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        stages: Sequence[Sequence[int]] = ((16, 1), (24, 2), (32, 1), (48, 2), (56, 1)),
        depth: int = 1,
        width: float = 1.0,
        kernel: int = 3,
        residual: bool = False,
    ) -> None:
        super().__init__()
        (stem_channels, stem_stride), *later_stages = stages
        current = scale_channels(stem_channels, width)
        self.stem = FastSequential(
            nn.Conv2d(in_channels, current, 3, stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(current),
            nn.ReLU(inplace=True),
        )
        blocks = []
        for stage_channels, stage_stride in later_stages:
            out_channels = scale_channels(stage_channels, width)
            for stride in [stage_stride] + [1] * (depth - 1):
                blocks.append(
                    SeparableBlock(
                        current, out_channels, stride=stride, kernel=kernel, residual=residual
                    )
                )
                current = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(current, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return logits_NK for normalised float images_NCHW."""
        features = self.blocks(self.stem(images_NCHW))
        logits_NK: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits_NK


def scale_channels(count: int, width: float) -> int:
    """Return ``count * width`` rounded to a multiple of 8, at least 8; unchanged for width 1."""
    if width == 1:
        return count
    return max(CHANNEL_MULTIPLE, round(count * width / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE)

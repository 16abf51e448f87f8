"""CIFAR ResNets (He, Zhang, Ren and Sun 2016, "Deep Residual Learning", section 4.2).

Depth 6n + 2, three stages of n basic blocks, option-A shortcuts: where a stage halves the picture
the shortcut takes every second pixel and pads the new channels with zeros, so it has no parameters.
Module names follow the published CIFAR-10 checkpoints of this family.

With ``shortcut="conv"`` those shortcuts are 1x1 convolutions with bias and without batch norm; the
ResNet of depth 8 is then that of MLPerf Tiny (Banbury et al. 2021, image classification), whose
3x3 convolutions also have a bias, which their batch norm makes superfluous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import ModelError, problem
from understudy.models.catalog import SHORTCUTS
from understudy.models.fast_conv import conv3x3
from understudy.models.fast_norm import norm_activation, norm_add


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut; NCHW to NCHW."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, shortcut: str = "pad"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        new_channels = out_channels - in_channels
        # Split as in the published networks: half of the zero channels before, the rest after.
        self.padding = (new_channels // 2, new_channels - new_channels // 2)
        if shortcut == "conv" and (stride != 1 or new_channels):
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(self, features_NCHW: Tensor) -> Tensor:
        residual = norm_activation(self.bn1, None, conv3x3(self.conv1, features_NCHW))
        shortcut = self.shortcut_of(features_NCHW)
        return F.relu(norm_add(self.bn2, conv3x3(self.conv2, residual), shortcut))

    def shortcut_of(self, features_NCHW: Tensor) -> Tensor:
        """Return the block's input in the shape of its output."""
        if hasattr(self, "shortcut"):
            projected: Tensor = self.shortcut(features_NCHW)
            return projected
        if self.stride != 1:
            features_NCHW = features_NCHW[:, :, :: self.stride, :: self.stride]
        if self.padding != (0, 0):
            features_NCHW = F.pad(features_NCHW, (0, 0, 0, 0, *self.padding))
        return features_NCHW


class ResNet(nn.Module):
    """A CIFAR ResNet of depth 6n + 2.

    Args:
        num_classes: K of the logits.
        in_channels: 3 for colour, 1 for gray.
        depth: 6n + 2 (8, 14, 20, 32, 44, 56, 110).
        widths: channels of the three stages, not decreasing.
        shortcut: "pad" (option A) or "conv" where a block changes the shape.

    Raises:
        ModelError: for another depth or shortcut, or widths that shrink or are not three.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        depth: int = 20,
        widths: Sequence[int] = (16, 32, 64),
        shortcut: str = "pad",
    ) -> None:
        super().__init__()
        problems = []
        if depth < 8 or depth % 6 != 2:
            problems.append(
                problem(
                    f"a ResNet of depth {depth}",
                    expected="6n + 2, such as 20 or 56",
                    mend="Choose another depth.",
                )
            )
        if len(widths) != 3 or list(widths) != sorted(widths) or min(widths) < 1:
            problems.append(
                problem(
                    f"ResNet widths {list(widths)}",
                    expected="three channel counts that do not shrink (a shortcut pads, it cannot "
                    "remove channels)",
                    mend="For example widths: [16, 32, 64].",
                )
            )
        if shortcut not in SHORTCUTS:
            problems.append(
                problem(
                    f"the ResNet shortcut '{shortcut}'",
                    expected="pad or conv",
                    mend="pad is that of the CIFAR networks, conv that of MLPerf Tiny.",
                )
            )
        if problems:
            raise ModelError(*problems)
        num_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], num_blocks, stride=1, shortcut=shortcut)
        self.layer2 = _stage(widths[0], widths[1], num_blocks, stride=2, shortcut=shortcut)
        self.layer3 = _stage(widths[1], widths[2], num_blocks, stride=2, shortcut=shortcut)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return logits_NK for normalised float images_NCHW."""
        features = norm_activation(self.bn1, None, conv3x3(self.conv1, images_NCHW))
        features = self.layer3(self.layer2(self.layer1(features)))
        pooled_NC = features.mean(dim=(2, 3))
        logits_NK: torch.Tensor = self.linear(pooled_NC)
        return logits_NK


def _stage(
    in_channels: int, out_channels: int, num_blocks: int, *, stride: int, shortcut: str
) -> nn.Sequential:
    blocks = [BasicBlock(in_channels, out_channels, stride, shortcut=shortcut)]
    blocks += [BasicBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)

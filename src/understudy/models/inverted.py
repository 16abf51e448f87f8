"""Inverted residual networks (Sandler et al. 2018, "MobileNetV2"), scaled to a few kilobytes.

A 3x3 stem, then blocks [1x1 expansion, depthwise k x k, squeeze-and-excitation, 1x1 projection],
each convolution with batch norm and all but the projection with an activation. An expansion of 1
leaves the first convolution out. A block that keeps its shape adds its input, and can run several
times with the same convolutions: weights shared over depth, as in Dehghani et al. 2019 ("Universal
Transformers"). Squeeze-and-excitation is that of Hu et al. 2018, its hard sigmoid and the hard
swish are of MobileNetV3 (Howard et al. 2019), and quantise well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from understudy.errors import ModelError, problem
from understudy.models.fast_gate import gated
from understudy.models.fast_layers import FastSequential, run_layers
from understudy.models.native import channel_kernels, suits_kernels

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "hardswish": nn.Hardswish}


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the channels' means; NCHW to NCHW."""

    def __init__(self, channels: int, hidden: int, activation: str = "relu") -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.activation = _activation(activation)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, features_NCHW: Tensor) -> Tensor:
        if suits_kernels(features_NCHW, self.pool) and channel_kernels() is not None:
            return gated(features_NCHW, self.gates, list(self.parameters()))
        return features_NCHW * self.gates(self.pool(features_NCHW))

    def gates(self, means_NC11: Tensor) -> Tensor:
        """Return the channels' gates [N, C, 1, 1] of their means."""
        result: Tensor = self.gate(self.expand(self.activation(self.reduce(means_NC11))))
        return result


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; NCHW to NCHW.

    Args:
        squeeze: the hidden channels of squeeze-and-excitation are the expanded ones over this; 0
            leaves it out.
        passes: how often the block is run, each time on its last output, with the same convolutions
            and batch norms of its own; more than once only a block that keeps its shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        expansion: int,
        kernel: int,
        squeeze: int,
        passes: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        expanded = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += _convolution(in_channels, expanded, 1, activation=activation)
        layers += _convolution(
            expanded, expanded, kernel, stride=stride, groups=expanded, activation=activation
        )
        if squeeze:
            layers.append(SqueezeExcite(expanded, max(1, expanded // squeeze), activation))
        layers += _convolution(expanded, out_channels, 1, activation=None)
        self.layers = FastSequential(*layers)
        self.adds_input = stride == 1 and in_channels == out_channels
        if passes > 1 and not self.adds_input:
            raise ModelError(
                problem(
                    f"a block of {in_channels} to {out_channels} channels with stride {stride} has "
                    f"{passes} passes",
                    expected="passes in blocks that keep the shape: stride 1 and the channels of "
                    "the block before",
                    mend="Put a block with 1 pass before it, which changes the shape.",
                )
            )
        norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        # The norms of each pass after the first.
        self.again = nn.ModuleList(
            nn.Sequential(*(nn.BatchNorm2d(norm.num_features) for norm in norms))
            for _ in range(passes - 1)
        )

    def forward(self, features_NCHW: Tensor) -> Tensor:
        features: Tensor = self.layers(features_NCHW, features_NCHW if self.adds_input else None)
        for norms in self.again:
            left = norms.children()
            layers = [
                next(left) if isinstance(layer, nn.BatchNorm2d) else layer for layer in self.layers
            ]
            features = run_layers(layers, features, features)
        return features


class InvertedResidualNet(nn.Module):
    """A classifier of inverted residual blocks.

    Args:
        num_classes: K of the logits.
        in_channels: 3 for colour, 1 for gray.
        stem: channels and stride of the 3x3 convolution at the start.
        blocks: (channels, stride, expansion, kernel) of each block, and its passes unless 1.
        squeeze: reduction of squeeze-and-excitation in every block; 0 leaves it out.
        head: channels of a 1x1 convolution before the pooling; 0 leaves it out.
        activation: relu or hardswish.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        stem: Sequence[int] = (16, 1),
        blocks: Sequence[Sequence[int]] = ((16, 1, 1, 3), (24, 2, 2, 3), (32, 2, 2, 3)),
        squeeze: int = 0,
        head: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        current, stem_stride = stem
        self.stem = FastSequential(
            *_convolution(in_channels, current, 3, stride=stem_stride, activation=activation)
        )
        made = []
        for channels, stride, expansion, kernel, *passes in blocks:
            made.append(
                InvertedResidual(
                    current,
                    channels,
                    stride=stride,
                    expansion=expansion,
                    kernel=kernel,
                    squeeze=squeeze,
                    passes=passes[0] if passes else 1,
                    activation=activation,
                )
            )
            current = channels
        self.blocks = nn.Sequential(*made)
        self.head = FastSequential(
            *(_convolution(current, head, 1, activation=activation) if head else [])
        )
        self.linear = nn.Linear(head or current, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return logits_NK for normalised float images_NCHW."""
        features = self.head(self.blocks(self.stem(images_NCHW)))
        logits_NK: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits_NK


def _convolution(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    activation: str | None,
    stride: int = 1,
    groups: int = 1,
) -> list[nn.Module]:
    convolution = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride,
        padding=kernel // 2,
        groups=groups,
        bias=False,
    )
    after = [] if activation is None else [_activation(activation)]
    return [convolution, nn.BatchNorm2d(out_channels), *after]


def _activation(name: str) -> nn.Module:
    return ACTIVATIONS[name](inplace=True)

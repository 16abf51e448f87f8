"""The student and the teachers of "Efficient Knowledge Distillation" (Lin and Shen, 2024).

Section 3.1 gives the layers; 32 channels and a hidden layer of 30 are the sizes that give exactly
the parameter counts of its Table 5: 11,444 for the student and 39,316 / 57,876 / 76,436 for the
teacher with 4 / 6 / 8 added layers.
"""

from __future__ import annotations

from torch import Tensor, nn

from understudy.models.dropout import FastDropout, LeakyReLUDropout
from understudy.models.fast_conv import FastConv3x3, conv3x3
from understudy.models.fast_norm import norm_add


class PaperStudent(nn.Module):
    """Two blocks [3x3 convolution, leaky ReLU, dropout], global average pooling, two linear layers.

    Args:
        num_classes: K of the logits.
        in_channels: 3 for colour, 1 for gray.
        channels: channels of both convolutions.
        hidden: width of the classifier's hidden layer.
        dropout: rate of all three dropout layers (the paper does not state it).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        channels: int = 32,
        hidden: int = 30,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            FastConv3x3(in_channels, channels, activation=LeakyReLUDropout(dropout)),
            FastConv3x3(channels, channels, activation=LeakyReLUDropout(dropout)),
        )
        self.classifier = _classifier(channels, hidden, num_classes, dropout)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return logits_NK for normalised float images_NCHW."""
        logits_NK: Tensor = self.classifier(_average(self.features(images_NCHW)))
        return logits_NK


class PaperTeacher(nn.Module):
    """The student's first block, then ``num_layers`` wider-reaching blocks, then its classifier.

    Each added block is [3x3 convolution without bias, leaky ReLU, batch norm, dropout].

    Args:
        num_classes: K of the logits.
        in_channels: 3 for colour, 1 for gray.
        num_layers: convolutions added to the first one (4, 6 and 8 in the paper).
        channels: channels of every convolution.
        hidden: width of the classifier's hidden layer.
        dropout: rate of every dropout layer (the paper does not state it).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        num_layers: int = 4,
        channels: int = 32,
        hidden: int = 30,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            FastConv3x3(in_channels, channels, activation=LeakyReLUDropout(dropout)),
        ]
        for _ in range(num_layers):
            layers += [
                FastConv3x3(channels, channels, bias=False),
                nn.LeakyReLU(),
                nn.BatchNorm2d(channels),
                FastDropout(dropout),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = _classifier(channels, hidden, num_classes, dropout)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return logits_NK for normalised float images_NCHW."""
        # Layer by layer, so that kernels can do two of them in one pass over memory.
        first, *added = self.features
        features_NCHW = first(images_NCHW)
        for convolution, activation, norm, dropout in zip(*[iter(added)] * 4, strict=True):
            features_NCHW = conv3x3(convolution, features_NCHW, activation)
            features_NCHW = dropout(norm_add(norm, features_NCHW, None))
        logits_NK: Tensor = self.classifier(_average(features_NCHW))
        return logits_NK


def _average(features_NCHW: Tensor) -> Tensor:
    # A sum, then a small division: the gradient of mean() would be written out for every pixel,
    # while that of sum() is one number a channel, which the dropout's kernel takes as it is.
    height, width = features_NCHW.shape[2:]
    return features_NCHW.sum(dim=(2, 3)) / (height * width)


def _classifier(channels: int, hidden: int, num_classes: int, dropout: float) -> nn.Sequential:
    # The paper swaps leaky ReLU and dropout in the teacher; the two commute, as the dropout factor
    # is never negative, so one order serves both.
    return nn.Sequential(
        nn.Linear(channels, hidden),
        LeakyReLUDropout(dropout),
        nn.Linear(hidden, num_classes),
    )

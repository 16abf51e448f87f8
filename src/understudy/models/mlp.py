"""A multilayer perceptron for small pictures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from understudy.models.dropout import FastDropout


class MLP(nn.Module):
    """Flatten, then linear layers with ReLU (and dropout) between them.

    Args:
        num_classes: K of the logits.
        image_shape: (C, H, W).
        hidden: widths of the hidden layers; none gives a linear classifier.
        dropout: rate after each hidden layer.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        hidden: Sequence[int] = (24,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = [nn.Flatten()]
        num_inputs = channels * height * width
        for num_outputs in hidden:
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
            if dropout > 0:
                layers.append(FastDropout(dropout))
            num_inputs = num_outputs
        layers.append(nn.Linear(num_inputs, num_classes))
        self.layers = nn.Sequential(*layers)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return logits_NK for normalised float images_NCHW."""
        logits_NK: Tensor = self.layers(images_NCHW)
        return logits_NK

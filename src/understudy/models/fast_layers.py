"""Layers in a row that train by the native kernels what those take."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from understudy.models.fast_conv import conv3x3
from understudy.models.fast_depthwise import depthwise, is_depthwise
from understudy.models.fast_norm import norm_activation, norm_add


class FastSequential(nn.Sequential):
    """``nn.Sequential`` by ``run_layers``."""

    def forward(self, features: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the last layer's output, plus ``added`` (of its shape) where that is given."""
        return run_layers(self, features, added)


def run_layers(layers: Iterable[nn.Module], features: Tensor, added: Tensor | None) -> Tensor:
    """Run layers one after the other, by the functions of ``fast_conv``, ``_depthwise``, ``_norm``.

    Args:
        layers: each takes what the one before returns.
        features: of the first layer.
        added: to the last layer's output, of the same shape; None for nothing.
    """
    modules = list(layers)
    position = 0
    while position < len(modules):
        module = modules[position]
        after = modules[position + 1] if position + 1 < len(modules) else None
        position += 1
        if isinstance(module, nn.BatchNorm2d) and isinstance(after, (nn.ReLU, nn.Hardswish)):
            features = norm_activation(module, after, features)
            position += 1
        elif isinstance(module, nn.BatchNorm2d):
            features = norm_add(module, features, added if after is None else None)
            added = None if after is None else added
        elif is_depthwise(module):
            features = depthwise(module, features)
        else:
            features = conv3x3(module, features)
    return features if added is None else features + added

"""Muon: momentum whose matrices are made orthogonal before they are added to the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

# Coefficients and steps of the iteration, from Jordan et al. 2024: its fixed point is not 1, but
# the singular values reach 0.7 to 1.2 in five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_STEPS = 5
_EPSILON = 1e-7


def matrices(network: nn.Module) -> list[Tensor]:
    """Return the weights that Muon is for, flattened to [outputs, inputs x kernel] matrices.

    These are the trainable weights of convolutions and linear layers, without depthwise and
    grouped convolutions (no map between all channels) and without the last linear layer, the
    classifier, as Jordan et al. advise.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | _ConvNd)]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    found = {
        id(layer.weight): layer.weight
        for layer in layers
        if getattr(layer, "groups", 1) == 1 and (not linear or layer is not linear[-1])
    }
    return [weight for weight in found.values() if weight.requires_grad]


class Muon(Optimizer):
    """Muon for matrices and SGD with Nesterov momentum for everything else.

    ``torch.optim.Muon`` takes matrices alone and no weights of convolutions. An update of a
    matrix has singular values of about the learning rate times ``sqrt(max(1, rows / columns))``,
    whatever the gradient's size; its weight decay is decoupled (Loshchilov and Hutter 2019).

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    Args:
        groups: of torch's form; a group with ``"orthogonal": True`` holds matrices.
        lr: learning rate; a group's own is this times its ``"rate_factor"`` (default 1).
        momentum: of all groups.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, momentum: float) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": 0.0,
            "orthogonal": False,
            "rate_factor": 1.0,
        }
        super().__init__(groups, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one update; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        rate, decay = group["lr"] * group["rate_factor"], group["weight_decay"]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if group["orthogonal"]:
            torch._foreach_mul_(weights, 1 - rate * decay)
        elif decay:
            gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
        velocities = [self._velocity(weight) for weight in weights]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, gradients)
        ahead = list(torch._foreach_add(gradients, velocities, alpha=group["momentum"]))
        if group["orthogonal"]:
            ahead = _orthogonal_together(ahead)
        torch._foreach_add_(weights, ahead, alpha=-rate)

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        velocity: Tensor = state["momentum_buffer"]
        return velocity


def _orthogonal_together(updates: Sequence[Tensor]) -> list[Tensor]:
    """Return the updates made orthogonal, those of one shape in one pass."""
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, update in enumerate(updates):
        places[tuple(update.shape)].append(place)
    found = list(updates)
    for shape, together in places.items():
        rows, columns = shape[0], updates[together[0]][0].numel()
        stacked_BRC = torch.stack([updates[place].reshape(rows, columns) for place in together])
        scale = max(1.0, rows / columns) ** 0.5
        for place, update_RC in zip(together, orthogonal(stacked_BRC) * scale, strict=True):
            found[place] = update_RC.reshape(shape)
    return found


def orthogonal(matrices_BRC: Tensor) -> Tensor:
    """Return matrices with the singular vectors of those given and singular values near 1.

    A matrix of zeros stays one. Newton-Schulz iteration, Jordan et al. 2024.
    """
    first, third, fifth = _COEFFICIENTS
    wide = matrices_BRC.shape[-2] <= matrices_BRC.shape[-1]
    x_BRC = matrices_BRC if wide else matrices_BRC.mT
    x_BRC = x_BRC / (x_BRC.norm(dim=(-2, -1), keepdim=True) + _EPSILON)
    for _ in range(_NUM_STEPS):
        gram_BRR = x_BRC @ x_BRC.mT
        polynomial_BRR = torch.baddbmm(gram_BRR, gram_BRR, gram_BRR, beta=third, alpha=fifth)
        x_BRC = torch.baddbmm(x_BRC, polynomial_BRR, x_BRC, beta=first)
    return x_BRC if wide else x_BRC.mT

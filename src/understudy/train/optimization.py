"""The optimiser and the averaged copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from understudy.heads.exits import ExitNetwork
from understudy.train.muon import Muon, matrices
from understudy.train.settings import Optimizer

EMA_WARMUP = 10

Tensors = tuple[Tensor, ...] | list[Tensor]


def build_optimizer(modules: Sequence[nn.Module], settings: Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser of the trainable parameters of the modules, the network first.

    Weight decay is left off one-dimensional parameters (biases, norm scales), as is usual since
    Goyal et al. 2017, section 5.1. Muon moves the matrices of the network; whatever is trained
    beside it, side heads among that, moves by SGD.
    """
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    if settings.name == "muon":
        network = modules[0]
        if isinstance(network, ExitNetwork):
            network = network.model  # whose own classifier is the last linear layer
        groups.append(
            {
                "params": matrices(network),
                "weight_decay": settings.matrix_weight_decay,
                "rate_factor": settings.matrix_learning_rate / settings.learning_rate,
                "orthogonal": True,
            }
        )
        orthogonal = {id(p) for p in groups[0]["params"]}
        trainable = [p for p in trainable if id(p) not in orthogonal]
    groups += [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, fused=True
        )
    if settings.name == "muon":
        return Muon(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.SGD(
        groups,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        fused=True,
    )


def averaged_copy(network: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of the network's weights and running statistics.

    The decay of update n is ``min(decay, (1 + n) / (10 + n))``: without this warm-up the random
    first weights would stay in the average of a short training.
    """
    return AveragedModel(network, multi_avg_fn=_moving_average(decay), use_buffers=True)


def _moving_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    @torch.no_grad()
    def average(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        count = int(num_averaged)
        weight = 1 - min(decay, (1 + count) / (EMA_WARMUP + count))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:
            torch._foreach_copy_(averaged, current)

    return average

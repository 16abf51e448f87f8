"""What a training is given, what it gives back, and where it is in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from understudy.train.feed import Feed
from understudy.train.objective import Objective
from understudy.train.settings import TrainSettings


def unwatched(row: Mapping[str, Any]) -> None:
    """Let a training go on whatever its epoch was like."""


@dataclass(frozen=True)
class TrainPlan:
    """Everything that decides the result of a training besides the network and the machine.

    Attributes:
        feed: batches of every epoch.
        objective: loss terms and their weights.
        settings: epochs, optimiser, schedules, safety.
        validate: network in eval mode -> numbers, among them "accuracy".
        folder: where checkpoints, metrics and TensorBoard events go.
        on_epoch: told every epoch's row after its checkpoint, in the first process; what it raises
            ends the training, which can be continued.
    """

    feed: Feed
    objective: Objective
    settings: TrainSettings
    validate: Callable[[nn.Module], dict[str, float]]
    folder: Path
    on_epoch: Callable[[Mapping[str, Any]], None] = unwatched


@dataclass(frozen=True)
class TrainResult:
    """Trained weights (of the averaged network where there is one) and what was watched.

    ``parts`` is the last state of what the objective trains or remembers beside the network.
    """

    weights: dict[str, Tensor]
    parts: dict[str, Tensor]
    rows: list[dict[str, Any]]
    seconds: float
    num_steps: int
    num_rollbacks: int


@dataclass
class Position:
    """Where a training is. All of it is in every checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    num_rollbacks: int = 0
    rate_factor: float = 1.0
    best_accuracy: float = -1.0
    epoch_seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

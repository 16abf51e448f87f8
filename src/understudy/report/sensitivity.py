"""What each layer of a student loses alone in int8, in the report: the record and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from understudy.report import formats
from understudy.report.strict import Strict

COLUMNS = (
    "Layer",
    "Weights",
    "Divergence, nats",
    "Same answer",
    "Accuracy",
    "In the int8 file",
)


@dataclass(frozen=True)
class LayerLoss(Strict):
    """One layer in int8 and all others in float, on the validation split.

    Attributes:
        kl: mean Kullback-Leibler divergence from the float network's class probabilities, nats.
        top1_agreement: share of pictures with the float network's answer.
        accuracy_change: accuracy less that of the float network.
        in_float: whether the step left this layer in float.
    """

    name: str
    num_weights: int
    kl: float
    top1_agreement: float
    accuracy_change: float | None
    in_float: bool


def sensitivity_context(rows: Sequence[LayerLoss]) -> dict[str, Any]:
    """Return what the templates show of it; no rows where it was not measured."""
    return {"layer_columns": COLUMNS, "layer_rows": [layer_row(row) for row in rows]}


def layer_row(row: LayerLoss) -> tuple[str, ...]:
    """Return one row of text for ``COLUMNS``."""
    change = row.accuracy_change
    return (
        row.name,
        formats.count(row.num_weights),
        formats.significant(row.kl),
        formats.percent(row.top1_agreement),
        formats.NOT_MEASURED if change is None else formats.points(change),
        "float" if row.in_float else "int8",
    )

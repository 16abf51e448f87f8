"""An ensemble as one teacher to evaluate: its members' answers combined, their costs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from understudy.data.batches import Batch
from understudy.evaluate.accuracy import evaluate_logits
from understudy.recipes.networks import model_section
from understudy.recipes.outputs import as_one
from understudy.recipes.run import Run
from understudy.recipes.strategies import Ensemble
from understudy.teachers.outputs import TeacherOutputs

# The members run one after the other: what each needs while it runs is not needed together.
SUMMED_COSTS = ("num_params", "macs", "weight_bytes")


@dataclass(frozen=True, eq=False)
class Answered:
    """A member whose answers to one set of pictures are there already."""

    logits_NK: Tensor

    def outputs(self, batch: Batch, *, view: int) -> TeacherOutputs:
        """Return all of its answers; the batch holds all of the pictures."""
        return TeacherOutputs(self.logits_NK)


def is_ensemble(run: Run) -> bool:
    """Return whether the run's teacher is several."""
    return isinstance(run.recipe.strategy, Ensemble)


def teacher_name(run: Run) -> str:
    """Return the network of the teacher, of an ensemble those of all members."""
    return " + ".join(model_section(run, role).name for role in run.teachers)


def as_teacher(
    run: Run,
    logits: Mapping[str, dict[str, Tensor]],
    costs: Mapping[str, Any],
    *,
    splits: Sequence[str],
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the members' rows, and logits and costs by role with the ensemble as "teacher".

    The members' own logits are under "member-1" and so on, as layers and losses name them.
    """
    roles = list(run.teachers)
    combined = {name: combined_answers(run, logits, name) for name in splits}
    members = {f"member-{number}": logits[role] for number, role in enumerate(roles, start=1)}
    others = {role: value for role, value in logits.items() if role not in roles}
    costs_of = {role: cost for role, cost in costs.items() if role not in roles}
    return (
        member_rows(run, logits, costs),
        {"teacher": combined, **others, **members},
        {"teacher": combined_costs([costs[role] for role in roles]), **costs_of},
    )


def combined_answers(run: Run, logits: Mapping[str, Mapping[str, Tensor]], name: str) -> Tensor:
    """Return the ensemble's logits on one split, as the strategy combines its members'.

    Labels are not shown to a teacher that is evaluated: by confidence its members are weighted in
    the form for pictures without one.
    """
    members = [Answered(logits[role][name]) for role in run.teachers]
    indices_N = getattr(run.splits, name)
    batch = Batch(indices_N, run.source.images(indices_N[:0]), torch.full_like(indices_N, -1))
    return as_one(run, members).outputs(batch, view=0).logits_NK


def combined_costs(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a picture costs through all members; None where one is not known."""

    def known(name: str) -> list[Any] | None:
        values = [cost[name] for cost in costs]
        return None if None in values else values

    summed = {name: values and sum(values) for name in SUMMED_COSTS for values in [known(name)]}
    peaks = known("peak_activation_bytes")
    return {**summed, "peak_activation_bytes": peaks and max(peaks)}


def member_rows(
    run: Run, logits: Mapping[str, Mapping[str, Tensor]], costs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return what the report says of every member: its network, costs and accuracies."""

    def accuracy(role: str, name: str) -> float:
        labels_N = run.source.labels_N[getattr(run.splits, name)]
        found = evaluate_logits(logits[role][name], labels_N, class_names=run.source.class_names)
        return found.accuracy

    return [
        {
            "name": role,
            "model": model_section(run, role).name,
            "num_params": costs[role]["num_params"],
            "macs": costs[role]["macs"],
            "validation_accuracy": accuracy(role, "validation"),
            "test_accuracy": accuracy(role, "test"),
        }
        for role in run.teachers
    ]

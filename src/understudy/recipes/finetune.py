"""Fine-tuning: after its own training a network goes on with the labels alone.

Student and control are fine-tuned alike, so that they still differ in the teacher only. Training
and fine-tuning are two stages: a change of the second leaves the first as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from understudy.artifacts import Record
from understudy.recipes.exit_training import weight_files, with_exits
from understudy.recipes.given_student import load_student
from understudy.recipes.label_weights import labels_section
from understudy.recipes.networks import build_model, load_stored
from understudy.recipes.run import Run
from understudy.recipes.train import (
    COMMON_SECTIONS,
    run_training,
    train_role,
    untimed,
    validation_metrics,
)
from understudy.train.feed import Feed, ViewPlan
from understudy.train.objective import LabelObjective
from understudy.train.plan import TrainPlan

PHASE = "finetuning"


def train_network(run: Run, role: str) -> Record:
    """Train the student or the control, and fine-tune it where the recipe says so.

    A student that the user brings trained is loaded.
    """
    if role == "student" and run.recipe.student.checkpoint is not None:
        return load_student(run, run.recipe.student.checkpoint)
    if run.recipe.finetuning is None:
        return train_role(run, role)
    return finetune(run, role, train_role(run, role, kind=untuned(role)))


def untuned(role: str) -> str:
    """Return the name of the stage that trains what is fine-tuned afterwards."""
    return f"{role}-untuned"


def finetune(run: Run, role: str, before: Record) -> Record:
    """Go on from the weights of ``before`` with labels alone; the record tells of both."""
    settings = run.recipe.finetuning
    assert settings is not None, "there is fine-tuning"
    stage = run.begin(
        role,
        section=run.recipe.section(*COMMON_SECTIONS, "student", "finetuning")
        | labels_section(run, settings, labels_alone=True),
        parents={before.kind: before.hash},
    )
    if stage.record is not None:
        return stage.record
    result = run_training(run, role, stage.folder, precision=settings.precision, prepare=finetuning)
    tuned_rows = continued(before.timing["rows"], result.pop("rows"))
    rows = [*before.timing["rows"], *tuned_rows]
    accuracies = [row.get("validation_accuracy", 0.0) for row in tuned_rows]
    payload = {
        **before.payload,
        **{name: before.payload[name] + result[name] for name in ("num_steps", "num_rollbacks")},
        "rows": [untimed(row) for row in rows],
        "validation_accuracy": max(accuracies) if settings.keep == "best" else accuracies[-1],
    }
    return stage.finish(
        payload,
        files=weight_files(stage.folder),
        timing={"train_seconds": sum(row["seconds"] for row in rows), "rows": rows},
    )


def continued(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of fine-tuning with epochs and updates counted on from those before."""
    epochs, steps = before[-1]["epoch"] + 1, before[-1]["step"]
    return [
        {**row, "epoch": row["epoch"] + epochs, "step": row["step"] + steps, "phase": PHASE}
        for row in rows
    ]


def finetuning(run: Run, role: str, folder: Path) -> tuple[nn.Module, TrainPlan]:
    """Return the trained network, and what it is fine-tuned with."""
    settings = run.recipe.finetuning
    assert settings is not None, "there is fine-tuning"
    model = build_model(run, role)
    load_stored(run, model, untuned(role), name=run.recipe.student.model.name)
    feed = Feed(
        source=run.source,
        views=run.views,
        indices_N=run.labelled_train_N,
        batch_size=settings.batch_size,
        view_plan=ViewPlan.of(settings, run.recipe.views.num_views),
        seed=run.seed_for("order", PHASE),
    )
    objective = LabelObjective(settings.label_smoothing)
    plan = TrainPlan(feed, objective, settings, validation_metrics(run), folder)
    return with_exits(run, role, model, plan, before=run.folder / untuned(role))

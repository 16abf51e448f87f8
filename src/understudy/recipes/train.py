"""Stages that train: the student, its control, and a teacher that has no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import nn

from understudy.artifacts import Record, atomic_path
from understudy.evaluate.accuracy import evaluate_logits, predict_logits
from understudy.progress import log, setup_logging, shown_progress
from understudy.recipes.networks import WEIGHTS_NAME, build_model
from understudy.recipes.outputs import mean_confidence, stored_teacher
from understudy.recipes.run import Run
from understudy.runtime import derive_seed
from understudy.train.devices import make_fabric, use_threads
from understudy.train.feed import Feed, TeacherSource
from understudy.train.loop import train
from understudy.train.objective import DistillObjective, LabelObjective, Objective
from understudy.train.plan import TrainPlan, TrainResult
from understudy.train.processes import launch_processes
from understudy.train.settings import TrainSettings

Role = Literal["teacher", "student", "control"]

# What each training depends on: a change elsewhere in the recipe leaves it as it is.
SECTIONS: dict[Role, tuple[str, ...]] = {
    "teacher": ("seed", "views", "teacher", "device"),
    "student": ("seed", "views", "student", "training", "distillation", "device"),
    "control": ("seed", "views", "student", "training", "device"),
}
RESULT_NAME = "result.pt"
TIMED_COLUMNS = ("seconds", "samples_per_second")


def train_role(run: Run, role: Role) -> Record:
    """Train one network, continuing what an earlier process left; store weights and metrics.

    The control is the student's network with the same first weights, updates, views and schedule,
    and no teacher.
    """
    section = run.recipe.section(*SECTIONS[role])
    parent = run.parent("labels", "label") if role == "student" else run.parent("split", "teach")
    parents = {parent.kind: parent.hash}
    stage = run.begin(role, section=section, parents=parents)
    if stage.record is not None:
        return stage.record
    settings = settings_of(run, role)
    device = run.recipe.device
    fabric = make_fabric(
        accelerator=device.accelerator,
        num_processes=device.num_processes,
        precision=settings.precision,
    )
    if device.num_processes == 1:
        fabric.launch()
        fit(fabric, run, role)
    else:
        launch_processes(fabric, fit, run, role)
    result = torch.load(stage.folder / RESULT_NAME, weights_only=True)
    rows = result.pop("rows")
    payload = {**result, "rows": [untimed(row) for row in rows]}
    if role == "student":
        payload["teacher_confidence"] = mean_confidence(run)
    return stage.finish(
        payload,
        files=[WEIGHTS_NAME],
        timing={"train_seconds": sum(row["seconds"] for row in rows), "rows": rows},
    )


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without its times, so that equal trainings have equal records."""
    return {name: value for name, value in row.items() if name not in TIMED_COLUMNS}


def fit(fabric: Fabric, run: Run, role: Role) -> None:
    """Train in this process, perhaps one of several; the first one writes weights and metrics."""
    if fabric.world_size > 1:
        setup_logging(quiet=not fabric.is_global_zero)
    use_threads(run.recipe.device.num_threads, num_processes=fabric.world_size)
    section = run.recipe.teacher.model if role == "teacher" else run.recipe.student.model
    model = build_model(run, section, role)
    shown = shown_progress(f"training the {role}", quiet=not fabric.is_global_zero)
    with shown as progress:
        result = train(model, training_plan(run, role), fabric=fabric, progress=progress)
    if fabric.is_global_zero:
        write_result(run.folder / role, result)
        accuracy = result.rows[-1]["validation_accuracy"]
        log.info("%s: %.2f %% validation accuracy, %.0f s", role, 100 * accuracy, result.seconds)


def settings_of(run: Run, role: Role) -> TrainSettings:
    """Return the training section of this role."""
    if role != "teacher":
        return run.recipe.training
    assert run.recipe.teacher.training is not None, "validated: a teacher has weights or training"
    return run.recipe.teacher.training


def training_plan(run: Run, role: Role) -> TrainPlan:
    """Return data, objective, settings and validation of one role."""
    settings = settings_of(run, role)
    objective: Objective = LabelObjective(settings.label_smoothing)
    teacher: TeacherSource | None = None
    # Nothing is stored for a teacher in training, so each of its epochs has a view of its own.
    num_views = settings.num_epochs if role == "teacher" else run.recipe.views.num_views
    if role == "student":
        teacher = stored_teacher(run)
        objective = DistillObjective(run.recipe.distillation, settings.label_smoothing)
    feed = Feed(
        source=run.source,
        views=run.views,
        indices_N=run.splits.train,
        batch_size=settings.batch_size,
        num_views=num_views,
        seed=derive_seed(run.recipe.seed, "order", "teacher" if role == "teacher" else "student"),
        teacher=teacher,
    )
    return TrainPlan(feed, objective, settings, validation_metrics(run), run.folder / role)


def validation_metrics(run: Run) -> Callable[[nn.Module], dict[str, float]]:
    """Return the function that watches a network on the validation split."""
    indices_N = run.splits.validation
    labels_N = run.source.labels_N[indices_N]

    def validate(network: nn.Module) -> dict[str, float]:
        logits_NK = predict_logits(network, run.source, indices_N)
        metrics = evaluate_logits(logits_NK, labels_N, class_names=run.source.class_names)
        return {"accuracy": metrics.accuracy, "nll": metrics.nll, "ece": metrics.ece}

    return validate


def write_result(folder: Path, result: TrainResult) -> None:
    """Write the weights, and what the record needs besides them."""
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file({name: value.contiguous() for name, value in result.weights.items()}, temporary)
    numbers = {
        "rows": result.rows,
        "num_steps": result.num_steps,
        "num_rollbacks": result.num_rollbacks,
    }
    with atomic_path(folder / RESULT_NAME) as temporary:
        torch.save(numbers, temporary)

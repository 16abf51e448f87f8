"""Stages that train: the student, its control, and a teacher that has no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import nn

from understudy.artifacts import Record, atomic_path
from understudy.evaluate.accuracy import evaluate_logits, predict_logits
from understudy.progress import log, setup_logging, shown_progress
from understudy.recipes.exit_training import (
    save_weights,
    training_section,
    weight_files,
    with_exits,
)
from understudy.recipes.label import teacher_source
from understudy.recipes.label_weights import labels_section
from understudy.recipes.networks import build_model, code_section
from understudy.recipes.outputs import mean_confidence
from understudy.recipes.peers import (
    AVERAGE,
    beside_facts,
    file_of,
    first_weights,
    roles_beside,
    watched,
    write_beside,
)
from understudy.recipes.run import Run
from understudy.recipes.teaching import student_curriculum, student_objective
from understudy.runtime import derive_seed
from understudy.train.devices import make_fabric, use_threads
from understudy.train.feed import Feed, SampleOrder, ViewPlan
from understudy.train.loop import train
from understudy.train.objective import LabelObjective, Objective
from understudy.train.plan import TrainPlan, TrainResult, unwatched
from understudy.train.processes import launch_processes
from understudy.train.repeated import RepeatedOrder
from understudy.train.settings import TrainSettings

# What each training depends on: a change elsewhere in the recipe leaves it as it is.
COMMON_SECTIONS = ("seed", "views", "device")
SECTIONS: dict[str, tuple[str, ...]] = {
    "student": ("student", "training", "distillation", "strategy"),
    "control": ("student", "training"),
}
RESULT_NAME = "result.pt"
TIMED_COLUMNS = ("seconds", "samples_per_second")


Precision = Literal["float32", "bfloat16"]
Preparation = Callable[[Run, str, Path], tuple[nn.Module, TrainPlan]]


def train_role(run: Run, role: str, *, kind: str | None = None) -> Record:
    """Train one network, continuing what an earlier process left; store weights and metrics.

    The control is the student's network with the same first weights, updates, views and schedule,
    and no teacher. ``kind`` names the stage where that is not the role.
    """
    section = role_section(run, role)
    parents = {record.kind: record.hash for record in training_parents(run, role)}
    stage = run.begin(kind or role, section=section, parents=parents)
    if stage.record is not None:
        return stage.record
    precision = settings_of(run, role).precision
    result = run_training(run, role, stage.folder, precision=precision, prepare=role_training)
    rows = result.pop("rows")
    payload = {**result, "rows": [untimed(row) for row in rows]}
    if role == "student":
        payload["teacher_confidence"] = mean_confidence(run) if run.stores_outputs else None
        if roles_beside(run):
            payload["beside"] = beside_facts(run, rows)
    beside = roles_beside(run) if role == "student" else []
    return stage.finish(
        payload,
        files=[*weight_files(stage.folder), *map(file_of, beside)],
        timing={"train_seconds": sum(row["seconds"] for row in rows), "rows": rows},
    )


def run_training(
    run: Run, role: str, folder: Path, *, precision: Precision, prepare: Preparation
) -> dict[str, Any]:
    """Train in as many processes as the recipe says; return the rows and other numbers.

    ``prepare`` returns network and plan in each of the processes. The weights are in the folder.
    """
    device = run.recipe.device
    fabric = make_fabric(
        accelerator=device.accelerator,
        num_processes=device.num_processes,
        precision=precision,
    )
    if device.num_processes == 1:
        fabric.launch()
        fit(fabric, run, role, folder, prepare)
    else:
        launch_processes(fabric, fit, run, role, folder, prepare)
    result: dict[str, Any] = torch.load(folder / RESULT_NAME, weights_only=True)
    return result


def training_parents(run: Run, role: str) -> list[Record]:
    """Return the records that a training is made from."""
    if role == "student" and run.stores_outputs:
        return [run.parent("labels", "label")]
    parents = [run.parent("split", "teach")]
    if role == "student" and run.teaches_first:
        parents += [run.parent(teacher, "teach") for teacher in run.teachers]
    return parents


def role_section(run: Run, role: str) -> dict[str, Any]:
    """Return the parts of the recipe that decide a training."""
    names = SECTIONS.get(role, ())
    if role == "student" and not run.teaches_first:
        names += ("teacher",)  # trained together with the student, if there is one
    section = run.recipe.section(*COMMON_SECTIONS, *names)
    if run.step and role not in run.teachers:
        section["step"] = run.step  # its first weights are its own
    if role == "student":
        section |= first_weights(run)
    if role == "student":
        section |= training_section(run) | run.live_section
    if role in run.teachers:
        section["teacher"] = run.teachers[role].model_dump(mode="json")
    section |= labels_section(run, settings_of(run, role), labels_alone=role != "student")
    beside = [r for r in roles_beside(run) if r != AVERAGE] if role == "student" else []
    return section | code_section(run, [role, *beside])


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without its times, so that equal trainings have equal records."""
    return {name: value for name, value in row.items() if name not in TIMED_COLUMNS}


def fit(fabric: Fabric, run: Run, role: str, folder: Path, prepare: Preparation) -> None:
    """Train in this process, perhaps one of several; the first one writes weights and metrics."""
    if fabric.world_size > 1:
        setup_logging(quiet=not fabric.is_global_zero)
    use_threads(run.num_threads, num_processes=fabric.world_size)
    model, plan = prepare(run, role, folder)
    shown = shown_progress(f"training the {role}", quiet=not fabric.is_global_zero)
    with shown as progress:
        result = train(model, plan, fabric=fabric, progress=progress)
    if fabric.is_global_zero:
        write_result(folder, result)
        write_beside(folder, plan.objective)
        accuracy = result.rows[-1]["validation_accuracy"]
        log.info("%s: %.2f %% validation accuracy, %.0f s", role, 100 * accuracy, result.seconds)


def settings_of(run: Run, role: str) -> TrainSettings:
    """Return the training section of this role."""
    if role not in run.teachers:
        return run.recipe.training
    training = run.teachers[role].training
    assert training is not None, "validated: a teacher has weights or training"
    return training


def role_training(run: Run, role: str, folder: Path) -> tuple[nn.Module, TrainPlan]:
    """Return a role's network with its first weights, and what it is trained with."""
    model = build_model(run, role)
    settings, is_student = settings_of(run, role), role == "student"
    # Nothing is stored for a teacher in training, so each of its epochs has a view of its own.
    is_teacher = role in run.teachers
    num_views = settings.num_epochs if is_teacher else run.recipe.views.num_views
    feed = Feed(
        source=run.source,
        views=run.teacher_views if is_teacher else run.views,
        indices_N=run.labelled_train_N if is_teacher else run.splits.train,
        batch_size=settings.batch_size,
        view_plan=ViewPlan.of(settings, num_views),
        seed=order_seed(run, role),
        teacher=teacher_source(run) if is_student and run.teaches_first else None,
        curriculum=sample_order(run, role),
    )
    objective: Objective = LabelObjective(settings.label_smoothing)
    if is_student:
        objective = student_objective(run, model)
    validate = watched(validation_metrics(run), objective)
    on_epoch = (run.watch if role == "student" else None) or unwatched
    plan = TrainPlan(feed, objective, settings, validate, folder, on_epoch)
    return with_exits(run, role, model, plan)


def sample_order(run: Run, role: str) -> SampleOrder | None:
    """Return which samples each epoch shows; None shows all of them.

    A control among unlabelled pictures has as many updates as the student, on the labelled ones.
    """
    if role == "student":
        return student_curriculum(run)
    if role == "control" and not run.recipe.data.all_labelled:
        return RepeatedOrder(run.labelled_train_N, len(run.splits.train))
    return None


def order_seed(run: Run, role: str) -> int:
    """Return the seed of the samples' order: student and control see them in the same."""
    if role in run.teachers:
        return derive_seed(run.recipe.seed, "order", role)
    return run.seed_for("order", "student")


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
    save_weights(folder, result.weights)
    numbers = {
        "rows": result.rows,
        "num_steps": result.num_steps,
        "num_rollbacks": result.num_rollbacks,
    }
    with atomic_path(folder / RESULT_NAME) as temporary:
        torch.save(numbers, temporary)

"""Training that goes on from a student that has been changed: after pruning, or in int8."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from understudy.compress.settings import PruneStep, QuantizeStep
from understudy.errors import InputError, problem
from understudy.recipes.label import teacher_source
from understudy.recipes.run import Run
from understudy.recipes.teaching import student_objective
from understudy.recipes.train import validation_metrics
from understudy.train.feed import Feed
from understudy.train.loss_table import LOSSES
from understudy.train.objective import LabelObjective, Objective
from understudy.train.plan import TrainPlan


def is_guided(run: Run, step: PruneStep | QuantizeStep) -> bool:
    """Return whether the teacher guides a step's training.

    Raises:
        InputError: the step asks for a teacher, and there is none that knows the task before.
    """
    if step.guidance == "teacher" and not run.teaches_first:
        raise InputError(
            problem(
                f"compression asks for the teacher's guidance, and strategy "
                f"{run.recipe.strategy.name} has no teacher that is trained before the student",
                expected="guidance: labels, or a strategy with such a teacher",
                mend="Leave `guidance` out.",
            )
        )
    return run.teaches_first if step.guidance is None else step.guidance == "teacher"


def further_plan(
    run: Run, model: nn.Module, step: PruneStep | QuantizeStep, *, phase: str, folder: Path
) -> TrainPlan:
    """Return what a changed student is trained with: feed and losses as the student's own.

    A network that computes in int8 while it learns has no layers to look into, so of the recipe's
    losses it keeps those on logits.
    """
    settings = step.training
    assert settings is not None, "the step trains"
    guided = is_guided(run, step)
    feed = Feed(
        source=run.source,
        views=run.views,
        indices_N=run.splits.train if guided else run.labelled_train_N,
        batch_size=settings.batch_size,
        num_views=run.recipe.views.num_views,
        seed=run.seed_for("order", phase),
        teacher=teacher_source(run) if guided else None,
    )
    objective: Objective = LabelObjective(settings.label_smoothing)
    if guided:
        teaching = run.recipe.distillation
        if isinstance(step, QuantizeStep):
            kept = {n: loss for n, loss in teaching.losses.items() if LOSSES[n].reads == "logits"}
            teaching = teaching.model_copy(update={"losses": kept})
        objective = student_objective(run, model, teaching)
    return TrainPlan(feed, objective, settings, validation_metrics(run), folder)

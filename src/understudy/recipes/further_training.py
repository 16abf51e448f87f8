"""Training that goes on from a student that has been changed: after pruning, or in int8."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from understudy.compress.settings import PruneStep, QuantizeStep
from understudy.errors import InputError, problem
from understudy.models.strided_pointwise import has_narrow_strides
from understudy.recipes.label import teacher_source
from understudy.recipes.run import Run
from understudy.recipes.teaching import student_objective
from understudy.recipes.train import validation_metrics
from understudy.train.distill_settings import DistillSettings
from understudy.train.feed import Feed, ViewPlan
from understudy.train.loss_table import LOSSES
from understudy.train.objective import LabelObjective, Objective
from understudy.train.plan import TrainPlan


def is_guided(run: Run, step: PruneStep | QuantizeStep) -> bool:
    """Return whether the teacher guides a step's training.

    Raises:
        InputError: the step asks for a teacher, and there is none that knows the task before; or
            nothing that a network in int8 can learn from is left.
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
    guided = run.teaches_first if step.guidance is None else step.guidance == "teacher"
    if guided and isinstance(step, QuantizeStep) and step.training is not None:
        teaching = logits_alone(run.recipe.distillation)
        if not teaching.losses and teaching.kl_weight == 0 and teaching.ce_weight == 0:
            raise InputError(
                problem(
                    "quantisation-aware training is to learn from losses on features alone "
                    f"({', '.join(run.recipe.distillation.losses)}), which a network in int8 "
                    "does not give",
                    expected="a loss on logits besides",
                    mend="Set `guidance: labels` for this step, or kl_weight or ce_weight above 0.",
                )
            )
    return guided


def logits_alone(teaching: DistillSettings) -> DistillSettings:
    """Return what is left of the losses for a network that has no layers to look into."""
    kept = {name: loss for name, loss in teaching.losses.items() if LOSSES[name].reads == "logits"}
    return teaching.model_copy(update={"losses": kept})


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
        view_plan=ViewPlan.of(settings, run.recipe.views.num_views),
        seed=run.seed_for("order", phase),
        teacher=teacher_source(run) if guided else None,
    )
    objective: Objective = LabelObjective(settings.label_smoothing)
    if guided:
        teaching = run.recipe.distillation
        if isinstance(step, QuantizeStep):
            teaching = logits_alone(teaching)
        objective = student_objective(
            run, model, teaching, label_smoothing=settings.label_smoothing
        )
    if isinstance(step, QuantizeStep) and has_narrow_strides(model):
        settings = settings.model_copy(update={"channels_last": False})
    return TrainPlan(feed, objective, settings, validation_metrics(run), folder)

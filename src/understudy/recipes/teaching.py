"""How a recipe's student is taught: its objective and its curriculum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from understudy.losses import class_prior_table
from understudy.models.taps import Taps, tap_shapes
from understudy.recipes.networks import trained_model
from understudy.recipes.outputs import stored_outputs
from understudy.recipes.peers import beside_objective
from understudy.recipes.run import Run
from understudy.recipes.strategies import DeepToShallow
from understudy.train.balance import build_balance
from understudy.train.curriculum import CurriculumOrder, answered_labels, teacher_difficulty
from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import DistillObjective
from understudy.train.feed import SampleOrder
from understudy.train.objective import LabelObjective, Objective, value_at
from understudy.train.terms import TermContext, build_terms, student_taps

NUM_SCORED_VIEWS = 4


def student_objective(
    run: Run,
    model: nn.Module,
    settings: DistillSettings | None = None,
    *,
    label_smoothing: float | None = None,
) -> Objective:
    """Return what the student minimises: the losses of the recipe in the way of its strategy.

    Args:
        settings: other losses than those of the recipe.
        label_smoothing: of a training that is not the recipe's ``training``.
    """
    if label_smoothing is None:
        label_smoothing = run.recipe.training.label_smoothing
    if isinstance(run.recipe.strategy, DeepToShallow):  # the rest is between its exits
        return LabelObjective(label_smoothing)
    settings = run.recipe.distillation if settings is None else settings
    taps = student_taps(settings)
    # The student's first weights are drawn already; adapters come from a seed of their own.
    torch.manual_seed(run.seed_for("weights", "parts"))
    alone = DistillObjective(
        settings,
        label_smoothing,
        taps=Taps(model, taps) if taps else None,
        terms=build_terms(settings, term_context(run, model, settings)),
        balance=build_balance(settings),
    )
    return beside_objective(run, model, alone)


def term_context(run: Run, model: nn.Module, settings: DistillSettings) -> TermContext:
    """Return what the losses have to know of both networks and of the training split."""
    needs_shapes = bool(student_taps(settings))
    return TermContext(
        student_shapes=tap_shapes(model, run.source.image_shape) if needs_shapes else {},
        teacher_shapes=teacher_shapes(run) if needs_shapes else {},
        train_indices_N=run.splits.train,
        train_labels_N=run.source.labels_N[run.splits.train],
        prior_KK=class_priors(run) if "class_prior" in settings.losses else None,
    )


def teacher_shapes(run: Run) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the teacher's layers; of an ensemble's with the member before."""
    shapes = {}
    for number, role in enumerate(run.teachers, start=1):
        model = trained_model(run, role, run.parent(role, "teach"))
        prefix = f"{number}/" if len(run.teachers) > 1 else ""
        for name, shape in tap_shapes(model, run.source.image_shape).items():
            shapes[prefix + name] = shape
    return shapes


def class_priors(run: Run) -> Tensor:
    """Return the teacher's mean soft distribution for each class, over the first view."""
    temperature = prior_temperature(run)
    outputs = stored_outputs(run, run.splits.train, view=0)
    labels_N = run.source.labels_N[run.splits.train]
    num_classes = len(run.source.class_names)
    return class_prior_table(
        outputs.logits_NK, labels_N, num_classes=num_classes, temperature=temperature
    )


def prior_temperature(run: Run) -> float:
    """Return the temperature of the table, which does not move: half-way where it is scheduled."""
    settings = run.recipe.distillation
    given = settings.losses["class_prior"].arguments.get("temperature")
    return value_at(settings.temperature, 0.5) if given is None else given


def student_curriculum(run: Run) -> SampleOrder | None:
    """Return which samples each epoch shows; None shows all of them.

    The teacher's difficulty of a sample is the mean over the first ``NUM_SCORED_VIEWS`` views.
    """
    settings = run.recipe.distillation.curriculum
    if settings is None:
        return None
    indices_N, num_epochs = run.splits.train, run.recipe.training.num_epochs
    labels_N = run.source.labels_N[indices_N]
    if settings.difficulty == "student_loss":
        return CurriculumOrder(settings, indices_N, labels_N, num_epochs=num_epochs)
    # A single view says as much of its crop as of the sample.
    views = range(min(NUM_SCORED_VIEWS, run.recipe.views.num_views))
    logits_VNK = torch.stack(
        [stored_outputs(run, indices_N, view=view).logits_NK for view in views]
    )
    scores = [teacher_difficulty(z, labels_N, by=settings.difficulty) for z in logits_VNK]
    return CurriculumOrder(
        settings,
        indices_N,
        answered_labels(logits_VNK.mean(dim=0), labels_N),
        num_epochs=num_epochs,
        difficulty_N=torch.stack(scores).mean(dim=0),
    )

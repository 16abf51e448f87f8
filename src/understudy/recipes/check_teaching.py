"""Checks of what a recipe asks of losses, layers and strategy, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from understudy.data.batches import Batch
from understudy.errors import problem
from understudy.heads.adapters import describe_match
from understudy.models.taps import EMBEDDING, check_taps, kind_shape, tap_shapes
from understudy.progress import log
from understudy.recipes.check_curriculum import check_balance, check_curriculum
from understudy.recipes.networks import build_model
from understudy.recipes.outputs import teacher_features
from understudy.recipes.run import Run
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.distill_settings import (
    DistillSettings,
    LossSettings,
    compared_kind,
    layers_of,
)
from understudy.train.loss_table import LOSSES
from understudy.train.terms import Seen, TermContext, build_terms, student_taps, teacher_taps

# Pictures that every loss on features is tried on before anything runs.
NUM_TRIED = 2


def check_teaching(run: Run) -> list[str]:
    """Return everything wrong with losses and layers; all networks can be built already."""
    problems = check_losses(run) + check_stored(run) + check_contrast(run) + check_positions(run)
    problems += check_curriculum(run) + check_balance(run)
    if problems or not student_taps(run.recipe.distillation):
        return problems
    student = build_model(run, "student")
    taps = student_taps(run.recipe.distillation)
    problems += check_taps(student, run.source.image_shape, taps, where="the student")
    teachers = {role: build_model(run, role) for role in run.teachers}
    problems += check_members(run)
    for role, teacher in teachers.items():
        taps = teacher_features(run, role)
        problems += check_taps(teacher, run.source.image_shape, taps, where=f"the {role}")
    return problems or check_adapters(run, student, teachers)


def check_losses(run: Run) -> list[str]:
    """Losses must have what they read: a teacher, labels of their own, a plain network."""
    settings, recipe = run.recipe.distillation, run.recipe
    problems = []
    if settings.losses and not run.teaches_first:
        problems.append(
            problem(
                f"distillation.losses names {', '.join(settings.losses)} and strategy "
                f"{recipe.strategy.name} has no trained teacher",
                expected="kl_weight and ce_weight alone",
                mend="Drop distillation.losses, or take a strategy with a teacher.",
            )
        )
    if recipe.labelling.live and not run.teaches_first:
        problems.append(
            problem(
                f"labelling.live and strategy {recipe.strategy.name} has no trained teacher",
                expected="a strategy whose teacher can be run on every batch",
                mend="Set labelling.live to false.",
            )
        )
    needy = [name for name in settings.losses if LOSSES[name].needs_labels]
    if needy and run.views.mixes:
        problems.append(
            problem(
                f"{', '.join(needy)} together with views that mix two pictures",
                expected="one label a picture",
                mend="Drop mixup and cutmix from views.transforms, or these losses.",
            )
        )
    if recipe.training.compile and student_taps(settings):
        problems.append(
            problem(
                "training.compile together with losses on the student's layers",
                expected="one of them",
                mend="Set training.compile to false.",
            )
        )
    return problems


def check_stored(run: Run) -> list[str]:
    """Losses on the teacher's outputs must find them stored as they read them."""
    losses, problems = run.recipe.distillation.losses, []
    if "class_prior" in losses and run.teaches_first and not run.stores_outputs:
        problems.append(
            problem(
                "class_prior with labelling.live",
                expected="stored outputs, over which the priors are the mean",
                mend="Set labelling.live to false.",
            )
        )
    top_k = run.recipe.labelling.top_k
    if "top_k_kl" in losses and top_k is not None and run.stores_outputs and len(run.teachers) > 1:
        # Every member keeps classes of its own, so none but all of them have an answer of all.
        problems.append(
            problem(
                f"top_k_kl with labelling.top_k {top_k} and {len(run.teachers)} teachers, each of "
                "which keeps classes of its own",
                expected="one teacher, or all outputs of each",
                mend="Drop labelling.top_k, or take kl_weight in the place of top_k_kl.",
            )
        )
    return problems


def check_contrast(run: Run) -> list[str]:
    """The memory of ``crd`` has one row for each picture, in one place."""
    if "crd" not in run.recipe.distillation.losses:
        return []
    problems, num_processes = [], run.recipe.device.num_processes
    if run.views.mixes:
        # A mixture would go into the row of one picture, and have the other for a negative.
        problems.append(
            problem(
                "crd together with views that mix two pictures",
                expected="one picture for each row of its memory",
                mend="Drop mixup and cutmix from views.transforms, or crd.",
            )
        )
    if num_processes > 1:
        problems.append(
            problem(
                f"crd with device.num_processes {num_processes}",
                expected="one process, which holds the memory of all training pictures",
                mend="Set device.num_processes to 1, or drop crd.",
            )
        )
    return problems


def check_positions(run: Run) -> list[str]:
    """Losses that compare positions name layers that have them."""
    return [
        problem(
            f"distillation.losses.{name} compares positions, which an embedding has not",
            expected="layers with positions, of the student and of the teacher",
            mend=f"Name them in distillation.losses.{name}.layers: "
            "[{student: LAYER, teacher: LAYER}].",
        )
        for name, loss in run.recipe.distillation.losses.items()
        if LOSSES[name].needs_positions
        # With several teachers it is "2/embedding".
        and any(
            EMBEDDING in (pair.student, pair.teacher.rpartition("/")[2]) for pair in layers_of(loss)
        )
    ]


def check_members(run: Run) -> list[str]:
    """With several teachers a layer says whose it is, the embedding that is the default too."""
    if len(run.teachers) < 2:
        return []
    known = tuple(f"{number}/" for number in range(1, len(run.teachers) + 1))
    return [
        problem(
            f"distillation.losses.{name} compares with the teacher's layer {pair.teacher!r}, and "
            f"there are {len(run.teachers)} teachers",
            expected=f"the number of the teacher before it, such as `1/{pair.teacher}`",
            mend="Say in its `layers` whose layer it is, such as "
            f"[{{student: {pair.student}, teacher: 1/{pair.teacher}}}].",
        )
        for name, loss in run.recipe.distillation.losses.items()
        if LOSSES[name].reads != "logits"
        for pair in layers_of(loss)
        if not pair.teacher.startswith(known)
    ]


def check_adapters(run: Run, student: nn.Module, teachers: Mapping[str, nn.Module]) -> list[str]:
    """Every pair of layers can be compared; how unequal shapes are resolved is logged."""
    from understudy.recipes.check import problems_of

    shape, settings = run.source.image_shape, run.recipe.distillation
    teacher_shapes = {
        (f"{number}/" if len(teachers) > 1 else "") + name: found
        for number, teacher in enumerate(teachers.values(), start=1)
        for name, found in tap_shapes(teacher, shape).items()
    }
    few_N = run.splits.train[:NUM_TRIED]
    context = TermContext(
        student_shapes=tap_shapes(student, shape),
        teacher_shapes=teacher_shapes,
        train_indices_N=few_N,
        train_labels_N=run.source.labels_N[few_N],
    )
    problems = []
    for name, loss in settings.losses.items():
        if LOSSES[name].reads == "logits":
            continue
        alone = settings.model_copy(update={"losses": {name: loss}})
        where = f"distillation.losses.{name}"
        found = problems_of(lambda alone=alone: try_losses(alone, context))  # type: ignore[misc]
        problems += [text if text.startswith(where) else f"{where}: {text}" for text in found]
        if not found:
            log_matches(name, loss, context)
    return problems


def try_losses(settings: DistillSettings, context: TermContext) -> None:
    """Build losses on features and run them on zeros: what cannot meet is told before any training.

    Raises:
        ModelError: layers that a loss cannot compare.
    """
    labels_N = context.train_labels_N
    shapes = (
        (student_taps(settings), context.student_shapes),
        (teacher_taps(settings), context.teacher_shapes),
    )
    student, teacher = (
        {t.key: torch.zeros(len(labels_N), *kind_shape(known[t.name], t.kind)) for t in taps}
        for taps, known in shapes
    )
    no_logits_NK = torch.zeros(len(labels_N), 0)
    batch = Batch(context.train_indices_N, torch.zeros(len(labels_N), 0, 0, 0), labels_N)
    outputs = TeacherOutputs(no_logits_NK, teacher)
    # Random numbers are as they were: some losses draw their weights, crd its negatives too.
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        for term in build_terms(settings, context).eval().values():
            term(Seen(no_logits_NK, student, outputs, batch, temperature=1.0))


def log_matches(name: str, loss: LossSettings, context: TermContext) -> None:
    """Log how the layers of unequal shapes that the recipe names are made to meet."""
    kind = compared_kind(name, loss)
    for pair in loss.layers:
        shapes = (
            kind_shape(context.student_shapes[pair.student], kind),
            kind_shape(context.teacher_shapes[pair.teacher], kind),
        )
        if shapes[0] != shapes[1]:
            adapter = loss.adapter if LOSSES[name].equal_widths else "none"
            sentence = describe_match(*shapes, adapter, features=kind)
            log.info("%s, %s from %s: %s", name, pair.student, pair.teacher, sentence)

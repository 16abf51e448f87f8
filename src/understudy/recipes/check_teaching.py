"""Checks of what a recipe asks of losses, layers and strategy, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from understudy.errors import problem
from understudy.heads.adapters import describe_match
from understudy.models.taps import check_taps, kind_shape, tap_shapes
from understudy.progress import log
from understudy.recipes.check_curriculum import check_balance, check_curriculum
from understudy.recipes.networks import build_model
from understudy.recipes.outputs import teacher_features
from understudy.recipes.run import Run
from understudy.train.distill_settings import kept_kind
from understudy.train.loss_table import LOSSES
from understudy.train.terms import TermContext, build_terms, student_taps


def check_teaching(run: Run) -> list[str]:
    """Return everything wrong with losses and layers; all networks can be built already."""
    problems = check_losses(run) + check_curriculum(run) + check_balance(run)
    if problems or not student_taps(run.recipe.distillation):
        return problems
    student = build_model(run, "student")
    names = [tap.name for tap in student_taps(run.recipe.distillation)]
    problems += check_taps(student, run.source.image_shape, names, where="the student")
    teachers = {role: build_model(run, role) for role in run.teachers}
    problems += check_members(run)
    for role, teacher in teachers.items():
        names = [tap.name for tap in teacher_features(run, role)]
        problems += check_taps(teacher, run.source.image_shape, names, where=f"the {role}")
    return problems or check_adapters(run, student, teachers)


def check_losses(run: Run) -> list[str]:
    """Losses must have what they read: labels of their own, stored outputs, a plain network."""
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
    if "class_prior" in settings.losses and run.teaches_first and not run.stores_outputs:
        problems.append(
            problem(
                "class_prior with labelling.live",
                expected="stored outputs, over which the priors are the mean",
                mend="Set labelling.live to false.",
            )
        )
    if "crd" in settings.losses and recipe.device.num_processes > 1:
        problems.append(
            problem(
                f"crd with device.num_processes {recipe.device.num_processes}",
                expected="one process, which holds the memory of all training pictures",
                mend="Set device.num_processes to 1, or drop crd.",
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


def check_members(run: Run) -> list[str]:
    """With several teachers a layer says whose it is."""
    if len(run.teachers) < 2:
        return []
    known = tuple(f"{number}/" for number in range(1, len(run.teachers) + 1))
    return [
        problem(
            f"distillation.losses.{name} names the teacher's layer {pair.teacher!r}",
            expected=f"the number of the teacher before it, such as `1/{pair.teacher}`",
            mend="Say whose layer it is.",
        )
        for name, loss in run.recipe.distillation.losses.items()
        for pair in loss.layers
        if not pair.teacher.startswith(known)
    ]


def check_adapters(run: Run, student: nn.Module, teachers: Mapping[str, nn.Module]) -> list[str]:
    """Every pair of layers can be compared; how unequal shapes are resolved is logged."""
    from understudy.recipes.check import problems_of

    shape, num_classes = run.source.image_shape, len(run.source.class_names)
    teacher_shapes = {
        (f"{number}/" if len(teachers) > 1 else "") + name: found
        for number, teacher in enumerate(teachers.values(), start=1)
        for name, found in tap_shapes(teacher, shape).items()
    }
    context = TermContext(
        student_shapes=tap_shapes(student, shape),
        teacher_shapes=teacher_shapes,
        train_indices_N=run.splits.train[:1],
        train_labels_N=run.source.labels_N[run.splits.train[:1]],
        prior_KK=torch.zeros(num_classes, num_classes),
    )
    settings = run.recipe.distillation
    problems = problems_of(lambda: build_terms(settings, context))
    for name, loss in settings.losses.items():
        for pair in loss.layers:
            kind = kept_kind(name, loss)
            shapes = (
                kind_shape(context.student_shapes[pair.student], kind),
                kind_shape(teacher_shapes[pair.teacher], kind),
            )
            if shapes[0] != shapes[1]:
                adapter = loss.adapter if LOSSES[name].equal_widths else "none"
                sentence = describe_match(*shapes, adapter, features=kind)
                log.info("%s, %s from %s: %s", name, pair.student, pair.teacher, sentence)
    return problems

"""The labels of further tasks, and what can be wrong with them before anything runs."""

from __future__ import annotations

import difflib

from understudy.errors import InputError, problem
from understudy.heads.tasks import TaskLabels, task_labels
from understudy.recipes.head_settings import HeadSettings, check_task_names
from understudy.recipes.networks import is_onnx
from understudy.recipes.run import Run


def labels_of(run: Run, task: str) -> TaskLabels:
    """Return the labels of a task for all samples.

    Raises:
        DataError: the column's values are no classes.
    """
    column = run.recipe.heads[task].label_column
    where = f"heads.{task}.label_column '{column}'"
    return task_labels(run.source.metadata[column], run.splits.train, where=where)


def check_tasks(run: Run) -> list[str]:
    """Return what is wrong with the tasks of a recipe; the data can be read."""
    problems = check_task_names(list(run.recipe.heads))
    for task, settings in run.recipe.heads.items():
        where = f"heads.{task}"
        problems += check_teacher_of(run, settings, where)
        columns = run.source.metadata
        if settings.label_column not in columns:
            near = difflib.get_close_matches(settings.label_column, columns, n=1)
            problems.append(
                problem(
                    f"{where}.label_column is '{settings.label_column}', which the data has not",
                    expected=f"one of {', '.join(columns) or '(it has no further columns)'}",
                    mend=f"Did you mean '{near[0]}'?" if near else "Name one of these.",
                )
            )
            continue
        try:
            labels = labels_of(run, task)
        except InputError as error:
            problems += error.problems
            continue
        problems += check_sizes_of(run, settings, labels, where)
    return problems


def check_teacher_of(run: Run, settings: HeadSettings, where: str) -> list[str]:
    """A head that is guided needs a trained teacher with an embedding."""
    if not settings.teacher or (run.teaches_first and not is_onnx(run.teachers["teacher"].model)):
        return []
    return [
        problem(
            f"{where}.teacher is true, and this recipe's teacher has no embedding to learn from",
            expected="a teacher that is trained before the student, in PyTorch",
            mend=f"Set {where}.teacher to false.",
        )
    ]


def check_sizes_of(run: Run, settings: HeadSettings, labels: TaskLabels, where: str) -> list[str]:
    """There must be a batch to train on, and something to watch."""
    num_known = {
        name: int((labels.labels_N[getattr(run.splits, name)] >= 0).sum())
        for name in ("train", "validation")
    }
    problems = []
    sizes = {"training": settings.training.batch_size}
    if settings.teacher:
        sizes["probe"] = settings.probe.batch_size
    for name, size in sizes.items():
        if size > num_known["train"]:
            problems.append(
                problem(
                    f"{where}.{name}.batch_size is {size} and the training split holds "
                    f"{num_known['train']} samples with a label",
                    expected="at least one batch",
                    mend="Lower it.",
                )
            )
    if num_known["validation"] == 0:
        problems.append(
            problem(
                f"{where}: no validation sample has a label that the training split knows",
                expected="at least one",
                mend="Give a larger data.validation_fraction, or another column.",
            )
        )
    return problems

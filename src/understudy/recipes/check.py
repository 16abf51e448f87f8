"""Checks of a whole recipe against the world, before anything runs: all problems at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from understudy.data.view_spec import check_spec
from understudy.errors import InputError, RecipeError, problem
from understudy.models.catalog import check_model
from understudy.recipes.run import Run
from understudy.recipes.schema import Recipe


def check_recipe(run: Run) -> None:
    """Raise one RecipeError that lists everything wrong with the run's recipe.

    First what can be told from the recipe and the file system alone; if that holds, also whether
    the data can be read, the splits be made, and the networks be built and given their weights.
    """
    recipe = run.recipe
    problems = [
        *check_data_path(recipe),
        *check_models(recipe),
        *check_spec(run.transforms, where="views.transforms"),
        *check_labelling(recipe),
    ]
    if problems:
        raise RecipeError(*problems)
    data_problems = problems_of(lambda: (run.source, run.splits))
    if data_problems:
        raise RecipeError(*data_problems)
    problems += check_spec(
        run.transforms, image_shape=run.source.image_shape, where="views.transforms"
    )
    problems += check_class_names(run)
    problems += check_networks(run)
    if problems:
        raise RecipeError(*dict.fromkeys(problems))


def problems_of(action: Callable[[], object]) -> list[str]:
    """Return the problems that the action raises, an empty list if it succeeds."""
    try:
        action()
    except InputError as error:
        return list(error.problems)
    return []


def check_data_path(recipe: Recipe) -> list[str]:
    """A source that looks like a path must exist."""
    source = recipe.data.source
    path = Path(source).expanduser()
    looks_like_path = source.startswith((".", "/", "~")) or path.suffix in (".parquet", ".arrow")
    if looks_like_path and not path.exists():
        return [
            problem(
                f"data.source is {source}, which does not exist",
                expected="an existing file or folder",
                mend="Correct the path; it is taken relative to the current folder.",
            )
        ]
    return []


def check_models(recipe: Recipe) -> list[str]:
    """Names, arguments and files of both networks."""
    teacher, student = recipe.teacher.model, recipe.student.model
    problems = [f"student: {text}" for text in check_model(student.name, student.arguments)]
    files: list[tuple[str, Path | None]]
    if teacher.name.endswith(".onnx"):
        files = [("teacher.model.name", Path(teacher.name))]
    else:
        problems += [f"teacher: {text}" for text in check_model(teacher.name, teacher.arguments)]
        files = [("teacher.checkpoint", recipe.teacher.checkpoint)]
    problems += [
        problem(
            f"{name} is {path}, which does not exist",
            expected="an existing file",
            mend="Correct the path; it is taken relative to the current folder.",
        )
        for name, path in files
        if path is not None and not path.is_file()
    ]
    return problems


def check_labelling(recipe: Recipe) -> list[str]:
    """Settings that need each other."""
    problems = []
    device = recipe.device
    if recipe.training.batch_size < device.num_processes:
        problems.append(
            problem(
                f"training.batch_size is {recipe.training.batch_size} with "
                f"{device.num_processes} processes",
                expected="at least one sample a process",
                mend="Raise the batch size or lower device.num_processes.",
            )
        )
    return problems


def check_class_names(run: Run) -> list[str]:
    """The teacher's class names and the stored top k must fit the data."""
    problems = []
    names, num_classes = run.recipe.teacher.class_names, len(run.source.class_names)
    if names is not None and len(names) != num_classes:
        problems.append(
            problem(
                f"teacher.class_names has {len(names)} names and the data {num_classes} classes",
                expected="the data's classes in the teacher's order",
                mend=f"The data's classes are: {', '.join(run.source.class_names)}.",
            )
        )
    top_k = run.recipe.labelling.top_k
    if top_k is not None and top_k > num_classes:
        problems.append(
            problem(
                f"labelling.top_k is {top_k} and the data has {num_classes} classes",
                expected=f"at most {num_classes}",
                mend="Lower it, or drop it to keep all outputs.",
            )
        )
    smallest = len(run.splits.train)
    if run.recipe.training.batch_size > smallest:
        problems.append(
            problem(
                f"training.batch_size is {run.recipe.training.batch_size} and the training split "
                f"holds {smallest} samples",
                expected="at least one batch",
                mend="Lower training.batch_size or give more data.",
            )
        )
    return problems


def check_networks(run: Run) -> list[str]:
    """Both networks can be built for this data, and the teacher's weights fit it."""
    from understudy.recipes.networks import build_model
    from understudy.recipes.teach import load_teacher

    problems = problems_of(lambda: build_model(run, run.recipe.student.model, "student"))
    return problems + problems_of(lambda: load_teacher(run))

"""Checks of a whole recipe against the world, before anything runs: all problems at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from understudy.data.view_spec import check_spec
from understudy.errors import InputError, RecipeError, problem
from understudy.models.catalog import check_model
from understudy.recipes.run import Run
from understudy.recipes.schema import Recipe, parse_recipe
from understudy.recipes.sections import DataSection, StudentSection, TeacherSection, ViewsSection
from understudy.recipes.strategies import Strategy
from understudy.train.distill_settings import DistillSettings
from understudy.train.settings import TrainSettings

SectionType = TypeVar("SectionType", bound=BaseModel)


class _StrategyOf(BaseModel):
    strategy: Strategy


def check_recipe(run: Run) -> None:
    """Raise one RecipeError that lists everything wrong with the run's recipe.

    First what can be told from the recipe and the file system alone; if that holds, also whether
    the data can be read, the splits be made, and the networks be built and given their weights.
    """
    recipe = run.recipe
    problems = [
        *check_folder(run.folder),
        *check_data_path(recipe.data),
        *(
            text
            for role, section in run.teachers.items()
            for text in check_teacher_section(section, where=teacher_place(role))
        ),
        *check_student_section(recipe.student),
        *(
            f"{r}: {text}"
            for r, m in run.peers.items()
            for text in check_model(m.name, m.arguments)
        ),
        *check_spec(run.transforms, where="views.transforms"),
        *check_processes(run),
    ]
    if problems:
        raise RecipeError(*problems)
    data_problems = problems_of(lambda: (run.source, run.splits))
    if data_problems:
        raise RecipeError(*data_problems)
    problems += check_spec(
        run.transforms, image_shape=run.source.image_shape, where="views.transforms"
    )
    problems += check_sizes(run)
    problems += check_heads(run)
    problems += check_networks(run)
    if problems:
        raise RecipeError(*dict.fromkeys(problems))


def parse_checked(values: Any, *, origin: str = "recipe") -> Recipe:
    """Return the recipe; where it is wrong, its sound sections are compared with the world too.

    Raises:
        RecipeError: with every problem that can be told.
    """
    try:
        return parse_recipe(values, origin=origin)
    except RecipeError as error:
        found = sound_section_problems(values, origin) if isinstance(values, dict) else []
        # The check of parts against each other runs only when each is valid by itself.
        new = [text for text in found if not any(text in told for told in error.problems)]
        raise RecipeError(*error.problems, *new) from None


def sound_section_problems(values: dict[str, Any], origin: str) -> list[str]:
    """Return what is wrong with sections that are valid by themselves."""
    problems = []
    if (data := sound(DataSection, values.get("data"))) is not None:
        problems += check_data_path(data)
    if (teacher := sound(TeacherSection, values.get("teacher"))) is not None:
        problems += check_teacher_section(teacher)
    if (student := sound(StudentSection, values.get("student"))) is not None:
        problems += check_student_section(student)
    if (views := sound(ViewsSection, values.get("views"))) is not None:
        problems += check_spec(views.spec, where="views.transforms")
    strategy = sound(_StrategyOf, {"strategy": values.get("strategy") or {"name": "offline"}})
    distillation = sound(DistillSettings, values.get("distillation") or {})
    told = teacher is not None or values.get("teacher") is None
    if strategy is not None and distillation is not None and told:
        unfit = strategy.strategy.problems(teacher, distillation)
        problems += [f"{origin}: {text}." for text in unfit]
    return problems


def sound(kind: type[SectionType], values: Any) -> SectionType | None:
    """Return a section, or None if it is not there or not valid."""
    try:
        return kind.model_validate(values)
    except ValidationError:
        return None


def problems_of(action: Callable[[], object]) -> list[str]:
    """Return the problems that the action raises, an empty list if it succeeds."""
    try:
        action()
    except InputError as error:
        return list(error.problems)
    return []


def check_folder(folder: Path) -> list[str]:
    """The run folder must be one, or be possible to make."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return []
    how = "cannot be written to" if existing.is_dir() else "is a file"
    return [
        problem(
            f"{folder} cannot be the run folder: {existing} {how}",
            expected="a folder, or a path where one can be made",
            mend="Name another one with --out.",
        )
    ]


def check_data_path(data: DataSection) -> list[str]:
    """A source that looks like a path must exist."""
    problems = []
    for name, source in (("source", data.source), ("unlabelled", data.unlabelled or "")):
        path = Path(source).expanduser()
        is_table = path.suffix in (".parquet", ".arrow")
        if (source.startswith((".", "/", "~")) or is_table) and not path.exists():
            problems.append(
                problem(
                    f"data.{name} is {source}, which does not exist",
                    expected="an existing file or folder",
                    mend="Correct the path; it is taken relative to the current folder.",
                )
            )
    return problems


def check_student_section(student: StudentSection) -> list[str]:
    """Name, arguments and file of the student's network."""
    model, problems = student.model, []
    if student.checkpoint is not None:
        problems = check_file("student.checkpoint", student.checkpoint)
    return [*(f"student: {text}" for text in check_model(model.name, model.arguments)), *problems]


def teacher_place(role: str) -> str:
    """Return where a recipe describes a teacher: "teacher-2" is the first besides `teacher`."""
    _, _, number = role.partition("-")
    return f"strategy.teachers.{int(number) - 2}" if number else "teacher"


def check_teacher_section(teacher: TeacherSection, *, where: str = "teacher") -> list[str]:
    """Name, arguments and file of a teacher's network."""
    problems, model = [], teacher.model
    if model.name.endswith(".onnx"):
        name, path = f"{where}.model.name", Path(model.name)
    else:
        problems = [f"{where}: {text}" for text in check_model(model.name, model.arguments)]
        if teacher.checkpoint is None:
            return problems
        name, path = f"{where}.checkpoint", teacher.checkpoint
    return problems + check_file(name, path)


def check_file(name: str, path: Path) -> list[str]:
    """A file that the recipe names must be there."""
    if path.is_file():
        return []
    how = "a folder" if path.is_dir() else "not there"
    return [
        problem(
            f"{name} is {path}, which is {how}",
            expected="an existing file",
            mend="Correct the path; it is taken relative to the current folder.",
        )
    ]


def check_processes(run: Run) -> list[str]:
    """Every batch is divided evenly among the processes, so it must be divisible."""
    recipe = run.recipe
    num_processes = recipe.device.num_processes
    sizes = {"training.batch_size": recipe.training.batch_size}
    if recipe.finetuning is not None:
        sizes["finetuning.batch_size"] = recipe.finetuning.batch_size
    for role, teacher in run.teachers.items():
        if teacher.training is not None:
            sizes[f"{teacher_place(role)}.training.batch_size"] = teacher.training.batch_size
    for number, step in enumerate(recipe.compression.steps):
        if step.training is not None:
            sizes[f"compression.steps.{number}.training.batch_size"] = step.training.batch_size
    return [
        problem(
            f"{name} is {size} with {num_processes} processes",
            expected=f"a multiple of {num_processes}",
            mend="Change the batch size or device.num_processes.",
        )
        for name, size in sizes.items()
        if size % num_processes
    ]


def check_heads(run: Run) -> list[str]:
    """The tasks of further heads have labels, and what guides them is there."""
    if not run.recipe.heads:
        return []
    from understudy.recipes.head_check import check_tasks

    return check_tasks(run)


def check_sizes(run: Run) -> list[str]:
    """The stored top k and the batch size must fit the data."""
    problems = []
    num_classes = len(run.source.class_names)
    top_k = run.recipe.labelling.top_k
    if top_k is not None and top_k > num_classes:
        problems.append(
            problem(
                f"labelling.top_k is {top_k} and the data has {num_classes} classes",
                expected=f"at most {num_classes}",
                mend="Lower it, or drop it to keep all outputs.",
            )
        )
    problems += check_labelled_batches(run)
    guided, _ = step_trainings(run)
    smallest = len(run.splits.train)
    return problems + [
        problem(
            f"{name}.batch_size is {settings.batch_size} and the training split holds {smallest} "
            "samples",
            expected="at least one batch",
            mend=f"Lower {name}.batch_size or give more data.",
        )
        for name, settings in {"training": run.recipe.training, **guided}.items()
        if settings.batch_size > smallest
    ]


def check_labelled_batches(run: Run) -> list[str]:
    """What learns from labels alone needs a batch of labelled pictures."""
    recipe, num_labelled = run.recipe, len(run.labelled_train_N)
    sections = {
        f"{teacher_place(role)}.training": section.training
        for role, section in run.teachers.items()
    }
    sections["finetuning"] = recipe.finetuning
    _, unguided = step_trainings(run)
    sections |= unguided
    return [
        problem(
            f"{name}.batch_size is {settings.batch_size} and the training split holds "
            f"{num_labelled} labelled samples",
            expected="at least one batch",
            mend=f"Lower {name}.batch_size or give more labels.",
        )
        for name, settings in sections.items()
        if settings is not None and settings.batch_size > num_labelled
    ]


def step_trainings(run: Run) -> tuple[dict[str, TrainSettings], dict[str, TrainSettings]]:
    """Return the trainings of compression by their place: with the teacher, and on labels alone."""
    # A chain's last step has a teacher, whether or not the recipe names one.
    has_teacher = run.teaches_first or run.recipe.strategy.is_chain
    found: tuple[dict[str, TrainSettings], dict[str, TrainSettings]] = {}, {}
    for number, step in enumerate(run.recipe.compression.steps):
        if step.training is not None:
            on_labels = step.guidance == "labels" or not has_teacher
            found[on_labels][f"compression.steps.{number}.training"] = step.training
    return found


def check_float_layers(run: Run) -> list[str]:
    """The layers that compression is to leave in float are layers of the student."""
    from understudy.compress.quantize import check_layers
    from understudy.recipes.networks import build_model

    steps = run.recipe.compression.steps
    names = [name for step in steps for name in getattr(step, "float_layers", ())]
    return check_layers(build_model(run, "student"), names) if names else []


def check_networks(run: Run) -> list[str]:
    """Both networks can be built for this data, and the teacher's weights fit it."""
    from understudy.recipes.check_teaching import check_teaching
    from understudy.recipes.exit_training import check_early_exits
    from understudy.recipes.given_student import given_weights
    from understudy.recipes.networks import build_model
    from understudy.recipes.teach import load_teacher

    problems = problems_of(lambda: given_weights(run)) + check_float_layers(run)
    for role in run.peers:
        problems += problems_of(lambda role=role: build_model(run, role))  # type: ignore[misc]
    for role, teacher in run.teachers.items():
        if teacher.has_weights and not run.steps:  # else an earlier step of the chain trains it
            found = problems_of(lambda role=role: load_teacher(run, role))  # type: ignore[misc]
        else:
            found = problems_of(lambda role=role: build_model(run, role))  # type: ignore[misc]
        several = f"{teacher_place(role)}: " if len(run.teachers) > 1 else ""
        problems += [several + text for text in found]
    if problems or run.recipe.strategy.is_chain:  # whose steps are checked one by one
        return problems
    return check_teaching(run) or check_early_exits(run)

"""The main job, and each of its stages alone, as functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from understudy.artifacts import Record, exclusive
from understudy.errors import InputError, problem
from understudy.progress import log
from understudy.recipes.check import check_recipe, parse_checked
from understudy.recipes.evaluate import evaluate as evaluate_stage
from understudy.recipes.export import export as export_stage
from understudy.recipes.files import RECIPE_NAME, read_recipe, save_recipe
from understudy.recipes.label import label as label_stage
from understudy.recipes.prepare import split
from understudy.recipes.report import Outcome
from understudy.recipes.report import report as report_stage
from understudy.recipes.run import Run, home_folder
from understudy.recipes.schema import Recipe
from understudy.recipes.teach import teach as teach_stage
from understudy.recipes.train import train_role
from understudy.train.devices import use_threads

__all__ = ["distill", "evaluate", "export", "label", "report", "teach", "train"]

RecipeLike = Recipe | Mapping[str, Any] | str | Path | None
Result = TypeVar("Result")


def distill(
    recipe: RecipeLike = None, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Outcome:
    """Run the whole job: data, teacher, stored outputs, student, control, proof, report.

    Stages whose inputs and recipe have not changed are reused; a killed one continues.

    Args:
        recipe: a Recipe, its values, a YAML file, a run folder or a shipped name; None: digits.
        changes: ``path.to.key=value`` items, for a recipe that comes from a file.
        out: the run folder; by default ``runs/NAME``, or the run folder given as the recipe.

    Raises:
        InputError: something the user gave is wrong; every problem is listed.
        ParityError: the exported file does not compute what the model computes.
        TrainingError: the loss stays non-finite.
    """
    run = open_run(recipe, changes=changes, out=out)
    with working(run):
        start(run)
        split(run)
        teach_stage(run)
        label_stage(run)
        train_role(run, "student")
        if run.recipe.control:
            train_role(run, "control")
        evaluate_stage(run)
        export_stage(run)
        return report_stage(run)


def teach(
    recipe: RecipeLike = None, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Run the first stages alone: split the data, load or train the teacher and check it."""
    return alone(teach_stage, recipe, changes, out)


def label(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Compute and store the teacher's outputs for every view, from the teacher's record."""
    return alone(label_stage, recipe, changes, out)


def train(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Train student and control from the stored outputs; return the student's record."""

    def both(run: Run) -> Record:
        record = train_role(run, "student")
        if run.recipe.control:
            train_role(run, "control")
        return record

    return alone(both, recipe, changes, out)


def evaluate(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Evaluate teacher, student and control from their records."""
    return alone(evaluate_stage, recipe, changes, out)


def export(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Export the student from its record, check parity and measure the file."""
    return alone(export_stage, recipe, changes, out)


def report(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Outcome:
    """Write the report from the records of all stages."""
    run = open_run(recipe, changes=changes, out=out)
    with working(run):
        return report_stage(run)


def open_run(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Run:
    """Return the run that the arguments name, with a recipe that was checked whole."""
    if isinstance(recipe, Recipe):
        checked = recipe
    elif isinstance(recipe, Mapping):
        checked = parse_checked(dict(recipe))
    else:
        values, origin = read_recipe(recipe, changes)
        checked = parse_checked(values, origin=origin)
        if out is None and recipe is not None and Path(recipe).is_dir():
            out = recipe
    folder = Path(out) if out is not None else Path("runs") / checked.name
    run = Run(checked, folder, home_folder())
    check_recipe(run)
    return run


def existing_run(folder: str | Path) -> Path:
    """Return the folder of a run that was started, or raise InputError."""
    if not (Path(folder) / RECIPE_NAME).is_file():
        raise InputError(
            problem(
                f"{folder} is not a run folder",
                expected=f"a folder with a {RECIPE_NAME} in it",
                mend="Give the --out of the run, or start one with `understudy distill`.",
            )
        )
    return Path(folder)


@contextlib.contextmanager
def working(run: Run) -> Iterator[None]:
    """Hold the run folder while a stage works in it; when interrupted, say how to go on."""
    with exclusive(run.folder):
        try:
            yield
        except KeyboardInterrupt:
            log.warning("`understudy resume %s` continues where this stopped", run.folder)
            raise


def start(run: Run) -> None:
    """Prepare this process and write the recipe down, so that the folder can be resumed."""
    use_threads(run.recipe.device.num_threads)
    for leftover in run.folder.rglob(".*.part"):
        leftover.unlink()  # of a process that was killed while it wrote
    save_recipe(run.recipe, run.folder)


def alone(
    stage: Callable[[Run], Result],
    recipe: RecipeLike,
    changes: Sequence[str],
    out: str | Path | None,
) -> Result:
    """Run one stage from the records of the stages before it."""
    run = open_run(recipe, changes=changes, out=out)
    with working(run):
        start(run)
        split(run)
        return stage(run)

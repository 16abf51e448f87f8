"""A run is opened, held while a stage works in it, and its recipe written down."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from understudy.artifacts import clear_parts, exclusive
from understudy.errors import InputError, problem
from understudy.progress import log
from understudy.recipes.chain import chained, require_steps
from understudy.recipes.check import check_recipe, parse_checked
from understudy.recipes.files import RECIPE_NAME, is_run_folder, read_recipe, save_recipe
from understudy.recipes.prepare import split
from understudy.recipes.run import REPORT_NAME, Run, home_folder
from understudy.recipes.schema import Recipe
from understudy.train.devices import use_threads

RecipeLike = Recipe | Mapping[str, Any] | str | Path | None
Result = TypeVar("Result")


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
        if out is None and recipe is not None and is_run_folder(recipe):
            out = recipe
    folder = Path(out) if out is not None else Path("runs") / checked.name
    run = Run(checked, folder, home_folder())
    check_recipe(run)
    return chained(run)


def existing_run(folder: str | Path) -> Path:
    """Return the folder of a run that was started, or raise InputError."""
    if not is_run_folder(folder):
        raise InputError(
            problem(
                f"{folder} is not a run folder",
                expected=f"a folder with a {RECIPE_NAME} in it",
                mend="Give the --out of the run, or start one with `understudy distill`.",
            )
        )
    return Path(folder)


@contextlib.contextmanager
def working(run: Run, command: str = "resume") -> Iterator[None]:
    """Hold the run folder while a stage works in it; when interrupted, say how to go on."""
    with exclusive(run.folder):
        try:
            yield
        except KeyboardInterrupt:
            log.warning("`understudy %s %s` continues where this stopped", command, run.folder)
            raise


def start(run: Run) -> None:
    """Prepare this process and write the recipe down, so that the folder can be resumed."""
    use_threads(run.num_threads)
    # Each stage clears its own folder as it begins. Others below may be of another run, or the
    # user's where the run folder is the current one.
    clear_parts(run.folder)
    clear_parts(run.folder / REPORT_NAME)
    save_recipe(run.asked, run.folder)


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
        require_steps(run)
        split(run)
        return stage(run)

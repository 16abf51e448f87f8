"""A design search as a job: folder, teachers, candidates, page."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from understudy.artifacts import exclusive
from understudy.errors import InputError, problem
from understudy.evaluate.budget import Budget
from understudy.evaluate.devices import device_budget, load_device
from understudy.progress import log
from understudy.recipes.check import check_recipe, parse_checked
from understudy.recipes.design import (
    TRAININGS_NAME,
    Design,
    DesignPlan,
    TrainStudent,
    design,
    design_folder,
)
from understudy.recipes.files import RECIPE_NAME, apply_change, read_recipe
from understudy.recipes.run import Run, home_folder
from understudy.recipes.schema import Recipe, parse_recipe
from understudy.recipes.search_space import check_fixed_student, check_strategy, student_only
from understudy.report.design_views import design_document
from understudy.report.document import run_facts, write_document

PAGE_NAME = "design"


def open_design(
    recipe: Any, *, budget: Sequence[str], device: str | None, changes: Sequence[str], out: Any
) -> Run:
    """Return the run in the design folder, with the budget in its recipe, checked whole.

    Raises:
        InputError: something given is wrong, or there is no budget.
    """
    asked = [latency_change(item) for item in (*changes, *(f"budget.{item}" for item in budget))]
    if isinstance(recipe, Recipe | Mapping):
        given = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else recipe
        values, origin = copy.deepcopy(dict(given)), "recipe"
        for change in asked:
            apply_change(values, change)
    else:
        values, origin = read_recipe(recipe, asked)
    checked = parse_checked(values, origin=origin)
    if device is not None:
        own = checked.budget.model_dump(exclude_none=True, exclude={"strict"})
        if checked.budget.strict:
            own["strict"] = True
        limits = Budget.model_validate(device_budget(load_device(device)) | own)
        checked = checked.model_copy(update={"budget": limits})
    if not checked.budget.model_dump(exclude_none=True, exclude={"strict"}):
        raise InputError(
            problem(
                "the recipe has no budget",
                expected="limits that the student must keep",
                mend="For example --budget num_params=12000 --budget latency_ms=50.",
            )
        )
    if problems := check_strategy(checked) + check_fixed_student(checked):
        raise InputError(*problems)
    alone = parse_recipe(student_only(checked.model_dump(mode="json")))
    folder = design_folder(checked.name, out)
    if (folder / RECIPE_NAME).exists() and not (folder / TRAININGS_NAME).is_dir():
        raise InputError(
            problem(
                f"{folder} is the folder of a run",
                expected="a new folder, or that of an earlier design search",
                mend="Name another one with --out.",
            )
        )
    run = Run(alone, folder, home_folder(), derived_from=checked)
    check_recipe(run)
    return run


def latency_change(change: str) -> str:
    """Return ``budget.latency_ms=50`` as the limit of one picture and one thread that it means."""
    key, equals, value = change.partition("=")
    if key != "budget.latency_ms" or not equals:
        return change
    try:
        return f"{key}={json.dumps({'at_most': float(value)})}"
    except ValueError:
        return change


def run_design(
    run: Run, plan: DesignPlan, train_student: TrainStudent, teach: Callable[[Run], None]
) -> Design:
    """Search, and write the page."""
    with exclusive(run.folder):
        try:
            (run.folder / TRAININGS_NAME).mkdir(exist_ok=True)
            teach(run)
            found = design(run, plan, train_student)
        except KeyboardInterrupt:
            log.warning("the same command continues the search in %s", run.folder)
            raise
        facts = run_facts(run.recipe.seed, run.recipe.data.source)
        write_document(design_document(found, facts=facts), run.folder, PAGE_NAME)
        return found


def page_of(found: Design) -> Path:
    """Return where the page is."""
    return Path(found.folder) / f"{PAGE_NAME}.html"

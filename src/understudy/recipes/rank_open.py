"""Which recipe is ranked for, and the folder that holds the ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from understudy.errors import InputError, RecipeError, problem
from understudy.recipes.check import parse_checked
from understudy.recipes.files import RECIPE_NAME, read_recipe
from understudy.recipes.rank_probe import CANDIDATES_NAME
from understudy.recipes.schema import Recipe
from understudy.recipes.strategies import STRATEGIES


def ranking_recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path | None, changes: Sequence[str]
) -> Recipe:
    """Return the validated recipe; raises one RecipeError with every problem found."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_checked(with_a_teacher(dict(recipe)))
    values, origin = read_recipe(recipe, changes)
    return parse_checked(with_a_teacher(values), origin=origin)


def ranking_folder(recipe: object, name: str, out: str | Path | None) -> Path:
    """Return the ranking's folder, never that of a run: its recipe would be written over.

    Raises:
        InputError: ``out`` is the folder of a run.
    """
    if out is not None:
        folder = Path(out)
    elif isinstance(recipe, str | Path) and (Path(recipe) / CANDIDATES_NAME).is_dir():
        folder = Path(recipe)  # of an earlier ranking, which goes on
    else:
        folder = Path("runs") / f"{name}-teachers"
    if (folder / RECIPE_NAME).exists() and not (folder / CANDIDATES_NAME).is_dir():
        raise InputError(
            problem(
                f"{folder} is the folder of a run",
                expected="a new folder, or that of an earlier ranking",
                mend="Name another one with --out.",
            )
        )
    return folder


def no_choice(num_candidates: int) -> RecipeError:
    """Return the error of a recipe that leaves nothing to choose."""
    return RecipeError(
        problem(
            f"the recipe names {num_candidates or 'no'} candidate{'s' * (num_candidates != 1)}",
            expected="two teachers or more to choose from",
            mend="Name them under candidates, each as `teacher` is written; "
            "`understudy recipes show teachers` has three.",
        )
    )


def with_a_teacher(values: Any) -> Any:
    """Return a recipe's values, the first candidate as the teacher where none is named.

    A recipe that is written to choose a teacher has none yet.

    Raises:
        RecipeError: there is neither a teacher nor a candidate.
    """
    if not isinstance(values, dict) or values.get("teacher") is not None:
        return values
    candidates, strategy = values.get("candidates"), values.get("strategy") or {}
    name = strategy.get("name", "offline") if isinstance(strategy, dict) else "offline"
    needs = name in STRATEGIES and STRATEGIES[name].teacher_is == "needed"
    if needs and not candidates:
        raise no_choice(0)
    if not isinstance(candidates, dict) or not needs:
        return values
    return {**values, "teacher": next(iter(candidates.values()))}

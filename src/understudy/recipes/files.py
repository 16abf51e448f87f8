"""Recipe files: shipped ones, the user's, those inside run folders, and ``--set``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from understudy.artifacts import atomic_path, write_text
from understudy.errors import RecipeError, problem
from understudy.recipes.schema import Recipe, parse_recipe

RECIPE_NAME = "recipe.yaml"
DEFAULT_RECIPE = "digits"


def shipped_recipes() -> dict[str, str]:
    """Return name to YAML text of every recipe inside the package."""
    folder = resources.files("understudy.recipes")
    found = {
        entry.name.removesuffix(".yaml"): entry.read_text()
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def shipped_recipe(name: str) -> str:
    """Return the text of one shipped recipe; an unknown name is a RecipeError."""
    recipes = shipped_recipes()
    if name not in recipes:
        raise RecipeError(
            problem(
                f"there is no shipped recipe named {name}",
                expected=f"one of {', '.join(recipes)}",
                mend="See `understudy recipes list`.",
            )
        )
    return recipes[name]


def copy_recipe(name: str, target: Path) -> Path:
    """Write a shipped recipe to a file that is not there yet; return its path."""
    path = target / f"{name}.yaml" if target.is_dir() else target
    if path.exists():
        raise RecipeError(
            problem(f"{path} exists", expected="a new file", mend="Name another one.")
        )
    write_text(path, shipped_recipe(name))
    return path


def load_recipe(recipe: str | Path | None = None, changes: Sequence[str] = ()) -> Recipe:
    """Return a validated recipe.

    Args:
        recipe: a YAML file, a run folder, or the name of a shipped recipe; None: ``digits``.
        changes: ``path.to.key=value`` items, applied before validation; values are YAML.

    Raises:
        RecipeError: with every problem found.
    """
    values, origin = read_recipe(recipe, changes)
    return parse_recipe(values, origin=origin)


def is_run_folder(path: str | Path) -> bool:
    """Return whether a folder holds the recipe of a run."""
    return (Path(path) / RECIPE_NAME).is_file()


def read_recipe(recipe: str | Path | None = None, changes: Sequence[str] = ()) -> tuple[Any, str]:
    """Return the values of a recipe, not validated yet, and where they come from."""
    recipe = DEFAULT_RECIPE if recipe is None else recipe
    path = Path(recipe)
    # The data of a shipped recipe may lie in a folder of its name.
    if path.is_dir() and (is_run_folder(path) or str(recipe) not in shipped_recipes()):
        path = path / RECIPE_NAME
    if path.is_file():
        values, origin = _parse_yaml(_read(path), str(path)), str(path)
    elif path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(
            problem(
                f"there is no recipe at {path}",
                expected="a YAML file, a run folder or a shipped name",
                mend="`understudy recipes list` shows the shipped ones.",
            )
        )
    else:
        values, origin = _parse_yaml(shipped_recipe(str(recipe)), str(recipe)), str(recipe)
    if isinstance(values, dict):
        apply_changes(values, changes)
    return values, origin


def apply_changes(values: dict[str, Any], changes: Sequence[str]) -> None:
    """Apply ``path.to.key=value`` items, in place; raise one RecipeError for all bad ones."""
    problems: list[str] = []
    for change in changes:
        try:
            apply_change(values, change)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)


def apply_change(values: Any, change: str) -> None:
    """Apply one ``path.to.key=value`` to nested mappings and lists, in place."""
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            problem(f"--set {change}", expected="path.to.key=value", mend="For example seed=1.")
        )
    value = _parse_yaml(text, f"--set {path}")
    for depth, key in enumerate(keys):
        position: Any = key
        if isinstance(values, list):
            if not key.isdigit() or int(key) >= len(values):
                raise RecipeError(
                    problem(
                        f"--set {change}: `{'.'.join(keys[:depth])}` is a list of {len(values)}",
                        expected=f"a position from 0 to {len(values) - 1}",
                        mend="Give the position, or set the whole list.",
                    )
                )
            position = int(key)
        if depth == len(keys) - 1:
            values[position] = value
            return
        inner = values[position] if isinstance(values, list) else values.get(position)
        if not isinstance(inner, dict | list):
            inner = {}
            values[position] = inner
        values = inner


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the whole recipe, defaults included, into a run folder."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)
    with atomic_path(folder / RECIPE_NAME) as temporary:
        temporary.write_text(text)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            problem(f"{path} cannot be read ({error})", expected="a YAML file", mend="Check it.")
        ) from None


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # the second of a date that is none: 2024-13-01
        line = " ".join(str(error).split())
        mend = "Mend the line." if isinstance(error, yaml.YAMLError) else "Quote what is no date."
        raise RecipeError(
            problem(f"{origin} is not YAML ({line})", expected="valid YAML", mend=mend)
        ) from None

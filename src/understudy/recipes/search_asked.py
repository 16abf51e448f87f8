"""What a search was asked for, kept in its folder: the folder alone is enough to go on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from understudy.artifacts import content_hash, write_text
from understudy.errors import InputError, problem
from understudy.recipes.files import apply_changes, read_recipe
from understudy.recipes.schema import Recipe, parse_recipe
from understudy.recipes.search_space import default_space, student_only
from understudy.search.space import Space, parse_space
from understudy.search.study import HIDDEN, differences, without_password

ASKED_NAME = "asked.yaml"
DATABASE_NAME = "search.db"
DEFAULT_TRIALS = 20
SpaceLike = Mapping[str, Any] | Sequence[str] | str | Path | None


@dataclass(frozen=True)
class Asked:
    """What a search was asked for.

    Attributes:
        recipe: what every trial starts from.
        num_trials: of all sittings together; None: all of a grid.
        storage: URL of the database; None: a file in the folder, wherever that is moved.
    """

    recipe: Recipe
    space: Space
    objectives: tuple[str, ...] = ("accuracy",)
    sampler: str = "tpe"
    pruner: str = "median"
    num_trials: int | None = None
    storage: str | None = None

    @property
    def shown_storage(self) -> str | None:
        """The URL of the database without its password."""
        return None if self.storage is None else without_password(self.storage)

    def binding(self) -> dict[str, Any]:
        """Return what must be the same for a search to go on."""
        return {
            "name": self.recipe.name,
            "space": self.space.to_json(),
            "objectives": list(self.objectives),
            "sampler": self.sampler,
            "storage": self.shown_storage or f"the {DATABASE_NAME} in its folder",
            "recipe": identity(self.recipe),
        }

    def save(self, folder: Path) -> None:
        """Write it into the search folder, but no password."""
        values = {
            "recipe": self.recipe.model_dump(mode="json"),
            "space": self.space.to_yaml(),
            "objectives": list(self.objectives),
            "sampler": self.sampler,
            "pruner": self.pruner,
            "num_trials": self.num_trials,
            "storage": self.shown_storage,
        }
        title = (
            "# What this search was asked for; `understudy search` of the folder goes on with it\n"
        )
        text = yaml.safe_dump(values, sort_keys=False, width=100)
        write_text(folder / ASKED_NAME, title + text)


def read_asked(folder: Path) -> Asked | None:
    """Return what the search in a folder was asked for; None: no search was begun there.

    Raises:
        InputError: the file was damaged.
    """
    path = folder / ASKED_NAME
    if not path.is_file():
        return None
    try:
        values = dict(yaml.safe_load(path.read_text()))
        recipe = parse_recipe(values.pop("recipe"), origin=f"{path}: recipe")
        space, objectives = parse_space(values.pop("space")), tuple(values.pop("objectives"))
        return Asked(recipe, space, objectives, **values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise InputError(
            problem(
                f"{path} cannot be read ({line})",
                expected="the file as `understudy search` wrote it",
                mend="Delete it, and give the recipe and all options again with --out.",
            )
        ) from None


def asked_for(
    recipe: Any,
    earlier: Asked | None,
    *,
    changes: Sequence[str],
    space: SpaceLike,
    options: Mapping[str, Any],
) -> Asked:
    """Return what is asked for: what is given, else what the earlier search had, else defaults.

    Args:
        earlier: the search whose folder was given as the recipe.
        options: fields of ``Asked``; None: not given.
    """
    if earlier is None:
        checked = searched_recipe(recipe, changes)
        known = Asked(checked, default_space(checked))
    else:
        values = earlier.recipe.model_dump(mode="json")
        apply_changes(values, changes)
        known = replace(earlier, recipe=parse_recipe(values, origin="--set"))
    given = {name: value for name, value in options.items() if value is not None}
    if space is not None:
        given["space"] = space_of(space)
    asked = replace(known, **given)
    if asked.num_trials is None and asked.sampler != "grid":
        asked = replace(asked, num_trials=DEFAULT_TRIALS)
    return asked


def searched_recipe(recipe: Any, changes: Sequence[str]) -> Recipe:
    """Return the validated recipe that trials start from."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_recipe(student_only(dict(recipe)))
    values, origin = read_recipe(recipe, changes)
    return parse_recipe(values, origin=origin)


def check_same(earlier: Asked, asked: Asked, folder: Path) -> None:
    """Raise one InputError with everything in which two searches of a folder differ."""
    if found := differences(earlier.binding(), asked.binding()):
        raise InputError(
            problem(
                f"the search in {folder} is another search: {'; '.join(found)}",
                expected="the same name, recipe, space, objectives, sampler and storage, to go on",
                mend=f"Leave out what `understudy search {folder}` knows, or give a recipe and "
                "another --out.",
            )
        )


def storage_url(asked: Asked, folder: Path) -> str:
    """Return the URL of the database.

    Raises:
        InputError: its password is not kept in the folder, and was not given.
    """
    if asked.storage is None:
        return f"sqlite:///{(folder / DATABASE_NAME).resolve()}"
    if HIDDEN in asked.storage:
        raise InputError(
            problem(
                f"the search in {folder} has the storage {asked.storage}",
                expected="its URL with the password, which is not written down",
                mend="Give --storage again.",
            )
        )
    return asked.storage


def identity(recipe: Recipe) -> str:
    """Return a hash of what decides a trial besides its settings, wherever it lies and runs."""
    names = set(type(recipe).model_fields) - {"name", "device", "measurement"}
    return content_hash(recipe.section(*names))


def space_of(given: Mapping[str, Any] | Sequence[str] | str | Path) -> Space:
    """Return the space that a mapping, items, or the path of a YAML file means.

    Among items, one without ``=`` is such a path.
    """
    if isinstance(given, Mapping):
        return parse_space(given)
    items = [str(given)] if isinstance(given, str | Path) else list(given)
    merged: dict[str, Any] = {}
    texts = []
    for item in items:
        if "=" in item:
            texts.append(item)
            continue
        values = yaml_of(Path(item))
        merged |= values
    both = {**merged, **dict(text.split("=", 1) for text in texts)}
    return parse_space(both if merged else texts)


def yaml_of(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, ValueError) as error:  # no text, or a date that is none
        line = " ".join(str(error).split())
        raise InputError(
            problem(
                f"--space {path} ({line})",
                expected="PATH=VALUES, or a YAML file of paths and values",
                mend="For example distillation.temperature=1|2|4|8.",
            )
        ) from None
    if not isinstance(values, dict):
        raise InputError(
            problem(f"--space {path} holds no mapping", expected="path: values", mend="Correct it.")
        )
    return values

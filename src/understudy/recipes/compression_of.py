"""The compression of another recipe, for a run that is trained already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from understudy.errors import RecipeError, problem
from understudy.progress import log
from understudy.recipes.check import parse_checked
from understudy.recipes.files import apply_changes, read_recipe
from understudy.recipes.schema import Recipe

# What another recipe may say besides that its steps are judged by: the run's own counts.
JUDGED_BY = ("budget", "measurement", "release")


def with_compression_of(other: str | Path, folder: Path, changes: Sequence[str]) -> Recipe:
    """Return the recipe of a run with the section ``compression`` of another one.

    Nothing else is taken from the other, so that nothing is trained or measured again.

    Args:
        other: a YAML file, a run folder or a shipped name; it need have no other section.
        folder: the run's.
        changes: ``path.to.key=value`` items, applied after that.

    Raises:
        RecipeError: the other is no recipe or has no steps of compression, or they do not fit.
    """
    values, origin = read_recipe(folder)
    given, other_origin = read_recipe(other)
    section = given.get("compression") if isinstance(given, dict) else None
    if not isinstance(section, dict) or not section.get("steps"):
        raise RecipeError(
            problem(
                f"{other_origin} has no steps of compression",
                expected="a recipe with a section `compression` that has `steps`",
                mend="`understudy recipes show edge` shows one.",
            )
        )
    if not isinstance(values, dict):
        return parse_checked(values, origin=origin)  # which says what it holds instead
    values["compression"] = section
    apply_changes(values, changes)
    check_calibration(values, section, folder, other_origin)
    recipe = parse_checked(values, origin=f"{origin} with the compression of {other_origin}")
    unused = [name for name in JUDGED_BY if name in given and given[name] != values.get(name)]
    if unused:
        log.info(
            "of %s the compression alone is taken; its %s may be set with --set",
            other_origin,
            ", ".join(unused),
        )
    return recipe


def check_calibration(
    values: Mapping[str, Any], section: Mapping[str, Any], folder: Path, other_origin: str
) -> None:
    """Raise RecipeError where a run kept no pictures for int8: it would be trained for them."""
    steps = section["steps"] if isinstance(section["steps"], list) else []
    quantizes = any(isinstance(step, dict) and step.get("name") == "quantize" for step in steps)
    # What is no mapping is told with the recipe's other mistakes.
    data = values.get("data") or {}
    if quantizes and isinstance(data, dict) and not data.get("calibration_fraction"):
        raise RecipeError(
            problem(
                f"{other_origin} quantises, and {folder} was trained without a calibration split",
                expected="a run with data.calibration_fraction above 0",
                mend="Leave that step out, or train a run with data.calibration_fraction: 0.02, "
                "say: int8 is calibrated on pictures that nothing was trained on.",
            )
        )

"""From a point of a search space to a recipe: paths set, augmentation scaled; the default space."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from understudy.data.view_spec import TRANSFORM_PARAMETERS, Parameter, check_spec
from understudy.errors import InputError, RecipeError, problem
from understudy.models.catalog import check_model
from understudy.recipes.files import apply_change
from understudy.recipes.schema import Recipe, parse_recipe
from understudy.recipes.strategies import DeepToShallow
from understudy.search.plan import Attempt
from understudy.search.space import Choice, Range, Space, parse_space, yaml_text

# Not a key of the recipe: a factor on how far the transforms of the views go.
STRENGTH = "views.strength"
# What the classifier reads: a layer that every network has.
EMBEDDING = "embedding"


def default_space(recipe: Recipe) -> Space:
    """Return what is worth varying in this recipe where the user names nothing.

    Learning rate (Muon: that of matrices too) within a factor of five, the weight between teacher
    and labels where the student learns from both, the temperature, and the strength of the
    augmentation, as far as the recipe has them.
    """
    optimizer = recipe.training.optimizer
    names = ["learning_rate", *(["matrix_learning_rate"] if optimizer.name == "muon" else [])]
    rates = {name: getattr(optimizer, name) for name in names}
    given = {
        f"training.optimizer.{name}": f"log:{rate / 5:g}..{rate * 5:g}"
        for name, rate in rates.items()
    }
    distillation = recipe.distillation
    if recipe.strategy.stored or recipe.teacher is not None:
        both = distillation.kl_weight != 0 and distillation.ce_weight != 0
        if both and isinstance(distillation.kl_weight, float | int):
            given["distillation.kl_weight"] = "0..1"
            given["distillation.ce_weight"] = "1 - distillation.kl_weight"
        if isinstance(distillation.temperature, float | int):
            given["distillation.temperature"] = "log:1..10"
    if any(name != "flip" for transform in recipe.views.spec for name in transform):
        given[STRENGTH] = "0.5..1.5"
    return parse_space(given)


def with_settings(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values with settings of a space applied.

    Raises:
        RecipeError: a path leads through something that has no such part, or transforms that are to
            be scaled are wrong.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(values))
    if "seed" in settings:
        hold_data(changed)
    for path, value in settings.items():
        if path != STRENGTH:
            apply_change(changed, f"{path}={yaml_text(value)}")
    if STRENGTH in settings:  # of the transforms as the other paths have left them
        views = changed["views"]
        if problems := check_spec(views["transforms"], where="views.transforms"):
            raise RecipeError(*problems)
        views["transforms"] = scaled_transforms(views["transforms"], float(settings[STRENGTH]))
    return changed


def hold_data(values: dict[str, Any]) -> None:
    """Let splits and views stay those of the recipe's seed where another one is tried.

    The teacher has learned from the training pictures of that seed: with a split of its own, a
    trial would be validated on some of them. And views are labelled once for all seeds.
    """
    for section, name in (("data", "split_seed"), ("views", "seed")):
        if values[section][name] is None:
            values[section][name] = values["seed"]


def trial_recipe(values: Mapping[str, Any], attempt: Attempt) -> Recipe:
    """Return the recipe of one trial: the student alone, with the trial's settings."""
    changed = with_settings(values, attempt.settings)
    return parse_recipe(student_only(changed) | {"name": f"trial-{attempt.number:04d}"})


def student_only(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values without what a student's training does not need."""
    return dict(values) | {"control": False, "heads": {}}


def check_space(values: Mapping[str, Any], space: Space) -> None:
    """Raise one InputError with everything in a space that makes no recipe.

    Every end of a range and every choice is tried by itself beside the first value of the others.
    """
    first = {path: sample_values(parameter)[0] for path, parameter in space.parameters.items()}
    problems: list[str] = []
    if STRENGTH in space.parameters and not values["views"]["transforms"]:
        given, mend = f"`{STRENGTH}` without transforms", "Add transforms, or drop it."
        problems.append(problem(given, expected="views.transforms to scale", mend=mend))
    for path, parameter in space.parameters.items():
        for value in sample_values(parameter):
            if path == STRENGTH and not is_strength(value):
                problems.append(
                    problem(
                        f"`{STRENGTH}` is {value!r}",
                        expected="numbers from 0 up: so many times as far as the transforms go",
                        mend="For example 0.5..1.5.",
                    )
                )
                continue
            try:
                changed = with_settings(values, space.settings(first | {path: value}))
                recipe = parse_recipe(changed, origin="--space")
                model = recipe.student.model
                problems += check_model(model.name, model.arguments)
                problems += check_spec(recipe.views.spec, where=f"{path}={value}: views.transforms")
                problems += check_strategy(recipe) + check_trained(recipe)
            except RecipeError as error:
                problems += error.problems
    if problems:
        raise InputError(*dict.fromkeys(problems))


def is_strength(value: Any) -> bool:
    """Return whether a value can be the strength of the transforms."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


def check_strategy(recipe: Recipe) -> list[str]:
    """Return the problem of a strategy that trains several networks, one after the other."""
    if not recipe.strategy.is_chain:
        return []
    return [
        problem(
            f"a search with strategy {recipe.strategy.name}, whose students are a chain",
            expected="a strategy that trains one student: every trial is one training",
            mend="Search with offline or another strategy, and train the chain with what is found.",
        )
    ]


def check_trained(recipe: Recipe) -> list[str]:
    """Return the problem of a student that is taken as it is: no setting changes it."""
    if recipe.student.checkpoint is None:
        return []
    return [
        problem(
            "a search with student.checkpoint, which is not trained",
            expected="a student that every trial trains",
            mend="Drop student.checkpoint.",
        )
    ]


def check_fixed_student(recipe: Recipe) -> list[str]:
    """Return the problem of settings that only the recipe's own student can have."""
    named = [
        f"distillation.losses.{name}.layers"
        for name, loss in recipe.distillation.losses.items()
        if any(pair.student != EMBEDDING for pair in loss.layers)
    ]
    if recipe.exits is not None:
        named.append("exits")
    if isinstance(recipe.strategy, DeepToShallow):
        named.append("strategy.layers")
    if recipe.student.checkpoint is not None:
        named.append("student.checkpoint")
    if not named:
        return []
    return [
        problem(
            f"{', '.join(named)}: of the recipe's own student, in a search for another one",
            expected="settings that every network can have, such as losses on the embedding",
            mend="Drop them; name layers of the student that was found when that is trained.",
        )
    ]


def sample_values(parameter: Range | Choice) -> Sequence[Any]:
    """Return a parameter's values where they can be counted, else its ends."""
    if isinstance(parameter, Choice):
        return parameter.values
    ends = (parameter.low, parameter.high)
    return [int(end) for end in ends] if parameter.whole else ends


def scaled_transforms(
    transforms: Sequence[Mapping[str, Mapping[str, Any] | None]], strength: float
) -> list[dict[str, dict[str, Any]]]:
    """Return transforms that go ``strength`` times as far; 1 leaves them as they are, 0: nowhere.

    What spreads around a neutral value spreads so much wider, padding is so many times wider, the
    smallest crop so much smaller, and its sides differ so much more (in the logarithm). A transform
    without such a parameter is applied so many times as often, at most always; a flip has no
    strength.
    """
    return [
        {name: scaled_transform(name, dict(arguments or {}), strength)}
        for transform in transforms
        for name, arguments in transform.items()
    ]


def scaled_transform(name: str, given: dict[str, Any], strength: float) -> dict[str, Any]:
    """Return one transform's arguments, scaled."""
    table = TRANSFORM_PARAMETERS.get(name)
    if table is None or name == "flip":
        return given
    full = {key: parameter.default for key, parameter in table.items()} | given
    scaled: dict[str, Any] = {}
    for key, parameter in table.items():
        if parameter.spread_around is not None:
            scaled[key] = spread(full[key], parameter, strength)
        elif key == "padding":
            scaled[key] = round(full[key] * strength)
        elif key == "scale":  # of a crop's area, or of an affine map: 1 is neutral, 0 impossible
            scaled[key] = [max(0.05, 1 - (1 - end) * strength) for end in pair(full[key])]
        elif key == "ratio":
            scaled[key] = [end**strength for end in pair(full[key])]
    if not scaled and "probability" in table:
        scaled["probability"] = min(1.0, full["probability"] * strength)
    return given | scaled


def spread(value: Any, parameter: Parameter, strength: float) -> list[float]:
    """Return a range that lies ``strength`` times as far around its neutral value."""
    around = parameter.spread_around
    assert around is not None, "chosen by the caller"
    low, high = value if isinstance(value, list | tuple) else (around - value, around + value)
    low, high = around + (low - around) * strength, around + (high - around) * strength
    return [max(low, parameter.at_least), min(high, parameter.at_most)]


def pair(value: Any) -> tuple[float, float]:
    """Return both ends of a range, which may be one number."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)

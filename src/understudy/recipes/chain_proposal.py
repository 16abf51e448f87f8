"""Teacher assistants between a teacher and a student that is much smaller."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from understudy.errors import InputError, RecipeError, problem
from understudy.models.build import build_network
from understudy.models.catalog import CATALOG
from understudy.models.cost import model_cost
from understudy.progress import log
from understudy.recipes.networks import build_model
from understudy.recipes.run import Run
from understudy.recipes.sections import ModelSection

Arguments = dict[str, Any]

LARGEST_STEP = 10.0
SMALLEST_GAP = 2.0
GROWTH = 1.1
LARGEST_DEPTH = 110
MAX_SIZE = 200


def propose_assistants(run: Run, num_assistants: int | None = None) -> tuple[ModelSection, ...]:
    """Return assistants from large to small, of the student's family.

    Their parameter counts are spaced evenly on a logarithmic scale between teacher and student, as
    near to it as the family's size argument allows. Mirzadeh et al. 2020 ("Improved knowledge
    distillation via teacher assistant", "What is the best TA size?") found the best single
    assistant to be the one whose *accuracy* is half-way, which is smaller than the one of half the
    size; accuracy grows about with the logarithm of the size, hence the scale.

    Args:
        run: a run with a teacher.
        num_assistants: how many; None takes as few as keep every step within a factor of 10, at
            least one.

    Raises:
        RecipeError: there is no gap to speak of, or the family has no argument for its size.
    """
    student, num_student = run.recipe.student.model, num_params(run, run.recipe.student.model)
    teacher_cost = model_cost(build_model(run, "teacher"), run.source.image_shape)
    ratio = teacher_cost.num_params / num_student
    require_gap(student.name, teacher_cost.num_params, num_student)
    count = num_assistants or max(1, math.ceil(math.log(ratio, LARGEST_STEP)) - 1)
    log.info(
        "assistants: the teacher has %s parameters, the student %s (%.0f times fewer): %d between "
        "them, by equal factors of %.1f",
        *(f"{teacher_cost.num_params:,}", f"{num_student:,}", ratio, count),
        ratio ** (1 / (count + 1)),
    )
    found: dict[int, ModelSection] = {}
    sizes = {0: num_student}
    for number in range(1, count + 1):
        aim = teacher_cost.num_params * ratio ** (-number / (count + 1))
        size, assistant = nearest_size(run, aim, sizes)
        if num_student < size < teacher_cost.num_params and size not in found:
            found[size] = assistant
            chosen = f"{assistant.name} {grown_values(student, assistant)}"
            log.info("assistants: %s, %s parameters (aim %s)", chosen, f"{size:,}", f"{aim:,.0f}")
    if not found:
        raise RecipeError(
            problem(
                f"no size of {student.name} lies between student ({num_student:,} parameters) and "
                f"teacher ({teacher_cost.num_params:,})",
                expected="a family that can be grown in small steps",
                mend="Take strategy offline, or name the assistants in strategy.assistants.",
            )
        )
    if len(found) < count:
        log.warning("assistants: only %d of %d sizes differ", len(found), count)
    return tuple(found[size] for size in sorted(found, reverse=True))


def require_gap(name: str, num_teacher: int, num_student: int) -> None:
    """Raise RecipeError where no assistant fits between teacher and student."""
    if num_teacher < SMALLEST_GAP * num_student:
        raise RecipeError(
            problem(
                f"the teacher has {num_teacher:,} parameters and the student "
                f"{num_student:,}, which leaves no room for an assistant",
                expected=f"a teacher of at least {SMALLEST_GAP:g} times the student's size",
                mend="Take strategy offline, or name the assistants in strategy.assistants.",
            )
        )
    if name not in GROWN:
        raise RecipeError(
            problem(
                f"no assistant can be proposed for a student of kind {name}, which has no "
                "known argument for its size",
                expected=f"one of {', '.join(GROWN)}",
                mend="Name the assistants in strategy.assistants, from large to small.",
            )
        )


def nearest_size(run: Run, aim: float, sizes: dict[int, int]) -> tuple[int, ModelSection]:
    """Return parameters and network of the grown student nearest to the aim, in log scale.

    ``sizes`` holds the parameter counts that are known already, by steps of growth.
    """
    student = run.recipe.student.model

    def count(size: int) -> int:
        if size not in sizes:
            sizes[size] = num_params(run, grown(student, size))
        return sizes[size]

    low, high = 0, 1
    while count(high) < aim and high < MAX_SIZE:
        low, high = high, min(2 * high, MAX_SIZE)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < aim else (low, middle)
    best = min((low, high), key=lambda size: abs(math.log(count(size) / aim)))
    return count(best), grown(student, best)


def num_params(run: Run, section: ModelSection) -> int:
    """Return the parameters of a network for the run's data."""
    network = build_network(
        section.name,
        num_classes=len(run.source.class_names),
        image_shape=run.source.image_shape,
        arguments=section.arguments,
    )
    return sum(parameter.numel() for parameter in network.parameters())


def grown(student: ModelSection, size: int) -> ModelSection:
    """Return the student's network grown by ``size`` steps; step 0 is the student itself."""
    if size == 0:
        return student
    given = {name: item.default for name, item in CATALOG[student.name].items()}
    name, changed = GROWN[student.name](student.name, {**given, **student.arguments}, size)
    return student.model_copy(update={"name": name, "arguments": {**student.arguments, **changed}})


def grown_values(student: ModelSection, assistant: ModelSection) -> str:
    """Return the arguments in which an assistant differs from the student."""
    known = student.arguments
    changed = {n: v for n, v in assistant.arguments.items() if known.get(n) != v}
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def factor(size: int) -> float:
    """Return how much wider a network is after ``size`` steps."""
    return float(GROWTH**size)


def _separable(name: str, given: Arguments, size: int) -> tuple[str, Arguments]:
    return name, {"width": round(given["width"] * factor(size), 3)}


def _inverted(name: str, given: Arguments, size: int) -> tuple[str, Arguments]:
    def wider(channels: int) -> int:
        return max(8, round(channels * factor(size) / 8) * 8)

    changed: Arguments = {
        "stem": [wider(given["stem"][0]), given["stem"][1]],
        "blocks": [[wider(channels), *rest] for channels, *rest in given["blocks"]],
    }
    if given["head"]:
        changed["head"] = wider(given["head"])
    return name, changed


def _mlp(name: str, given: Arguments, size: int) -> tuple[str, Arguments]:
    if not given["hidden"]:
        raise InputError(
            problem(
                "an mlp without hidden layers has no width to grow",
                expected="at least one hidden layer",
                mend="Name the assistants in strategy.assistants, from large to small.",
            )
        )
    return name, {"hidden": [round(width * factor(size)) for width in given["hidden"]]}


def _paper(name: str, given: Arguments, size: int) -> tuple[str, Arguments]:
    return name, {"channels": round(given["channels"] * factor(size))}


def _resnet(name: str, given: Arguments, size: int) -> tuple[str, Arguments]:
    """Deeper up to 110 layers, the deepest of the family's paper, and then wider."""
    start = int(given["depth"]) if name == "resnet" else int(name.removeprefix("resnet"))
    depth = max(start, min(start + 6 * size, LARGEST_DEPTH))
    num_wider = size - (depth - start) // 6
    changed: Arguments = {"depth": depth}
    if num_wider:
        changed["widths"] = [round(width * factor(num_wider)) for width in given["widths"]]
    return "resnet", changed


# family -> (name, all arguments, number of steps) -> (name, changed arguments)
GROWN: dict[str, Callable[[str, Arguments, int], tuple[str, Arguments]]] = {
    "separable": _separable,
    "inverted": _inverted,
    "mlp": _mlp,
    "paper_student": _paper,
    "paper_teacher": _paper,
    **{name: _resnet for name in CATALOG if name.startswith("resnet")},
}

"""What a search is asked to do, and what it is told of a trial. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from understudy.errors import InputError, problem
from understudy.search.space import Space

Direction = Literal["maximize", "minimize"]
# What can be asked for: name to direction.
OBJECTIVES: dict[str, Direction] = {
    "accuracy": "maximize",
    "nll": "minimize",
    "ece": "minimize",
    "num_params": "minimize",
    "macs": "minimize",
    "latency_ms": "minimize",
    "train_seconds": "minimize",
}
# Of them, those that a clock tells: another process beside changes them.
CLOCKED = ("latency_ms", "train_seconds")
SAMPLERS = ("tpe", "grid", "random", "nsga2")
PRUNERS = ("median", "halving", "hyperband", "none")


@dataclass(frozen=True)
class SearchPlan:
    """A search, whole.

    Attributes:
        space: what varies.
        objectives: names of ``OBJECTIVES``; with several, the result is a Pareto front.
        sampler: one of ``SAMPLERS``; a grid tries every combination of choices once.
        pruner: one of ``PRUNERS``: which trainings are stopped early, by validation accuracy.
        num_trials: of all processes and sittings together; None: all of a grid.
        seed: draws are a function of it and of the trials so far.
        recipe: hash of what every trial starts from: another recipe is another search.
    """

    space: Space
    objectives: tuple[str, ...] = ("accuracy",)
    sampler: str = "tpe"
    pruner: str = "median"
    num_trials: int | None = None
    seed: int = 0
    recipe: str = ""

    def __post_init__(self) -> None:
        problems = [
            problem(f"objective '{name}'", expected=f"one of {', '.join(OBJECTIVES)}", mend="")
            for name in self.objectives
            if name not in OBJECTIVES
        ]
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            problems.append(
                problem("the objectives", expected="one or more, each once", mend="Correct them.")
            )
        for title, value, known in (
            ("sampler", self.sampler, SAMPLERS),
            ("pruner", self.pruner, PRUNERS),
        ):
            if value not in known:
                problems.append(
                    problem(f"{title} '{value}'", expected=f"one of {', '.join(known)}", mend="")
                )
        if self.num_trials is not None and self.num_trials < 1:
            problems.append(
                problem(f"{self.num_trials} trials", expected="at least 1", mend="Raise --trials.")
            )
        if self.num_trials is None and self.sampler != "grid":
            problems.append(
                problem(
                    f"sampler '{self.sampler}' without an end",
                    expected="a number of trials",
                    mend="Give --trials, or choose --sampler grid.",
                )
            )
        if problems:
            raise InputError(*(text.strip() for text in problems))
        if self.sampler == "grid":
            self.space.grid()  # raises where there is no end of it

    @property
    def prunes(self) -> bool:
        """Whether poor trials are stopped: only one objective, the accuracy, can say which."""
        return self.pruner != "none" and self.objectives == ("accuracy",)

    def to_json(self) -> dict[str, Any]:
        """Return what must be the same for a search to go on."""
        return {
            "space": self.space.to_json(),
            "objectives": list(self.objectives),
            "sampler": self.sampler,
            "seed": self.seed,
            "recipe": self.recipe,
        }


class Pruned(Exception):  # noqa: N818
    """Raised in a training that is not worth going on with."""


@dataclass(frozen=True)
class Attempt:
    """One trial, as the objective sees it.

    Attributes:
        number: from 0, in the order of drawing.
        settings: path of the recipe to value, ties included.
        folder: of this trial alone; what an earlier process left in it is there still.
        report: told (epoch, validation accuracy); raises ``Pruned``.
    """

    number: int
    settings: Mapping[str, Any]
    folder: Path
    report: Callable[[int, float], None]


# Trains with the attempt's settings and returns measures: at least the plan's objectives.
Objective = Callable[[Attempt], Mapping[str, Any]]

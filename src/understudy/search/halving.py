"""Successive halving (Jamieson and Talwalkar 2016) and the front of what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.errors import InputError, problem


@dataclass(frozen=True)
class Rung:
    """One round: so many candidates are trained for so many epochs each."""

    num_candidates: int
    num_epochs: int


@dataclass(frozen=True)
class Score:
    """What a candidate reached in the last round that it took part in."""

    candidate: int
    rung: int
    accuracy: float


def plan_rungs(num_candidates: int, *, epochs: Sequence[int], factor: int = 3) -> list[Rung]:
    """Return the rounds; from one to the next a ``factor``-th of the candidates stays.

    Raises:
        InputError: no candidates, or epochs that do not grow.
    """
    if num_candidates < 1 or not epochs or list(epochs) != sorted(set(epochs)) or epochs[0] < 1:
        raise InputError(
            problem(
                f"{num_candidates} candidates for {list(epochs)} epochs",
                expected="at least one candidate, and epochs that grow from round to round",
                mend="For example --candidates 18 --epochs 1 --epochs 3 --epochs 9.",
            )
        )
    if factor < 2:
        raise InputError(
            problem(f"factor {factor}", expected="at least 2", mend="2 keeps half of them.")
        )
    rungs = []
    for number, num_epochs in enumerate(epochs):
        rungs.append(Rung(max(1, num_candidates // factor**number), num_epochs))
    return rungs


def halve(
    candidates: Sequence[int], rungs: Sequence[Rung], train: Callable[[int, Rung], float | None]
) -> list[Score]:
    """Train candidates in rounds, the best going on; return the last score of each, best first.

    Args:
        candidates: their numbers; of equally good ones the earlier goes on.
        train: candidate and round to accuracy on the validation split; None: the training failed,
            and the candidate has no score.
    """
    alive, last = list(candidates), dict[int, Score]()
    for number, rung in enumerate(rungs):
        for candidate in alive[: rung.num_candidates]:
            accuracy = train(candidate, rung)
            if accuracy is None:
                last.pop(candidate, None)
            else:
                last[candidate] = Score(candidate, number, accuracy)
        alive = [candidate for candidate in alive[: rung.num_candidates] if candidate in last]
        alive.sort(key=lambda candidate: -last[candidate].accuracy)
    return sorted(last.values(), key=lambda score: (-score.rung, -score.accuracy))


def pareto(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the positions of the points that no other beats; larger is better in every value."""
    front = []
    for position, point in enumerate(points):
        beaten = any(
            other != point and all(a >= b for a, b in zip(other, point, strict=True))
            for other in points
        )
        if not beaten and point not in points[:position]:
            front.append(position)
    return front

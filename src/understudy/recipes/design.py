"""The search of a student's architecture under a budget.

Candidates are drawn, those that break the budget are left out, and the rest are trained in rounds
of successive halving, each round a whole short schedule with the teacher's stored outputs. Only the
validation split is looked at.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from understudy.artifacts import Record, content_hash, write_json, write_text
from understudy.errors import InputError, UnderstudyError, problem
from understudy.evaluate.budget import Budget
from understudy.progress import log, shown_progress
from understudy.recipes.chain_proposal import LARGEST_STEP
from understudy.recipes.design_costs import (
    Candidate,
    costs_text,
    counted,
    counts_fit,
    num_params_of,
    timed,
    times_fit,
    train_hours,
    untimed,
)
from understudy.recipes.job import start
from understudy.recipes.networks import build_model, is_onnx
from understudy.recipes.outputs import validation_accuracy
from understudy.recipes.prepare import split
from understudy.recipes.rank_probe import sharing
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.recipes.search import with_finished_teachers
from understudy.recipes.search_space import student_only
from understudy.recipes.teach import teach_one
from understudy.search.architectures import FAMILIES, WIDTHS, Architecture, drawn_architectures
from understudy.search.halving import Rung, Score, halve, pareto, plan_rungs

CANDIDATES_NAME, BEST_NAME, RESULTS_NAME = "candidates.json", "best.yaml", "design.json"
TRAININGS_NAME = "trainings"
# So many draws for each candidate wanted before the budget is called too tight.
DRAWS_A_CANDIDATE = 300
# So many are timed, at about a second each: a limit on time that nothing keeps is told in minutes.
TIMED_A_CANDIDATE = 6

TrainStudent = Callable[[Run], Record]


@dataclass(frozen=True)
class DesignPlan:
    """What a design search does.

    Attributes:
        families: names of ``FAMILIES``.
        num_candidates: that fit the budget and are trained in the first round.
        epochs: of each round.
        factor: a round keeps a ``factor``-th of the candidates.
        fill: candidates with fewer parameters than this share of ``budget.num_params`` are left
            out: what the budget gives for nothing, a good student uses.
    """

    families: tuple[str, ...] = ("inverted", "separable", "resnet")
    num_candidates: int = 18
    epochs: tuple[int, ...] = (1, 3, 9)
    factor: int = 3
    fill: float = 0.5

    def __post_init__(self) -> None:
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families:
            raise InputError(
                problem(
                    f"families {', '.join(unknown) or '(none)'}",
                    expected=f"some of {', '.join(FAMILIES)}",
                    mend="Correct --family.",
                )
            )
        if not 0 <= self.fill <= 1:
            raise InputError(problem(f"fill {self.fill}", expected="0 to 1", mend="Correct it."))
        plan_rungs(self.num_candidates, epochs=self.epochs, factor=self.factor)


@dataclass(frozen=True)
class Design:
    """What came of a design search.

    Attributes:
        scores: the last round of each trained candidate, the best first.
        front: positions in ``scores``, among those of the last round, that no other one beats in
            accuracy, parameters, latency and activation memory together.
        failed: candidate to why its training failed; it has no score.
        num_drawn: networks, whether or not they keep the budget.
        gap: what the distance between teacher and best student advises.
    """

    name: str
    plan: dict[str, Any]
    budget: dict[str, Any]
    candidates: tuple[Candidate, ...]
    scores: tuple[Score, ...]
    front: tuple[int, ...]
    hours: dict[int, float]
    num_drawn: int
    failed: dict[int, str]
    gap: str
    folder: str
    test_was_read: bool = False

    def candidate(self, number: int) -> Candidate:
        """Return the candidate of this number."""
        return next(item for item in self.candidates if item.number == number)


def design(run: Run, plan: DesignPlan, train_student: TrainStudent) -> Design:
    """Draw, filter, train in rounds; write design.json and best.yaml.

    Args:
        run: in the design folder, its teachers finished.

    Raises:
        InputError: nothing that was drawn fits the budget.
        UnderstudyError: the training of every candidate failed; that of the last one.
    """
    candidates = fitting_candidates(run, plan)
    rungs = plan_rungs(len(candidates), epochs=plan.epochs, factor=plan.factor)
    by_number = {item.number: item for item in candidates}
    values = student_only(with_finished_teachers(run))

    failed: dict[int, UnderstudyError] = {}

    def accuracy(number: int, rung: Rung) -> float | None:
        made = training_run(run, values, by_number[number], rung)
        take_teachers(made, run)
        try:
            record = train_student(made)
        except UnderstudyError as error:  # of this network: the others may do better
            log.warning("candidate %d is left out, its training failed: %s", number, error)
            failed[number] = error
            return None
        found: float = record.payload["rows"][-1]["validation_accuracy"]
        return found

    scores = halve([item.number for item in candidates], rungs, accuracy)
    if not scores:
        raise list(failed.values())[-1]
    best = by_number[scores[0].candidate]
    result = Design(
        name=run.recipe.name,
        plan=asdict(plan),
        budget=run.recipe.budget.model_dump(mode="json", exclude_none=True),
        candidates=tuple(candidates),
        scores=tuple(scores),
        front=front_of(scores, by_number),
        hours={item.number: train_hours(run, item) for item in candidates},
        num_drawn=json.loads((run.folder / CANDIDATES_NAME).read_text())["num_drawn"],
        failed={number: str(error) for number, error in failed.items()},
        gap=gap_note(run, best),
        folder=str(run.folder),
    )
    write_json(run.folder / RESULTS_NAME, asdict(result))
    write_text(run.folder / BEST_NAME, best_recipe(run, best))
    return result


def fitting_candidates(run: Run, plan: DesignPlan) -> list[Candidate]:
    """Return candidates within the budget.

    Times vary from one measurement to the next, so each one that fits is kept on disk: a search
    that goes on has the candidates that it began with.
    """
    path = run.folder / CANDIDATES_NAME
    sections = run.recipe.section("seed", "data", "budget", "training")
    sections["fingerprint"] = run.source.fingerprint
    sections["flip_average"] = run.recipe.student.flip_average  # which costs multiply-adds
    sections["device"] = [run.num_threads, run.recipe.device.accelerator]  # which times depend on
    key = content_hash([asdict(plan) | {"epochs": None}, sections])
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"key": None}
    goes_on = kept["key"] == key
    found = [Candidate(**values) for values in kept["candidates"]] if goes_on else []

    def keep(num_drawn: int, *, complete: bool) -> None:
        told = {"key": key, "complete": complete, "num_drawn": num_drawn}
        write_json(path, told | {"candidates": [item.to_json() for item in found]})

    if not goes_on or not kept["complete"]:
        num_drawn = 0
        for num_drawn, candidate in draw_candidates(run, plan, tuple(found)):
            if candidate is not None:
                found.append(candidate)
                keep(num_drawn, complete=False)
        if not found:
            raise nothing_fits(run, plan)
        keep(num_drawn, complete=True)
    if len(found) < plan.num_candidates:
        log.warning("only %d drawn networks fit the budget", len(found))
    return found


def draw_candidates(
    run: Run, plan: DesignPlan, found: Sequence[Candidate]
) -> Iterator[tuple[int, Candidate | None]]:
    """Draw networks until enough fit, with those found before; yield each number and candidate.

    A candidate's number is that of its draw, so drawing goes on after the last one. The last item
    has no candidate: its number is how many were drawn.
    """
    budget = run.recipe.budget
    warn_of_limits(run)
    least = plan.fill * (budget.num_params or 0)
    seen = {content_hash([item.name, item.arguments]) for item in found}
    number = start = found[-1].number if found else 0
    num_found, num_timed = len(found), 0
    drawn = itertools.islice(enumerate(architectures(run, plan), start=1), start, None)
    most_timed = TIMED_A_CANDIDATE * plan.num_candidates
    with shown_progress("candidates") as progress:
        for draw, (name, arguments) in drawn:
            if num_found == plan.num_candidates or num_timed == most_timed:
                break
            number = draw
            if (key := content_hash([name, arguments])) in seen:
                continue
            seen.add(key)
            num_params = num_params_of(run, name, arguments)
            if not least <= num_params <= (budget.num_params or num_params):
                continue
            candidate = counted(run, number, name, arguments)
            if not counts_fit(candidate, budget):
                continue
            num_timed += 1
            if (measured := timed_if_it_runs(run, candidate)) and times_fit(run, measured):
                num_found += 1
                progress(num_found, plan.num_candidates, f"{number} drawn")
                yield number, measured
    yield number, None


def warn_of_limits(run: Run) -> None:
    """Say which limits of the budget candidates are not held to."""
    budget = run.recipe.budget
    if budget.energy_mj is not None:
        log.warning("budget.energy_mj is not measured here; `understudy release` checks it")
    if budget.train_hours is not None and (reason := untimed(run)):
        log.warning(
            "budget.train_hours is not checked here, as the step that is measured has no %s; "
            "`understudy distill` checks it",
            reason,
        )


def timed_if_it_runs(run: Run, candidate: Candidate) -> Candidate | None:
    """Return the candidate with its times; None where its file cannot be made or measured."""
    run.folder.mkdir(parents=True, exist_ok=True)
    # What a killed process leaves has a name by which it is cleared.
    with tempfile.TemporaryDirectory(".part", ".candidate.", run.folder) as folder:
        try:
            return timed(run, candidate, Path(folder))
        except UnderstudyError as error:
            log.warning("candidate %d cannot be measured: %s", candidate.number, error)
            return None


def architectures(run: Run, plan: DesignPlan) -> Iterator[Architecture]:
    """Return the networks that a search draws, in their order."""
    drawn = drawn_architectures(
        plan.families,
        seed=run.recipe.seed,
        side=min(run.source.image_shape[1:]),
        largest=largest_width(run.recipe.budget),
    )
    return itertools.islice(drawn, DRAWS_A_CANDIDATE * plan.num_candidates)


def largest_width(budget: Budget) -> int:
    """Return the width above which one convolution between equal widths breaks the budget."""
    limit = budget.num_params or budget.flash_bytes
    return WIDTHS[-1] if limit is None else max(WIDTHS[0], math.isqrt(limit))


def nothing_fits(run: Run, plan: DesignPlan) -> InputError:
    """Return the error of a budget that no candidate keeps, with what the smallest one costs."""
    limits = run.recipe.budget.model_dump(mode="json", exclude_none=True)
    name, arguments = min(architectures(run, plan), key=lambda one: num_params_of(run, *one))
    smallest = timed(run, counted(run, 0, name, arguments), run.folder)
    return InputError(
        problem(
            f"none of the drawn networks keeps the budget {limits}: the smallest has "
            f"{costs_text(run, smallest)}",
            expected="a budget that a network of these families can keep",
            mend="Raise the limits, name other families with --family, or lower --fill.",
        )
    )


def training_run(run: Run, values: dict[str, Any], candidate: Candidate, rung: Rung) -> Run:
    """Return the run of one training: the recipe's schedule in the round's epochs."""
    training = values["training"]
    share = rung.num_epochs / training["num_epochs"]
    schedule = training["learning_rate_schedule"]
    changed = values | {
        "name": f"candidate-{candidate.number:04d}",
        "student": {
            "model": values["student"]["model"]
            | {"name": candidate.name, "arguments": candidate.arguments},
            "flip_average": run.recipe.student.flip_average,
        },
        "views": values["views"]
        | {"num_views": min(values["views"]["num_views"], rung.num_epochs)},
        "finetuning": None,
        "compression": {},
        "training": training
        | {
            "num_epochs": rung.num_epochs,
            "ema_decay": None,
            "keep": "last",
            "last_views": None,
            "learning_rate_schedule": schedule
            | {"warmup_epochs": min(schedule["warmup_epochs"] * share, rung.num_epochs / 4)},
        },
    }
    folder = run.folder / TRAININGS_NAME / f"{candidate.number:04d}-{rung.num_epochs}"
    return sharing(Run(parse_recipe(changed), folder, run.home), run, "source")


def take_teachers(made: Run, run: Run) -> None:
    """Take the finished teachers over, checked on the same validation split already.

    Another pass of a large teacher for each training costs more than some trainings do.
    """
    if not run.teaches_first or run.steps:
        return
    start(made)
    split(made)
    for role, section in made.teachers.items():
        if section.training is None:
            teach_one(made, role, known_accuracy=validation_accuracy(run, role))


def front_of(scores: Sequence[Score], candidates: dict[int, Candidate]) -> tuple[int, ...]:
    """Return the positions, among the scores of the last round, that no other one beats."""
    last = [score for score in scores if score.rung == scores[0].rung]
    points = []
    for score in last:
        item = candidates[score.candidate]
        points.append(
            (score.accuracy, -item.num_params, -item.latency_ms, -item.peak_activation_bytes)
        )
    return tuple(pareto(points))


def gap_note(run: Run, best: Candidate) -> str:
    """Return what the teacher's size against the student's advises."""
    if not run.teaches_first or is_onnx(run.teachers["teacher"].model):
        return "The teacher's size is not known, so nothing can be said of the gap."
    teacher = sum(p.numel() for p in build_model(run, "teacher").parameters())
    ratio = teacher / best.num_params
    told = f"The teacher has {teacher:,} parameters, {ratio:.0f} times the student's."
    if ratio <= LARGEST_STEP:
        return f"{told} No assistant is needed for a step of at most {LARGEST_STEP:g} times."
    return (
        f"{told} Steps above {LARGEST_STEP:g} times are where assistants helped (Mirzadeh et al. "
        "2020): try --set strategy.name=progressive, and keep it if validation agrees."
    )


def best_recipe(run: Run, best: Candidate) -> str:
    """Return the YAML of the recipe with the best candidate as its student."""
    values = run.asked.model_dump(mode="json")
    values["student"]["model"] |= {"name": best.name, "arguments": best.arguments}
    values["name"] = f"{run.recipe.name}-best"
    recipe = parse_recipe(values).model_dump(mode="json")
    title = f"# {run.recipe.name}: the student that a design search on validation data found\n"
    return title + yaml.safe_dump(recipe, sort_keys=False, width=100)


def design_folder(name: str, out: str | Path | None) -> Path:
    """Return the folder of a design search."""
    return Path(out) if out is not None else Path("runs") / f"{name}-design"

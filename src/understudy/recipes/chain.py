"""Chains of students, each taught by the one before: generations, and assistants of a teacher.

A chain is a composition of ordinary runs. Every step has a folder of its own below ``steps`` and a
recipe derived from the user's: strategy ``offline``, the student of the step before as its teacher.
The run itself is the last step, so everything after the training is as in any other run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from understudy.artifacts import RECORD_NAME, Record
from understudy.errors import InputError, RecipeError, problem
from understudy.evaluate.budget import Budget
from understudy.models.cost import model_cost
from understudy.progress import log
from understudy.recipes.chain_proposal import propose_assistants
from understudy.recipes.check import check_networks
from understudy.recipes.label import label
from understudy.recipes.networks import WEIGHTS_NAME, build_model, model_section
from understudy.recipes.prepare import split
from understudy.recipes.run import Run
from understudy.recipes.sections import ModelSection, StudentSection, TeacherSection
from understudy.recipes.strategies import BornAgain, Offline, Progressive
from understudy.recipes.teach import teach
from understudy.recipes.train import settings_of, train_role

STEPS_NAME = "steps"
LOADED = ("labelled_source", "labelled_splits", "source", "splits", "views")


def chained(run: Run) -> Run:
    """Return the run as the last step of its chain, with the steps before it in ``steps``.

    A run of any other strategy is returned as it is. The run that is returned has a derived recipe
    of strategy ``offline``; ``asked`` is the user's.

    Raises:
        RecipeError: with every problem of every step.
    """
    strategy, recipe = run.recipe.strategy, run.recipe
    if not isinstance(strategy, BornAgain | Progressive):
        return run
    models = taught_models(run)
    kind, first = "generation" if isinstance(strategy, BornAgain) else "assistant", 1
    teacher = recipe.teacher
    if teacher is None:  # then the first generation learns from labels, and teaches the second
        training = recipe.training.model_copy(update={"last_views": None})
        teacher, first = TeacherSection(model=models[0], training=training), 2
    common = {"strategy": Offline(), "control": False, "budget": Budget()}
    common |= {"finetuning": None, "exits": None, "heads": {}}
    steps: list[Run] = []
    for number, model in enumerate(models[:-1], start=first):
        student = StudentSection(model=model, flip_average=recipe.student.flip_average)
        changes = {**common, "teacher": teacher, "student": student}
        step = derived_run(run, changes, name=f"{number}-{kind}", steps=tuple(steps))
        steps.append(step)
        teacher = TeacherSection(model=model, checkpoint=step.folder / "student" / WEIGHTS_NAME)
    last = derived_run(run, {"strategy": Offline(), "teacher": teacher}, steps=tuple(steps))
    problems = [
        f"step {step.step}: {text}" if step.step else text
        for step in (*steps, last)
        for text in check_networks(step)
    ]
    if problems:
        raise RecipeError(*dict.fromkeys(problems))
    return last


def taught_models(run: Run) -> list[ModelSection]:
    """Return every network that is taught, in order; the last one is the student's."""
    strategy, student = run.recipe.strategy, run.recipe.student.model
    if isinstance(strategy, Progressive):
        assistants = strategy.assistants or propose_assistants(run, strategy.num_assistants)
        return [*assistants, student]
    assert isinstance(strategy, BornAgain)
    # With a teacher the first generation is taught as well.
    return [student] * (strategy.num_generations + (run.recipe.teacher is not None))


def derived_run(
    run: Run, changes: Mapping[str, Any], *, name: str = "", steps: tuple[Run, ...]
) -> Run:
    """Return a step of the run's chain, which shares its data; without a name the run itself."""
    step = Run(
        run.recipe.model_copy(update=dict(changes)),
        run.folder / STEPS_NAME / name if name else run.folder,
        run.home,
        step=name,
        steps=steps,
        derived_from=run.recipe,
    )
    # The same data, seed and splits in every step: what one tests on no other is trained on.
    shared = {n: value for n, value in vars(run).items() if n in LOADED}
    vars(step).update(shared)
    return step


def run_steps(run: Run) -> None:
    """Train every network of the chain before the last; finished steps are reused."""
    for step in run.steps:
        log.info("step %s: %s", step.step, step.recipe.student.model.name)
        learn(step)


def learn(run: Run) -> None:
    """Train one network of a chain, from the data on."""
    split(run)
    teach(run)
    if run.stores_outputs:
        label(run)
    train_role(run, "student")


def require_steps(run: Run) -> None:
    """Raise InputError unless all steps before this run are finished."""
    unfinished = [s.step for s in run.steps if not (s.folder / "student" / RECORD_NAME).exists()]
    if unfinished:
        raise InputError(
            problem(
                f"{run.folder} is a chain whose steps {', '.join(unfinished)} are not finished",
                expected="a teacher for the last step",
                mend=f"Run `understudy distill {run.folder}`, which runs all steps.",
            )
        )


def step_records(run: Run) -> list[dict[str, Record]]:
    """Return the records of every step by stage.

    Raises:
        InputError: a step is not finished, or was trained again after the one that it teaches.
    """
    if run.derived_from is None:
        return []
    require_steps(run)
    kinds = ("split", "teacher", *(("labels",) if run.stores_outputs else ()), "student")
    found = [{kind: step.parent(kind, "distill") for kind in kinds} for step in run.steps]
    taught = [*(records["teacher"] for records in found), run.parent("teacher", "teach")]
    stale = [
        problem(
            f"{run.folder}: what step {step.step} teaches was trained with an earlier state of it",
            expected="records that belong together",
            mend=f"Run `understudy distill {run.folder}`.",
        )
        for step, records, after in zip(run.steps, found, taught[1:], strict=True)
        if records["student"].files[WEIGHTS_NAME] != after.parents.get("weights")
    ]
    if stale:
        raise InputError(*stale)
    return found


def chain_stages(run: Run) -> list[dict[str, Any]]:
    """Return the stages of all steps as the report lists them."""
    return [
        {
            "name": f"{step.step}/{kind}",
            "seconds": record.timing.get("stage_seconds", 0.0),
            "reused": kind in step.reused,
        }
        for step, records in zip(run.steps, step_records(run), strict=True)
        for kind, record in records.items()
    ]


def earlier_seconds(run: Run) -> float:
    """Return the training time of the networks before the student that its chain asked for.

    These are the students of all steps, and a first generation that learnt from labels; a teacher
    that the recipe names is not among them.
    """
    seconds = sum(records["student"].timing["train_seconds"] for records in step_records(run))
    if run.derived_from is not None and run.derived_from.teacher is None:
        first = (*run.steps, run)[0].parent("teacher", "distill")
        seconds += first.timing["train_seconds"]
    return float(seconds)


def lineage(run: Run) -> list[dict[str, Any]]:
    """Return name, network, size and validation accuracy from the first teacher to the student.

    Empty for a run that is no chain.
    """
    if run.derived_from is None:
        return []
    first = "teacher" if run.derived_from.teacher else "generation 1, from labels"
    rows = [member_facts((*run.steps, run)[0], "teacher", first)]
    for step in run.steps:
        number, _, kind = step.step.partition("-")
        rows.append(member_facts(step, "student", f"{kind} {number}"))
    return [*rows, member_facts(run, "student", "student")]


def member_facts(run: Run, role: str, name: str) -> dict[str, Any]:
    """Return what the report says of one network of a chain."""
    record = run.parent(role, "distill")
    accuracy = record.payload.get("validation_accuracy")
    if accuracy is None:
        accuracies = [row.get("validation_accuracy", 0.0) for row in record.payload["rows"]]
        settings = settings_of(run, role)
        accuracy = max(accuracies) if settings.keep == "best" else accuracies[-1]
    return {
        "name": name,
        "model": model_section(run, role).name,
        "num_params": model_cost(build_model(run, role), run.source.image_shape).num_params,
        "validation_accuracy": accuracy,
    }

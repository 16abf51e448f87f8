"""The search of a recipe's values: trials are ordinary runs of the student alone.

The base run in the search folder loads or trains the teacher once; every trial takes its stages
over where they are the same, and all share the stored outputs. Only the validation split is looked
at: no trial evaluates, so the test split is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from understudy.artifacts import Record, content_hash, write_text
from understudy.evaluate.latency import measure_latency
from understudy.export.onnx_file import export_onnx
from understudy.models.cost import model_cost
from understudy.recipes.finetune import PHASE
from understudy.recipes.networks import code_section, trained_model
from understudy.recipes.peers import first_weights
from understudy.recipes.rank_probe import finished_teacher
from understudy.recipes.run import Run
from understudy.recipes.schema import Recipe, parse_recipe
from understudy.recipes.search_asked import Asked
from understudy.recipes.search_space import student_only, trial_recipe, with_settings
from understudy.recipes.teach import weights_hash
from understudy.recipes.train import role_section
from understudy.report.document import run_facts, write_document
from understudy.report.search_views import search_document
from understudy.search.plan import Attempt, SearchPlan
from understudy.search.results import SearchResults, read_results
from understudy.search.study import bind, check_bound, open_study, work

BASE_NAME = "base"
RESULTS_NAME, BEST_NAME, PAGE_NAME = "search.json", "best.yaml", "search"

TrainStudent = Callable[[Run], Record]


@dataclass(frozen=True)
class Search:
    """A search in its folder.

    Attributes:
        values: the recipe's values, which every trial starts from.
        storage: URL of the database.
        study_name: in the database, which may hold others.
        num_threads: of a trial where the recipe says nothing; None: as the recipe says.
        asked: what the folder remembers.
    """

    asked: Asked
    plan: SearchPlan
    values: dict[str, Any]
    folder: Path
    home: Path
    storage: str
    study_name: str
    num_threads: int | None = None


def begin(search: Search, teach: Callable[[Run], None]) -> None:
    """Open the study, and load or train the teachers that all trials learn from."""
    study, base = open_study(search.storage, search.study_name, search.plan), base_run(search)
    ingredients = known_ingredients(base)
    # Before a teacher is trained for hours and the one of the earlier trials is gone.
    check_bound(study, ingredients)
    search.asked.save(search.folder)
    teach(base)
    bind(study, ingredients | taught(base))


def known_ingredients(base: Run) -> dict[str, str]:
    """Return what trials can only be compared on, as far as it is known before any training."""
    found = {"data": base.source.fingerprint}
    for role, teacher in base.teachers.items() if base.teaches_first else ():
        if teacher.training is None:
            found[f"weights file of the {role}"] = weights_hash(base, role)
        else:  # the recipe is the same: what can differ is the device
            section = role_section(base, role)
            found[f"device of the training of the {role}"] = content_hash(section)
    for weights in first_weights(base).values():  # of one that is trained with the student
        found["weights file of the teacher"] = weights
    given = [role for role, teacher in base.teachers.items() if teacher.training is None]
    for role, code in code_section(base, ["student", *given]).get("code", {}).items():
        found[f"code of the network of the {role}"] = code
    return found


def taught(base: Run) -> dict[str, str]:
    """Return the rest of what trials can only be compared on: the teachers as they came out."""
    if not base.teaches_first:
        return {}
    return {role: base.parent(role, "teach").hash for role in base.teachers}


def do_trials(search: Search, train_student: TrainStudent) -> None:
    """Do trials in this process until none is left."""
    study = open_study(search.storage, search.study_name, search.plan)
    work(
        study, search.plan, search.folder, lambda attempt: measured(search, attempt, train_student)
    )


def finish(search: Search) -> SearchResults:
    """Write the results, the best recipe and the page; return the results."""
    study = open_study(search.storage, search.study_name, search.plan)
    results = read_results(
        study,
        search.plan,
        name=search.study_name,
        folder=str(search.folder),
        recipe=search.values,
    )
    if results.best:
        write_text(search.folder / BEST_NAME, best_recipe(search, results))
    facts = run_facts(search.plan.seed, search.values["data"]["source"])
    write_document(search_document(results, facts=facts), search.folder, PAGE_NAME)
    write_text(search.folder / RESULTS_NAME, results.to_json())
    return results


def best_recipe(search: Search, results: SearchResults) -> str:
    """Return the YAML of the recipe with the best trial's settings."""
    rows = {row.number: row for row in results.trials}
    best = rows[results.best[0]]
    recipe = parse_recipe(with_settings(search.values, best.settings))
    values = recipe.model_dump(mode="json") | {"name": f"{recipe.name}-best"}
    title = f"# {recipe.name}: the settings of trial {best.number} of a search on validation data\n"
    return title + yaml.safe_dump(values, sort_keys=False, width=100)


def base_run(search: Search) -> Run:
    """Return the run whose teachers all trials have."""
    recipe = parse_recipe(student_only(search.values))
    return Run(recipe, search.folder / BASE_NAME, search.home)


def measured(search: Search, attempt: Attempt, train_student: TrainStudent) -> dict[str, Any]:
    """Train one trial's student, continuing what was left, and return its measures."""
    run = trial_run(search, attempt)
    record = train_student(run)
    last = kept_row(run.recipe, record.payload["rows"])
    model = trained_model(run, "student", record)
    cost = model_cost(model, run.source.image_shape)
    measures = {
        "accuracy": last["validation_accuracy"],
        "nll": last["validation_nll"],
        "ece": last["validation_ece"],
        "num_params": cost.num_params,
        "macs": cost.macs,
        "train_seconds": record.timing.get("train_seconds"),
        "num_steps": record.payload["num_steps"],
    }
    if "latency_ms" in search.plan.objectives:
        measures |= latency(run, model)
    return measures


def kept_row(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of the epoch whose weights a student has: of its last phase, as kept there."""
    settings, judged = recipe.training, [row for row in rows if "validation_accuracy" in row]
    if recipe.finetuning is not None:
        settings = recipe.finetuning
        judged = [row for row in judged if row.get("phase") == PHASE]
    if settings.keep == "best":
        return max(judged, key=lambda row: row["validation_accuracy"])
    return judged[-1]


def trial_run(search: Search, attempt: Attempt) -> Run:
    """Return a trial's run: its teachers are those of the base run, unless they are what varies."""
    values = search.values
    if not any(path.split(".")[0] in ("teacher", "strategy", "data") for path in attempt.settings):
        values = with_finished_teachers(base_run(search))
    recipe = trial_recipe(values, attempt)
    run = Run(recipe, attempt.folder, search.home, shared_threads=search.num_threads)

    def watch(row: Mapping[str, Any]) -> None:
        if "validation_accuracy" in row:
            attempt.report(row["epoch"], row["validation_accuracy"])

    run.watch = watch
    return run


def with_finished_teachers(base: Run) -> dict[str, Any]:
    """Return the base run's recipe with its teachers as they are on disk, nothing to be trained."""
    values = base.recipe.model_dump(mode="json")
    if not base.teaches_first or base.steps:
        return values
    sections = [finished_teacher(base, role).model_dump(mode="json") for role in base.teachers]
    values["teacher"] = sections[0]
    if sections[1:]:
        values["strategy"]["teachers"] = sections[1:]
    return values


def latency(run: Run, model: Any) -> dict[str, Any]:
    """Return the exported student's latency, at the budget's setting or of one picture."""
    limit = run.recipe.budget.latency_ms
    batch, threads, percentile = 1, 1, 50
    if limit is not None:
        batch, threads, percentile = limit.batch, limit.threads, limit.percentile
    path = run.folder / "latency" / "student.onnx"
    export_onnx(model, path, image_shape=run.source.image_shape, class_names=run.source.class_names)
    images = run.source.images(run.splits.validation[:batch]).numpy()
    found = measure_latency(
        path,
        images,
        batch_sizes=[batch],
        num_threads=[threads],
        min_seconds=run.recipe.measurement.min_seconds,
    )
    row = found.measurements[0].to_json()
    return {"latency_ms": row[f"p{percentile}_ms"], "latency": row}

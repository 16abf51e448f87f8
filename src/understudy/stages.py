"""The main job, and each of its stages alone, as functions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from understudy.artifacts import Record, exclusive
from understudy.errors import InputError, problem
from understudy.progress import log
from understudy.recipes.chain import run_steps
from understudy.recipes.check import check_recipe, parse_checked
from understudy.recipes.compress import check_compression
from understudy.recipes.compress import compress as compress_stage
from understudy.recipes.compression_of import with_compression_of
from understudy.recipes.design import Design, DesignPlan
from understudy.recipes.design_job import open_design, run_design
from understudy.recipes.evaluate import evaluate as evaluate_stage
from understudy.recipes.exits import exits as exits_stage
from understudy.recipes.export import export as export_stage
from understudy.recipes.files import read_recipe, save_recipe
from understudy.recipes.finetune import train_network
from understudy.recipes.heads import HEADS_FOLDER, train_head, train_heads
from understudy.recipes.job import RecipeLike, alone, existing_run, open_run, start, working
from understudy.recipes.label import label as label_stage
from understudy.recipes.peers import collect_teacher, trains_teacher
from understudy.recipes.prepare import split
from understudy.recipes.rank import checked_candidates, rank
from understudy.recipes.rank_open import ranking_folder, ranking_recipe
from understudy.recipes.rank_probe import CANDIDATES_NAME
from understudy.recipes.release import Release, check_release
from understudy.recipes.release import release as release_stage
from understudy.recipes.report import Outcome
from understudy.recipes.report import report as report_stage
from understudy.recipes.run import Run, home_folder
from understudy.recipes.search import base_run
from understudy.recipes.search_asked import SpaceLike
from understudy.recipes.search_job import open_search, run_search
from understudy.recipes.teach import teach as teach_stage
from understudy.report.ranking import Ranking
from understudy.search.results import SearchResults

__all__ = [
    "add_head",
    "compress",
    "design",
    "distill",
    "evaluate",
    "exits",
    "export",
    "label",
    "rank_teachers",
    "release",
    "remove_head",
    "report",
    "search",
    "teach",
    "train",
]

DEFAULT_DESIGN = DesignPlan()


def distill(
    recipe: RecipeLike = None, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Outcome:
    """Run the whole job: data, teacher, stored outputs, student, control, proof, report.

    Stages whose inputs and recipe have not changed are reused; a killed one continues.

    Args:
        recipe: a Recipe, its values, a YAML file, a run folder or a shipped name; None: digits.
        changes: ``path.to.key=value`` items, for a recipe that comes from a file.
        out: the run folder; by default ``runs/NAME``, or the run folder given as the recipe.

    Raises:
        InputError: something the user gave is wrong; every problem is listed.
        ParityError: the exported file does not compute what the model computes.
        TrainingError: the loss stays non-finite.
    """
    run = open_run(recipe, changes=changes, out=out)
    with working(run):
        run_stages(run)
        return report_stage(run)


def run_stages(run: Run) -> None:
    """Run every stage of a job but its report."""
    train_student(run)
    if trains_teacher(run):
        collect_teacher(run)
    if run.recipe.control:
        train_network(run, "control")
    evaluate_stage(run)
    export_stage(run)
    if run.recipe.exits is not None:
        exits_stage(run)
    train_heads(run)


def train_student(run: Run) -> Record:
    """Run every stage up to the student's training."""
    start(run)
    run_steps(run)
    split(run)
    if run.teaches_first:
        teach_stage(run)
    if run.stores_outputs:
        label_stage(run)
    return train_network(run, "student")


def compress(
    recipe: RecipeLike,
    *,
    steps_of: str | Path | None = None,
    changes: Sequence[str] = (),
    out: str | Path | None = None,
) -> Outcome:
    """Make the student smaller by the steps of ``compression``; return the report with them.

    The job before is run as ``distill`` runs it, so what is finished is reused. A step that loses
    more than its gates is taken back, and the last good state is kept.

    Args:
        steps_of: another recipe (a YAML file, a run folder or a shipped name) whose section
            ``compression`` takes the place of the run's, which ``recipe`` must then be the folder
            of. It is written into the run's recipe; nothing else is taken.

    Raises:
        InputError: something the user gave is wrong, or a limit cannot be reached.
        MissingExtraError: a package is not installed.
    """
    if steps_of is not None:
        # Of no run at all, and of a recipe that is not one's folder, it says the same.
        folder = existing_run(recipe if isinstance(recipe, str | Path) else "(no RUN)")
        recipe, out = with_compression_of(steps_of, folder, changes), out or folder
    run = open_run(recipe, changes=changes, out=out)
    with working(run, "compress"):
        check_compression(run)
        run_stages(run)
        compress_stage(run)
        return report_stage(run)


def release(
    recipe: RecipeLike,
    *,
    changes: Sequence[str] = (),
    out: str | Path | None = None,
    package: str | Path | None = None,
    skip_failed: bool = False,
) -> Release:
    """Compress, export to every target, prove, measure, check the budget, and pack what ships.

    A target of which nothing could be made (an operator that it lacks, files that do not compute
    what the network computes) is in the report and in ``Release.failed``; the others are finished.

    Args:
        out: the run folder, as for ``distill``.
        package: a folder, or a file ending in ``.zip``; by default ``release`` in the run folder.
        skip_failed: pack what was made where targets failed; otherwise nothing is packed.

    Raises:
        InputError: something the user gave is wrong, or a package is not installed: all at once.
    """
    run = open_run(recipe, changes=changes, out=out)
    path = run.folder / "release" if package is None else Path(package)
    with working(run, "release"):
        # Before hours of training.
        check_release(run, path)
        run_stages(run)
        return release_stage(run, path, skip_failed=skip_failed)


def teach(
    recipe: RecipeLike = None, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Run the first stages alone: split the data, load or train the teacher and check it."""
    return alone(teach_stage, recipe, changes, out)


def label(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Compute and store the teacher's outputs for every view, from the teacher's record."""
    return alone(label_stage, recipe, changes, out)


def train(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Train student and control from the stored outputs; return the student's record."""

    def both(run: Run) -> Record:
        record = train_network(run, "student")
        if trains_teacher(run):
            collect_teacher(run)
        if run.recipe.control:
            train_network(run, "control")
        return record

    return alone(both, recipe, changes, out)


def evaluate(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Evaluate teacher, student and control from their records."""
    return alone(evaluate_stage, recipe, changes, out)


def export(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Export the student from its record, check parity and measure the file."""
    return alone(export_stage, recipe, changes, out)


def exits(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Record:
    """Choose where pictures leave the student, perhaps for another target, and export that."""
    return alone(exits_stage, recipe, changes, out)


def report(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Outcome:
    """Write the report from the records of all stages."""
    run = open_run(recipe, changes=changes, out=out)
    with working(run):
        return report_stage(run)


def add_head(
    run_folder: str | Path, *, task: str, label_column: str, changes: Sequence[str] = ()
) -> Record:
    """Train a head for one more task on the student of a finished run, and export it.

    The student's weights and the trunk's file stay as they are. The task is written into the
    run's recipe; a head of this name is trained anew where its settings differ.

    Args:
        task: its name.
        label_column: the column of the data that holds its labels.
        changes: ``path.to.key=value`` items of the head's section, such as ``teacher=true``.

    Raises:
        InputError: something given is wrong, or the run has no student yet.
        ParityError: trunk and head as files differ from what was trained.
    """
    folder = existing_run(run_folder)
    asked = [f"label_column={json.dumps(label_column)}", *changes]
    in_recipe = [f"heads.{task}.{change}" for change in asked]
    return alone(lambda run: train_head(run, task), folder, in_recipe, None)


def remove_head(run_folder: str | Path, *, task: str) -> None:
    """Remove the head of a task from a run's recipe and from its folder.

    Raises:
        InputError: the run has no such task.
    """
    folder = existing_run(run_folder)
    values, origin = read_recipe(folder)
    recipe = parse_checked(values, origin=origin)
    kept = {name: settings for name, settings in recipe.heads.items() if name != task}
    if len(kept) == len(recipe.heads):
        raise InputError(
            problem(
                f"{folder} has no head for the task '{task}'",
                expected=f"one of {', '.join(kept) or '(it has none)'}",
                mend="`understudy heads list` shows what there is.",
            )
        )
    with exclusive(folder):
        save_recipe(recipe.model_copy(update={"heads": kept}), folder)
        shutil.rmtree(folder / HEADS_FOLDER / task, ignore_errors=True)


def rank_teachers(
    recipe: RecipeLike, *, changes: Sequence[str] = (), out: str | Path | None = None
) -> Ranking:
    """Profile the recipe's candidate teachers, probe each with short trainings, and rank them.

    What is finished is reused; a killed ranking continues. The ranking is also written to
    ``ranking.json``, ``ranking.md`` and ``ranking.html`` in the folder.

    Args:
        recipe: as in ``distill``, with ``candidates``, or with the teachers of an ensemble.
        changes: ``path.to.key=value`` items, for a recipe that comes from a file.
        out: the ranking's folder; by default ``runs/NAME-teachers``.

    Raises:
        InputError: something the user gave is wrong; every problem is listed.
    """
    checked = ranking_recipe(recipe, changes)
    run = Run(checked, ranking_folder(recipe, checked.name, out), home_folder())
    candidates = checked_candidates(run)
    with exclusive(run.folder):
        try:
            (run.folder / CANDIDATES_NAME).mkdir(exist_ok=True)
            start(run)
            return rank(run, candidates)
        except KeyboardInterrupt:
            log.warning("`understudy teachers rank %s` continues where this stopped", run.folder)
            raise


def search(
    recipe: RecipeLike = None,
    *,
    space: SpaceLike = None,
    sampler: str | None = None,
    pruner: str | None = None,
    objectives: Sequence[str] | None = None,
    trials: int | None = None,
    workers: int = 1,
    storage: str | None = None,
    changes: Sequence[str] = (),
    out: str | Path | None = None,
) -> SearchResults:
    """Try settings of a recipe, each in a training of the student; rank them by validation.

    The same call, or one with the search folder as the recipe, continues a search that was stopped:
    what is not given is as it was. The test split is never read.

    Args:
        recipe: as in ``distill``, or the folder of an earlier search.
        space: path to values, items ``path=values``, or a YAML file; by default what the recipe has
            of learning rate, weights, temperature and augmentation strength.
        sampler: tpe, grid, random or nsga2; by default tpe.
        pruner: median, halving, hyperband or none: how poor trainings are stopped early; by default
            median.
        objectives: of accuracy, nll, ece, num_params, macs, latency_ms, train_seconds; by default
            accuracy.
        trials: of all sittings together; by default 20, or the whole grid.
        workers: processes.
        storage: URL of a database; by default a file in the search folder.
        out: the search folder; by default ``runs/NAME-search``.

    Raises:
        InputError: something given is wrong, or not as it was when the search in the folder was
            begun; every problem is listed.
        MissingExtraError: Optuna is not installed.
    """
    options = {
        "sampler": sampler,
        "pruner": pruner,
        "objectives": None if objectives is None else tuple(objectives),
        "num_trials": trials,
        "storage": storage,
    }
    asked = open_search(
        recipe, changes=changes, space=space, options=options, out=out, workers=workers
    )
    check_recipe(base_run(asked))
    return run_search(asked, train_student, prepare_teachers, workers)


def design(
    recipe: RecipeLike = None,
    *,
    budget: Sequence[str] = (),
    device: str | None = None,
    plan: DesignPlan = DEFAULT_DESIGN,
    changes: Sequence[str] = (),
    out: str | Path | None = None,
) -> Design:
    """Look for a student: draw networks that keep the budget, train them in rounds.

    The same call continues a search that was stopped. The test split is never read.

    Args:
        budget: ``limit=value`` items, as in the recipe's ``budget``.
        device: a profile whose limits count where the recipe has none.
        plan: families, number of candidates, epochs of the rounds.
        out: the folder; by default ``runs/NAME-design``.

    Raises:
        InputError: something given is wrong, or nothing fits the budget.
    """
    run = open_design(recipe, budget=budget, device=device, changes=changes, out=out)
    return run_design(run, plan, train_student, prepare_teachers)


def prepare_teachers(run: Run) -> None:
    """Split the data and load or train the teachers, once for all trials of a search."""
    start(run)
    run_steps(run)
    split(run)
    if run.teaches_first:
        teach_stage(run)

"""A search as a job: what was asked is checked, processes are started, results are written."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from understudy.artifacts import exclusive
from understudy.errors import InputError, problem
from understudy.progress import log, setup_logging
from understudy.recipes.files import RECIPE_NAME
from understudy.recipes.run import home_folder
from understudy.recipes.search import (
    BASE_NAME,
    Search,
    TrainStudent,
    begin,
    do_trials,
    finish,
)
from understudy.recipes.search_asked import (
    ASKED_NAME,
    Asked,
    SpaceLike,
    asked_for,
    check_same,
    identity,
    read_asked,
    storage_url,
)
from understudy.recipes.search_space import check_space
from understudy.runtime import num_usable_cores
from understudy.search.plan import CLOCKED, SearchPlan
from understudy.search.results import SearchResults


def open_search(
    recipe: Any,
    *,
    changes: Sequence[str],
    space: SpaceLike,
    options: Mapping[str, Any],
    out: str | Path | None,
    workers: int,
) -> Search:
    """Return a search whose parts were checked.

    Args:
        recipe: what trials start from, or the folder of a search to go on with.
        options: what else the search is asked for, by the names of ``Asked``; None: not given.

    Raises:
        InputError: with every problem of the space, or of the plan; or with everything that was
            different when the search in the folder was begun.
    """
    earlier = earlier_search(recipe, out)
    asked = asked_for(recipe, earlier, changes=changes, space=space, options=options)
    if earlier is not None:
        folder = Path(recipe)
    else:
        folder = Path(out) if out is not None else Path("runs") / f"{asked.recipe.name}-search"
        earlier = read_asked(folder)
    if earlier is not None:
        check_same(earlier, asked, folder)
    elif (folder / RECIPE_NAME).exists():
        raise InputError(
            problem(
                f"{folder} is the folder of a run",
                expected="a new folder, or that of an earlier search",
                mend="Name another one with --out.",
            )
        )
    values = asked.recipe.model_dump(mode="json")
    check_space(values, asked.space)
    check_workers(workers, asked.objectives)
    threads = max(1, num_usable_cores() // workers) if workers > 1 else None
    url = storage_url(asked, folder)
    plan = plan_of(asked)
    return Search(asked, plan, values, folder, home_folder(), url, asked.recipe.name, threads)


def check_workers(workers: int, objectives: Sequence[str]) -> None:
    """Raise InputError where there can be no such processes, or their times do not compare."""
    if workers < 1:
        raise InputError(
            problem(f"{workers} workers", expected="at least 1", mend="Correct --workers.")
        )
    clocked = [name for name in objectives if name in CLOCKED]
    if workers > 1 and clocked:
        raise InputError(
            problem(
                f"{workers} workers and the objective {' and '.join(clocked)}: a time that depends "
                "on what the others do meanwhile",
                expected="one process where times are compared",
                mend="Leave out --workers, or ask for macs or num_params instead.",
            )
        )


def earlier_search(recipe: Any, out: str | Path | None) -> Asked | None:
    """Return what the search was asked for whose folder was given as the recipe, if it was.

    Raises:
        InputError: the folder does not say it, or ``out`` is another folder.
    """
    if not isinstance(recipe, str | Path) or not Path(recipe).is_dir():
        return None
    folder = Path(recipe)
    earlier = read_asked(folder)
    if earlier is None and (folder / BASE_NAME / RECIPE_NAME).exists():
        raise InputError(
            problem(
                f"{folder} does not say what its search was asked for",
                expected=f"a folder with {ASKED_NAME} in it",
                mend="Give the recipe and its options as they were, with --out.",
            )
        )
    if earlier is not None and out is not None and Path(out).resolve() != folder.resolve():
        raise InputError(
            problem(
                f"--out {out} beside {folder}, an earlier search",
                expected="a search to go on with, which stays in its folder; or a new one",
                mend="Leave out --out, or give a recipe.",
            )
        )
    return earlier


def plan_of(asked: Asked) -> SearchPlan:
    """Return the plan of a search.

    Raises:
        InputError: every problem of it.
    """
    plan = SearchPlan(
        space=asked.space,
        objectives=asked.objectives,
        sampler=asked.sampler,
        pruner=asked.pruner,
        num_trials=asked.num_trials,
        seed=asked.recipe.seed,
        recipe=identity(asked.recipe),
    )
    if plan.prunes and asked.recipe.device.num_processes > 1:
        log.info("trainings of several processes are not stopped early")
        plan = replace(plan, pruner="none")
    return plan


def run_search(
    search: Search, train_student: TrainStudent, teach: Any, workers: int
) -> SearchResults:
    """Do the trials in so many processes, and write what came of them."""
    with exclusive(search.folder):
        try:
            begin(search, teach)
            if workers > 1:
                run_workers(search, workers)
            # Also what a worker left that died.
            do_trials(search, train_student)
        except KeyboardInterrupt:
            log.warning("`understudy search %s` continues where this stopped", search.folder)
            raise
        return finish(search)


def run_workers(search: Search, workers: int) -> None:
    """Start processes that do trials until none is left; an interruption ends them all."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=be_worker, args=(search,)) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                log.warning(
                    "a worker ended with code %d; others take its trial up", process.exitcode
                )
    except KeyboardInterrupt:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()
        raise


def be_worker(search: Search) -> None:
    """Do trials in a process of its own."""
    from understudy.stages import train_student

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    setup_logging()
    try:
        do_trials(search, train_student)
    except KeyboardInterrupt:
        os._exit(130)

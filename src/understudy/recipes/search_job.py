"""A search as a job: what was asked is checked, processes are started, results are written."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from understudy.artifacts import content_hash, exclusive
from understudy.errors import InputError, problem
from understudy.progress import log, setup_logging
from understudy.recipes.files import RECIPE_NAME, read_recipe
from understudy.recipes.run import home_folder
from understudy.recipes.schema import Recipe, parse_recipe
from understudy.recipes.search import (
    BASE_NAME,
    DATABASE_NAME,
    Search,
    TrainStudent,
    begin,
    do_trials,
    finish,
)
from understudy.recipes.search_space import check_space, default_space, student_only
from understudy.runtime import num_usable_cores
from understudy.search.plan import SearchPlan
from understudy.search.results import SearchResults
from understudy.search.space import Space, parse_space

SpaceLike = Mapping[str, Any] | Sequence[str] | str | Path | None


def open_search(
    recipe: Recipe,
    *,
    space: SpaceLike,
    options: Mapping[str, Any],
    out: str | Path | None,
    storage: str | None,
    workers: int,
) -> Search:
    """Return a search whose parts were checked.

    Raises:
        InputError: with every problem of the space, or of the plan.
    """
    values = recipe.model_dump(mode="json")
    found = default_space(recipe) if space is None else space_of(space)
    check_space(values, found)
    plan = SearchPlan(space=found, seed=recipe.seed, recipe=identity(recipe), **options)
    if workers < 1:
        raise InputError(
            problem(f"{workers} workers", expected="at least 1", mend="Correct --workers.")
        )
    if plan.prunes and recipe.device.num_processes > 1:
        log.info("trainings of several processes are not stopped early")
        plan = replace(plan, pruner="none")
    folder = Path(out) if out is not None else Path("runs") / f"{recipe.name}-search"
    if (folder / RECIPE_NAME).exists():
        raise InputError(
            problem(
                f"{folder} is the folder of a run",
                expected="a new folder, or that of an earlier search",
                mend="Name another one with --out.",
            )
        )
    url = storage or f"sqlite:///{(folder / DATABASE_NAME).resolve()}"
    threads = max(1, num_usable_cores() // workers) if workers > 1 else None
    return Search(plan, values, folder, home_folder(), url, recipe.name, threads)


def identity(recipe: Recipe) -> str:
    """Return a hash of what decides a trial besides its settings, wherever it lies and runs."""
    names = set(type(recipe).model_fields) - {"name", "device", "measurement"}
    values = recipe.section(*names)
    values["data"] = {key: value for key, value in values["data"].items() if key != "source"}
    return content_hash(values)


def space_of(given: Mapping[str, Any] | Sequence[str] | str | Path) -> Space:
    """Return the space that a mapping, items, or the path of a YAML file means.

    Among items, one without ``=`` is such a path.
    """
    if isinstance(given, Mapping):
        return parse_space(given)
    items = [str(given)] if isinstance(given, str | Path) else list(given)
    merged: dict[str, Any] = {}
    texts = []
    for item in items:
        if "=" in item:
            texts.append(item)
            continue
        values = yaml_of(Path(item))
        merged |= values
    both = {**merged, **dict(text.split("=", 1) for text in texts)}
    return parse_space(both if merged else texts)


def yaml_of(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise InputError(
            problem(
                f"--space {path} ({line})",
                expected="PATH=VALUES, or a YAML file of paths and values",
                mend="For example distillation.temperature=1|2|4|8.",
            )
        ) from None
    if not isinstance(values, dict):
        raise InputError(
            problem(f"--space {path} holds no mapping", expected="path: values", mend="Correct it.")
        )
    return values


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
            log.warning("the same command continues the search in %s", search.folder)
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


def searched_recipe(recipe: Any, changes: Sequence[str]) -> Recipe:
    """Return the validated recipe that trials start from; of a search folder, its own."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_recipe(student_only(dict(recipe)))
    if recipe is not None and (Path(recipe) / BASE_NAME / RECIPE_NAME).is_file():
        recipe = Path(recipe) / BASE_NAME
    values, origin = read_recipe(recipe, changes)
    return parse_recipe(values, origin=origin)

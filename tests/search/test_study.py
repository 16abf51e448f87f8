"""Trials: their order, what a killed process leaves, pruning, fronts and importances."""

import contextlib
import itertools
import multiprocessing
import os
import socket
import time
from dataclasses import replace

import numpy as np
import optuna
import pytest

import understudy.search.study
from understudy.errors import InputError, TrainingError
from understudy.search.plan import Pruned, SearchPlan
from understudy.search.results import TrialRow, best_of, importances, read_results
from understudy.search.space import parse_space
from understudy.search.study import (
    FOLDER_KEY,
    bind,
    check_bound,
    is_of,
    open_study,
    place,
    trial_folder,
    work,
)

SPACE = parse_space(["x=0..1", "y=1|2|4"])
GRID = parse_space(["x=1|2|3", "y=a|b"])


def url(folder):
    return f"sqlite:///{folder / 'search.db'}"


def searched(plan, folder, objective):
    folder.mkdir(exist_ok=True)
    study = open_study(url(folder), "s", plan)
    work(study, plan, folder, objective)
    return read_results(study, plan, name="s", folder=str(folder), recipe={})


def height(attempt):
    return {"accuracy": 1 - (attempt.settings["x"] - 0.3) ** 2}


def test_a_grid_tries_every_combination_once_and_no_more_when_repeated(tmp_path):
    plan = SearchPlan(GRID, sampler="grid")
    seen = []

    def objective(attempt):
        seen.append(dict(attempt.settings))
        return {"accuracy": attempt.settings["x"] / 10}

    results = searched(plan, tmp_path, objective)
    assert seen == GRID.grid()
    assert results.best == (4,)  # the first of two equal ones
    searched(plan, tmp_path, objective)
    assert len(seen) == 6


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_in_pieces_draws_what_it_draws_in_one(tmp_path, sampler):
    whole = searched(SearchPlan(SPACE, sampler=sampler, num_trials=14), tmp_path / "a", height)
    for num in (3, 11, 14):
        parts = searched(SearchPlan(SPACE, sampler=sampler, num_trials=num), tmp_path / "b", height)
    assert [row.settings for row in parts.trials] == [row.settings for row in whole.trials]
    other = SearchPlan(SPACE, sampler=sampler, num_trials=3, seed=1)
    assert searched(other, tmp_path / "c", height).trials[0].settings != whole.trials[0].settings


def test_another_space_in_the_same_database_is_refused(tmp_path):
    searched(SearchPlan(SPACE, num_trials=1), tmp_path, height)
    with pytest.raises(InputError, match="is another search: its space is"):
        open_study(url(tmp_path), "s", SearchPlan(GRID, num_trials=1))
    with pytest.raises(InputError, match="cannot be used"):
        open_study("nosuchdb://x", "s", SearchPlan(SPACE, num_trials=1))


def test_a_failed_trial_has_its_reason_and_the_search_goes_on(tmp_path):
    def objective(attempt):
        if attempt.number == 1:
            raise TrainingError("the loss is not finite")
        return height(attempt)

    results = searched(SearchPlan(SPACE, num_trials=3), tmp_path, objective)
    assert [row.state for row in results.trials] == ["complete", "failed", "complete"]
    assert results.trials[1].reason == "the loss is not finite"


def test_poor_trials_are_stopped(tmp_path):
    def objective(attempt):
        for epoch in range(6):
            attempt.report(epoch, 0.9 if attempt.number < 4 else 0.1)
        return {"accuracy": 0.9}

    results = searched(SearchPlan(SPACE, num_trials=6), tmp_path, objective)
    assert [row.state for row in results.trials] == ["complete"] * 4 + ["pruned"] * 2
    assert len(results.trials[4].curve) < 6
    free = searched(SearchPlan(SPACE, num_trials=6, pruner="none"), tmp_path / "n", objective)
    assert {row.state for row in free.trials} == {"complete"}


def die_in_second_trial(folder):
    def objective(attempt):
        attempt.folder.mkdir(exist_ok=True)
        (attempt.folder / "work").write_text(str(attempt.settings))
        if attempt.number == 1:
            os._exit(9)
        return height(attempt)

    searched(SearchPlan(SPACE, num_trials=3), folder, objective)


def test_a_dead_process_leaves_its_trial_to_the_next_one(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=die_in_second_trial, args=(tmp_path,)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    left = (trial_folder(tmp_path, 1) / "work").read_text()
    taken_up = []

    def objective(attempt):
        taken_up.append((attempt.number, str(dict(attempt.settings))))
        return height(attempt)

    results = searched(SearchPlan(SPACE, num_trials=3), tmp_path, objective)
    assert taken_up[0] == (1, left)
    assert [number for number, _ in taken_up] == [1, 2]
    assert [row.state for row in results.trials] == ["complete"] * 3
    whole = searched(SearchPlan(SPACE, num_trials=3), tmp_path / "whole", height)
    assert [row.settings for row in whole.trials] == [row.settings for row in results.trials]


def end_in_second_trial(folder, how):
    def objective(attempt):
        attempt.report(1, 0.5)
        if attempt.number == 1 and how == "dies":
            os._exit(9)
        if attempt.number == 1:
            raise KeyboardInterrupt
        return height(attempt)

    with contextlib.suppress(KeyboardInterrupt):
        searched(SearchPlan(SPACE, num_trials=3), folder, objective)


def sittings(folder, how, count):
    for _ in range(count):
        process = multiprocessing.get_context("fork").Process(
            target=end_in_second_trial, args=(folder, how)
        )
        process.start()
        process.join()


def test_a_trial_that_always_kills_its_process_fails(tmp_path):
    sittings(tmp_path, "dies", 3)
    results = searched(SearchPlan(SPACE, num_trials=3), tmp_path, height)
    assert [row.state for row in results.trials] == ["complete", "failed", "complete"]
    assert "died 3 times after epoch 1; perhaps it needs more memory" in results.trials[1].reason


def test_a_trial_that_is_stopped_on_purpose_goes_on_however_often(tmp_path):
    sittings(tmp_path, "stops", 4)
    results = searched(SearchPlan(SPACE, num_trials=3), tmp_path, height)
    assert [row.state for row in results.trials] == ["complete"] * 3


@pytest.mark.parametrize("claimed", ["now", "by an earlier version"])
def test_a_half_done_trial_goes_on_after_folder_and_machine_have_other_names(
    tmp_path, monkeypatch, claimed
):
    before, after = tmp_path / "before", tmp_path / "after"
    if claimed == "by an earlier version":
        monkeypatch.setattr(understudy.search.study, "place", lambda folder: f"old:{folder}")
    sittings(before, "stops", 1)
    monkeypatch.undo()
    before.rename(after)
    monkeypatch.setattr("socket.gethostname", lambda: "another-machine")
    results = searched(SearchPlan(SPACE, num_trials=3), after, height)
    assert [row.state for row in results.trials] == ["complete"] * 3


def test_a_trial_belongs_to_one_folder(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"

    def claimed_in(told):
        return optuna.trial.create_trial(value=0.5, user_attrs={FOLDER_KEY: told})

    assert place(one) == place(one) != place(other)
    trial = claimed_in(place(one))
    trial_folder(other, trial.number).mkdir(parents=True)
    assert is_of(one, trial)
    assert not is_of(other, trial)
    assert not is_of(one, claimed_in("another-machine:/elsewhere"))
    assert is_of(one, claimed_in(f"{socket.gethostname()}:{one.resolve()}"))


def die_at_the_first_claim(folder, plan):
    understudy.search.study.try_lock = lambda folder: os._exit(9)
    searched(plan, folder, height)


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_trial_that_was_claimed_and_nothing_more_is_not_lost(tmp_path, sampler):
    space, number = (GRID, None) if sampler == "grid" else (SPACE, 3)
    plan = SearchPlan(space, sampler=sampler, num_trials=number)
    process = multiprocessing.get_context("fork").Process(
        target=die_at_the_first_claim, args=(tmp_path, plan)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    results = searched(plan, tmp_path, height)
    assert {row.state for row in results.trials} == {"complete"}
    whole = searched(plan, tmp_path / "whole", height)
    assert [row.settings for row in results.trials] == [row.settings for row in whole.trials]


def slow_share(folder):
    def objective(attempt):
        time.sleep(0.05)
        return {"accuracy": 0.5}

    searched(SearchPlan(GRID, sampler="grid"), folder, objective)


def test_processes_share_a_grid_without_doing_anything_twice(tmp_path):
    plan = SearchPlan(GRID, sampler="grid")
    open_study(url(tmp_path), "s", plan)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=slow_share, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    study = open_study(url(tmp_path), "s", plan)
    rows = read_results(study, plan, name="s", folder="", recipe={}).trials
    assert [row.state for row in rows] == ["complete"] * 6
    assert [row.settings for row in rows] == GRID.grid()


def work_in_a_folder_of_its_own(folder, storage, plan, barrier):
    """Do trials as a machine of its own; its first is claimed when the other counted as well."""
    study = open_study(storage, "s", plan)
    create, met = study._storage.create_new_trial, []

    def create_together(*args, **options):
        if not met:
            met.append(barrier.wait(120))
        return create(*args, **options)

    study._storage.create_new_trial = create_together

    def objective(attempt):
        (attempt.folder / "done").write_text(repr(dict(attempt.settings)))
        return height(attempt)

    work(study, plan, folder, objective)


@pytest.mark.parametrize(
    "plan",
    [
        SearchPlan(parse_space(["x=1|2|3"]), sampler="grid"),
        SearchPlan(SPACE, sampler="random", num_trials=3),
        SearchPlan(SPACE, sampler="random", num_trials=1),
    ],
    ids=["grid", "random", "one for two"],
)
def test_machines_with_one_storage_never_do_the_same_point(tmp_path, plan):
    storage = url(tmp_path)
    open_study(storage, "s", plan)
    context = multiprocessing.get_context("fork")
    barrier, folders = context.Barrier(2), [tmp_path / "a", tmp_path / "b"]
    processes = [
        context.Process(target=work_in_a_folder_of_its_own, args=(folder, storage, plan, barrier))
        for folder in folders
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    done = [path.read_text() for folder in folders for path in folder.rglob("done")]
    wanted = plan.num_trials or 3
    assert len(set(done)) == len(done) == wanted
    rows = read_results(open_study(storage, "s", plan), plan, name="s", folder="", recipe={}).trials
    assert [row.state for row in rows] == ["complete"] * wanted
    assert sorted(repr(row.settings) for row in rows) == sorted(done)
    # What was left over when two claimed the last one is there when more are wanted.
    if plan.sampler == "random":
        more = replace(plan, num_trials=wanted + 2)
        for folder in folders:
            work(open_study(storage, "s", more), more, folder, height)
        study = open_study(storage, "s", more)
        rows = read_results(study, more, name="s", folder="", recipe={}).trials
        assert [row.state for row in rows] == ["complete"] * (wanted + 2)


def test_the_front_is_what_a_plain_search_finds(tmp_path):
    def objective(attempt):
        x = attempt.settings["x"]
        return {"accuracy": x, "macs": 10 * x + attempt.settings["y"]}

    plan = SearchPlan(
        SPACE, objectives=("accuracy", "macs"), sampler="nsga2", pruner="none", num_trials=20
    )
    results = searched(plan, tmp_path, objective)
    found = {(row.measures["accuracy"], row.measures["macs"]) for row in results.trials}
    front = {p for p in found if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in found)}
    rows = {row.number: row for row in results.trials}
    told = [(rows[k].measures["accuracy"], rows[k].measures["macs"]) for k in results.best]
    assert set(told) == front
    assert told == sorted(told, reverse=True)
    assert best_of([], ("accuracy",)) == ()


def test_the_best_accuracy_comes_first_whatever_objective_was_named_first():
    def trial(number, accuracy, macs):
        measures = {"accuracy": accuracy, "macs": macs, "num_params": macs}
        return TrialRow(number, "complete", {}, measures, (), 1.0, None)

    rows = [trial(0, 0.5, 10), trial(1, 0.9, 30), trial(2, 0.7, 20), trial(3, 0.6, 25)]
    assert best_of(rows, ("macs", "accuracy")) == (1, 2, 0)
    assert best_of(rows, ("accuracy", "macs")) == (1, 2, 0)
    assert best_of(rows, ("macs", "num_params")) == (0,)


def test_a_password_is_in_no_error(tmp_path):
    plan = SearchPlan(SPACE, num_trials=1)
    with pytest.raises(InputError, match=r"nosuchdb://me:\*\*\*@host/x cannot be used") as caught:
        open_study("nosuchdb://me:s3cret@host/x", "s", plan)
    assert "s3cret" not in str(caught.value)


def test_what_matters_has_the_larger_importance(tmp_path):
    plan = SearchPlan(SPACE, sampler="random", num_trials=25)
    shares = searched(plan, tmp_path, height).importances["accuracy"]
    assert shares["x"] > 0.8
    assert not searched(SearchPlan(SPACE, num_trials=2), tmp_path / "few", height).importances


def test_an_importance_is_a_share_of_the_variance_and_not_of_what_single_parameters_explain():
    study, space = optuna.create_study(), parse_space(["x=0..1", "y=0..1"])
    numbers = np.linspace(0, 1, 9)
    for x, y in itertools.product(numbers, numbers):
        drawn = {name: optuna.distributions.FloatDistribution(0, 1) for name in ("x", "y")}
        # By itself neither explains anything: the mean over the other one is 0 for every value.
        value = (x - 0.5) * (y - 0.5)
        trial = optuna.trial.create_trial(params={"x": x, "y": y}, distributions=drawn, value=value)
        study.add_trial(trial)
    shares = importances(study, SearchPlan(space, num_trials=81))["accuracy"]
    assert set(shares) == {"x", "y"}
    assert sum(shares.values()) < 0.3


def test_noise_between_equal_settings_has_no_importance(tmp_path):
    space = parse_space(["x=1|2", "y=3"])
    seconds = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    plan = SearchPlan(space, sampler="grid", objectives=("train_seconds",))
    results = searched(plan, tmp_path, lambda attempt: {"train_seconds": next(seconds)})
    assert "y" not in results.importances.get("train_seconds", {})
    study = optuna.create_study()
    for value in (1.0, 2.0, 3.0, 4.0):
        study.enqueue_trial({"x": 1})
        study.tell(study.ask({"x": optuna.distributions.CategoricalDistribution([1, 2])}), value)
    assert importances(study, plan) == {}


def test_trials_of_other_data_or_teachers_are_not_compared(tmp_path):
    study = open_study(url(tmp_path), "s", SearchPlan(SPACE, num_trials=1))
    bind(study, {"data": "a", "teacher": "b"})
    bind(study, {"data": "a", "teacher": "b"})
    with pytest.raises(InputError, match="a search with another teacher; expected the same"):
        bind(study, {"data": "a", "teacher": "c"})
    # What is known before a training is checked by itself; what is new is added.
    check_bound(study, {"data": "a", "weights": "d"})
    bind(study, {"data": "a", "weights": "d"})
    with pytest.raises(InputError, match="with another data and another weights; expected"):
        check_bound(study, {"data": "b", "weights": "e"})
    with pytest.raises(InputError, match="with another teacher"):
        check_bound(study, {"teacher": "c"})


def test_pruned_is_not_an_error_of_the_package():
    from understudy.errors import UnderstudyError

    assert not issubclass(Pruned, UnderstudyError)

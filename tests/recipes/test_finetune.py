"""Fine-tuning on labels after distillation: a second stage, for student and control alike."""

import json
import shutil
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_run import TINY_RECIPE, TinyRun
from understudy.errors import RecipeError
from understudy.recipes.job import open_run

TUNED = ("student-untuned", "student", "control-untuned", "control")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    values = yaml.safe_load(TINY_RECIPE)
    values["finetuning"] = {
        "num_epochs": 3,
        "batch_size": 32,
        "optimizer": {"name": "adamw", "learning_rate": 0.002},
        "checkpoint_every_steps": 5,
    }
    path = tmp_path_factory.mktemp("tuned") / "tuned.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def tuned(warm, recipe, tmp_path_factory):
    """A finished run with fine-tuning. Tests only read it."""
    folder = tmp_path_factory.mktemp("tuned-run")
    run = TinyRun(folder / "run", folder / "home")
    finished = warm.run("distill", recipe, "--out", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    return run


@pytest.fixture
def copied_run(tuned, tmp_path):
    run = TinyRun(tmp_path / "run", tmp_path / "home")
    shutil.copytree(tuned.folder, run.folder)
    shutil.copytree(tuned.home, run.home)
    return run


def started(finished):
    lines = [line.split(" ", 1)[1] for line in finished.err.splitlines()]
    return [line.removesuffix(": started") for line in lines if line.endswith(": started")]


def test_the_first_part_is_the_training_without_fine_tuning(tuned, unbroken):
    for role in ("student", "control"):
        first = load_file(tuned.folder / f"{role}-untuned" / "model.safetensors")
        plain = load_file(unbroken.folder / role / "model.safetensors")
        assert all(torch.equal(first[name], plain[name]) for name in plain)
        last = load_file(tuned.folder / role / "model.safetensors")
        assert not all(torch.equal(first[name], last[name]) for name in last)


def test_epochs_and_updates_are_counted_on(tuned):
    first, whole = tuned.record("student-untuned").payload, tuned.record("student").payload
    assert whole["rows"][: len(first["rows"])] == first["rows"]
    rows = whole["rows"]
    assert [row["epoch"] for row in rows] == list(range(7))
    assert [row.get("phase") for row in rows] == [None] * 4 + ["finetuning"] * 3
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert whole["num_steps"] == steps[-1] > first["num_steps"]
    assert whole["teacher_confidence"] == first["teacher_confidence"]
    assert whole["validation_accuracy"] == rows[-1]["validation_accuracy"]
    assert set(rows[0]["losses"]) == {"kl", "ce"}
    assert set(rows[-1]["losses"]) == {"ce"}


def test_the_control_gets_the_same_updates(tuned):
    counts = [tuned.record(role).payload["num_steps"] for role in ("student", "control")]
    assert counts[0] == counts[1]


def test_what_ships_and_is_reported_is_the_tuned_network(tuned):
    evaluated = tuned.record("evaluation")
    assert evaluated.parents["student"] == tuned.record("student").hash
    assert tuned.record("export").parents["student"] == tuned.record("student").hash
    results = json.loads((tuned.folder / "report" / "report.json").read_text())["results"]
    assert [row["epoch"] for row in results["curves"]["student"]] == list(range(7))
    assert [stage["name"] for stage in results["stages"]][3:7] == list(TUNED)
    seconds = tuned.record("student").timing["train_seconds"]
    first = tuned.record("student-untuned").timing["train_seconds"]
    assert seconds > first
    assert results["training_hours"]["student"] == pytest.approx(seconds / 3600)
    accuracy = results["metrics"]["student"]["validation"]["accuracy"]
    assert accuracy == pytest.approx(results["curves"]["student"][-1]["validation_accuracy"])


def test_a_change_of_the_tuning_leaves_the_training(warm, copied_run):
    change = ["--set", "finetuning.num_epochs=1"]
    finished = warm.run("train", copied_run.folder, *change, home=copied_run.home)
    assert finished.code == 0, finished.err
    assert started(finished) == ["student", "control"]
    change = ["--set", "distillation.temperature=2"]
    finished = warm.run("train", copied_run.folder, *change, home=copied_run.home)
    assert started(finished) == ["student-untuned", "student"]


@pytest.mark.parametrize("kind", ["student-untuned", "student"])
def test_a_kill_in_either_part_ends_in_the_same_result(warm, recipe, tuned, fresh, kind):
    for command in ("teach", "label"):
        origin = fresh.folder if command == "label" else recipe
        done = warm.run(command, origin, "--out", fresh.folder, home=fresh.home)
        assert done.code == 0, done.err
    running = warm.start("train", fresh.folder, home=fresh.home)
    metrics = fresh.folder / kind / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert running.poll() is None, running.err()
        time.sleep(0.001)
    running.kill(signal.SIGKILL)
    running.wait()
    finished = warm.run("train", fresh.folder, home=fresh.home)
    assert finished.code == 0, finished.err
    assert "resumed at epoch" in finished.err
    for stage in TUNED:
        assert fresh.record(stage).hash == tuned.record(stage).hash


def test_the_best_of_the_tuning_is_kept_where_asked_for(warm, copied_run):
    change = ["--set", "finetuning.keep=best", "--set", "control=false"]
    assert warm.run("train", copied_run.folder, *change, home=copied_run.home).code == 0
    payload = copied_run.record("student").payload
    tuned_rows = [row for row in payload["rows"] if row.get("phase")]
    best = max(row["validation_accuracy"] for row in tuned_rows)
    assert payload["validation_accuracy"] == best


def test_batches_that_are_too_large_are_found_first(tmp_path):
    values = yaml.safe_load(TINY_RECIPE)
    values["finetuning"] = {"batch_size": 100_000}
    with pytest.raises(RecipeError, match=r"finetuning\.batch_size is 100000"):
        open_run(values, out=tmp_path / "run")
    values["finetuning"] = {"batch_size": 33}
    values["device"]["num_processes"] = 2
    with pytest.raises(RecipeError, match=r"finetuning\.batch_size is 33 with 2 processes"):
        open_run(values, out=tmp_path / "run")


def test_the_shipped_recipe_runs(warm, fresh):
    changes = ["training.num_epochs=4", "teacher.training.num_epochs=3", "views.num_views=2"]
    changes += [
        "finetuning.num_epochs=2",
        "measurement={min_seconds: 0.05, batch_sizes: [1], num_threads: [1]}",
    ]
    options = [argument for change in changes for argument in ("--set", change)]
    finished = warm.run("distill", "finetuned", *options, "--out", fresh.folder, home=fresh.home)
    assert finished.code in (0, 3), finished.err
    assert fresh.record("student").payload["rows"][-1]["phase"] == "finetuning"

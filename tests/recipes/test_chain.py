"""Chains of ordinary runs: assistants and generations, their steps, records and report."""

import itertools
import json
import shutil
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_run import TINY_RECIPE, TinyRun
from understudy.artifacts import Record, file_hash
from understudy.errors import InputError, RecipeError
from understudy.evaluate.accuracy import predict_logits
from understudy.recipes.chain import earlier_seconds, learn, lineage, run_steps
from understudy.recipes.job import open_run
from understudy.recipes.networks import build_model, trained_model

STEP_STAGES = ("split", "teacher", "labels", "student")


def chain_recipe(strategy, **changes):
    values = yaml.safe_load(TINY_RECIPE)
    values["budget"] = {"train_hours": 1}
    return {**values, "strategy": strategy, **changes}


ASSISTANTS = chain_recipe(
    {
        "name": "progressive",
        "assistants": [
            {"name": "mlp", "arguments": {"hidden": [24]}},
            {"name": "mlp", "arguments": {"hidden": [20]}},
        ],
    },
    finetuning={"num_epochs": 2, "batch_size": 64, "checkpoint_every_steps": 5},
)


def decided(run):
    """Return what seed and recipe decide of a chain: all records and weights."""
    records = sorted(run.folder.rglob("record.json"))
    weights = sorted(run.folder.rglob("model.safetensors"))
    return {
        "hashes": {str(p.relative_to(run.folder)): Record.load(p.parent).hash for p in records},
        "weights": {str(p.relative_to(run.folder)): file_hash(p) for p in weights},
    }


def started(finished):
    lines = [line.split(" ", 1)[1] for line in finished.err.splitlines()]
    return [line.removesuffix(": started") for line in lines if line.endswith(": started")]


def results_of(run):
    return json.loads((run.folder / "report" / "report.json").read_text())["results"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("chain") / "chain.yaml"
    path.write_text(yaml.safe_dump(ASSISTANTS))
    return path


@pytest.fixture(scope="module")
def chain(warm, recipe, tmp_path_factory):
    """A finished chain of two assistants with fine-tuning. Tests only read it."""
    folder = tmp_path_factory.mktemp("chain-run")
    run = TinyRun(folder / "run", folder / "home")
    finished = warm.run("distill", recipe, "--out", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    return run


@pytest.fixture
def copied_chain(chain, tmp_path):
    run = TinyRun(tmp_path / "run", tmp_path / "home")
    shutil.copytree(chain.folder, run.folder)
    shutil.copytree(chain.home, run.home)
    return run


@pytest.fixture
def opened(chain, monkeypatch):
    """The finished chain as the stages see it."""
    monkeypatch.setenv("UNDERSTUDY_HOME", str(chain.home))
    return open_run(chain.folder)


def test_the_folder_keeps_the_recipe_of_the_user(chain):
    saved = yaml.safe_load((chain.folder / "recipe.yaml").read_text())
    assert saved["strategy"]["name"] == "progressive"
    assert saved["teacher"]["training"]["num_epochs"] == 3
    assert results_of(chain)["recipe"] == saved


def test_an_assistant_as_teacher_answers_bit_for_bit_as_it_was_evaluated(chain, opened):
    assistant = opened.steps[-1]
    model = trained_model(assistant, "student", assistant.parent("student", "distill"))
    stored = load_file(chain.folder / "evaluation" / "logits.safetensors")
    logits_NK = predict_logits(model, opened.source, opened.splits.test)
    assert torch.equal(stored["teacher.test"], logits_NK)
    rows = assistant.parent("student", "distill").payload["rows"]
    taught = opened.parent("teacher", "distill").payload
    assert taught["validation_accuracy"] == rows[-1]["validation_accuracy"]


def test_every_network_is_taught_by_the_one_before(opened):
    runs = [*opened.steps, opened]
    assert [run.step for run in runs] == ["1-assistant", "2-assistant", ""]
    for before, after in itertools.pairwise(runs):
        weights = before.parent("student", "distill").files["model.safetensors"]
        assert after.parent("teacher", "distill").parents["weights"] == weights
        assert after.recipe.teacher.model == before.recipe.student.model
        assert after.splits.test is before.splits.test
        assert after.source is before.source


def test_first_weights_are_of_each_step_alone_and_those_of_the_control(opened):
    wide = opened.recipe.student.model.model_copy(update={"arguments": {"hidden": [16]}})
    states = []
    for run in (*opened.steps, opened):
        run.recipe = run.recipe.model_copy(
            update={"student": run.recipe.student.model_copy(update={"model": wide})}
        )
        states.append(build_model(run, "student").state_dict()["network.layers.1.weight"])
    control = build_model(opened, "control").state_dict()["network.layers.1.weight"]
    assert torch.equal(states[-1], control)
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


def test_the_report_names_the_steps_and_counts_their_time(chain, opened):
    results = results_of(chain)
    names = [row["name"] for row in results["lineage"]]
    assert names == ["teacher", "assistant 1", "assistant 2", "student"]
    assert [row["num_params"] for row in results["lineage"]] == [2410, 1810, 1510, 1210]
    validation = results["metrics"]["student"]["validation"]["accuracy"]
    assert results["lineage"][-1]["validation_accuracy"] == pytest.approx(validation)
    seconds = sum(
        run.parent("student", "distill").timing["train_seconds"] for run in (*opened.steps, opened)
    )
    assert results["training_hours"]["student"] == pytest.approx(seconds / 3600)
    (row,) = results["budget"]
    assert row["measured"] == pytest.approx(seconds / 3600)
    assert "all steps of the chain together" in row["detail"]
    listed = [stage["name"] for stage in results["stages"]]
    assert listed[:8] == [f"{n}-assistant/{kind}" for n in (1, 2) for kind in STEP_STAGES]
    for name in ("report.html", "report.md"):
        text = (chain.folder / "report" / name).read_text()
        assert "taught by the one above it" in text
        assert "assistant 2" in text


def test_the_updates_of_the_control_are_those_of_one_network(chain):
    num_steps = {role: chain.record(role).payload["num_steps"] for role in ("student", "control")}
    assert num_steps["student"] == num_steps["control"]


def test_nothing_is_done_again_wherever_the_folder_lies(warm, copied_chain):
    again = warm.run("distill", copied_chain.folder, home=copied_chain.home)
    assert again.code == 0, again.err
    assert started(again) == []
    assert sum(": unchanged, reused" in line for line in again.err.splitlines()) == 8 + 9


def test_a_change_of_the_last_step_leaves_the_others(warm, copied_chain):
    change = ["--set", "student.model.arguments={hidden: [15]}", "--set", "control=false"]
    finished = warm.run("distill", copied_chain.folder, *change, home=copied_chain.home)
    assert finished.code == 0, finished.err
    assert started(finished) == ["student-untuned", "student", "evaluation", "export"]


def test_stages_alone_work_on_the_last_step(warm, copied_chain, chain):
    for kind in ("student", "student-untuned", "control", "evaluation", "export"):
        shutil.rmtree(copied_chain.folder / kind)
    for command in ("teach", "label", "train", "evaluate", "export", "report"):
        finished = warm.run(command, copied_chain.folder, home=copied_chain.home)
        assert finished.code == 0, finished.err
    assert decided(copied_chain) == decided(chain)


@pytest.mark.parametrize("command", ["teach", "label", "train", "report"])
def test_a_stage_of_an_unfinished_chain_says_to_run_all(warm, copied_chain, command):
    shutil.rmtree(copied_chain.folder / "steps" / "2-assistant" / "student")
    finished = warm.run(command, copied_chain.folder, home=copied_chain.home)
    assert finished.code == 2, finished.err
    assert "steps 2-assistant are not finished" in finished.err
    assert f"understudy distill {copied_chain.folder}" in finished.err
    assert "Traceback" not in finished.err


def test_a_report_of_steps_that_do_not_belong_together_is_refused(chain, opened, copied_chain):
    folder = copied_chain.folder / "steps" / "2-assistant" / "student"
    other = copied_chain.folder / "steps" / "1-assistant" / "student"
    values = json.loads((folder / "record.json").read_text())
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    values["files"]["model.safetensors"] = file_hash(folder / "model.safetensors")
    values.pop("hash")
    Record(**values).save(folder)
    with pytest.raises(InputError, match="what step 2-assistant teaches was trained with an earl"):
        open_and_report(copied_chain)


def open_and_report(run):
    from understudy.stages import report

    return report(run.folder)


def test_a_killed_chain_goes_on_to_the_same_result(warm, recipe, chain, fresh):
    place = "steps/2-assistant/student"
    command = warm.start("distill", recipe, "--out", fresh.folder, home=fresh.home)
    metrics = fresh.folder / place / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert command.poll() is None, command.err()
        time.sleep(0.001)
    command.kill(signal.SIGKILL)
    assert command.wait().code == -9
    assert not (fresh.folder / "student").exists()
    finished = warm.run("resume", fresh.folder, home=fresh.home)
    assert finished.code == 0, finished.err
    assert "resumed at epoch" in finished.err
    assert decided(fresh) == decided(chain)


def without_teacher(num_generations):
    values = chain_recipe({"name": "born_again", "num_generations": num_generations})
    del values["teacher"]
    return values


def test_generations_without_a_teacher_begin_with_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    run = open_run(without_teacher(2), out=tmp_path / "run")
    run_steps(run)
    learn(run)
    names = [row["name"] for row in lineage(run)]
    assert names == ["generation 1, from labels", "generation 2", "student"]
    assert [step.step for step in run.steps] == ["2-generation"]
    step = run.steps[0]
    assert step.recipe.teacher.training == run.recipe.training
    assert step.recipe.teacher.model == run.recipe.student.model
    # What the first generation took is part of what the student took.
    parts = [step.parent("teacher", "teach"), step.parent("student", "train")]
    seconds = sum(record.timing["train_seconds"] for record in parts)
    assert earlier_seconds(run) == pytest.approx(seconds)


def test_a_first_generation_without_a_teacher_keeps_no_views_for_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    recipe = without_teacher(2)
    recipe["training"]["last_views"] = {"num_epochs": 1, "num_views": 1}
    run = open_run(recipe, out=tmp_path / "run")
    assert run.steps[0].recipe.teacher.training.last_views is None
    assert run.steps[0].recipe.training.last_views == run.recipe.training.last_views


def test_generations_with_a_teacher_begin_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    recipe = chain_recipe({"name": "born_again", "num_generations": 2})
    recipe["student"]["flip_average"] = True
    run = open_run(recipe, out=tmp_path / "r")
    assert all(build_model(step, "student").flip_average for step in (*run.steps, run))
    assert [step.step for step in run.steps] == ["1-generation", "2-generation"]
    assert run.steps[0].recipe.teacher.model.arguments["hidden"] == [32]
    assert {s.recipe.student.model.arguments["hidden"][0] for s in run.steps} == {16}
    assert [s.recipe.control for s in run.steps] == [False, False]
    assert run.recipe.control
    assert run.recipe.budget.train_hours == 1
    assert run.asked.strategy.name == "born_again"


def test_one_generation_after_labels_has_no_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    run = open_run(without_teacher(1), out=tmp_path / "r")
    assert run.steps == ()
    assert run.recipe.teacher.training == run.asked.training


def test_what_is_wrong_with_a_step_names_the_step(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    broken = {"name": "progressive", "assistants": [{"name": "mlq"}, {"name": "resnet9"}]}
    with pytest.raises(RecipeError) as caught:
        open_run(chain_recipe(broken), out=tmp_path / "r")
    text = str(caught.value)
    assert "step 1-assistant: unknown model 'mlq' (did you mean 'mlp'?)" in text
    assert "step 2-assistant: unknown model 'resnet9'" in text


def test_assistants_are_named_or_counted_not_both():
    both = {"name": "progressive", "assistants": [{"name": "mlp"}], "num_assistants": 2}
    with pytest.raises(RecipeError, match="names 1 assistants and asks for 2"):
        open_run(chain_recipe(both))


def test_a_chain_of_assistants_needs_a_teacher():
    values = chain_recipe({"name": "progressive"})
    del values["teacher"]
    with pytest.raises(RecipeError, match="strategy progressive needs a teacher"):
        open_run(values)


SHRUNK = ("training.num_epochs=5", "training.learning_rate_schedule.warmup_epochs=0")
SHRUNK += (
    "views.num_views=2",
    "measurement={min_seconds: 0.05, batch_sizes: [1], num_threads: [1]}",
)


@pytest.mark.parametrize(
    ("name", "changes", "num_members"),
    [
        ("born_again", (), 3),
        ("assistants", ("teacher.training.num_epochs=3",), 3),
    ],
)
def test_the_shipped_recipes_run(warm, fresh, name, changes, num_members):
    options = [argument for change in (*SHRUNK, *changes) for argument in ("--set", change)]
    finished = warm.run("distill", name, *options, "--out", fresh.folder, home=fresh.home)
    assert finished.code in (0, 3), finished.err
    assert len(results_of(fresh)["lineage"]) == num_members

"""Strategies that train networks beside the student: whole runs, stages alone, bad recipes."""

import json
import shutil
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_run import STAGES, TINY_RECIPE, TinyRun
from understudy.artifacts import Record, file_hash
from understudy.errors import RecipeError
from understudy.recipes.files import shipped_recipe
from understudy.recipes.networks import build_model
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe

BESIDE = {"online": ["teacher"], "mutual": ["peer-1", "peer-2"], "ema_teacher": ["average"]}
ALONE = ("train", "evaluate", "export", "report")
SHRUNK = (
    "training.num_epochs=2",
    "training.learning_rate_schedule.warmup_epochs=0",
    "training.checkpoint_every_steps=5",
    "measurement={min_seconds: 0.05, batch_sizes: [1], num_threads: [1]}",
)
# Sums in another order, over 68 updates.
PROCESS_TOLERANCE = 1e-5


def settings(*changes):
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture(scope="module")
def finished_runs(warm, tmp_path_factory):
    """Whole runs of the shipped recipes, shrunk, one of them stage by stage; only to be read."""
    runs = {}
    for name in BESIDE:
        folder = tmp_path_factory.mktemp(name)
        run = TinyRun(folder / "run", folder / "home")
        for command in ALONE if name == "online" else ("distill",):
            start = run.folder if run.folder.exists() else name
            changes = () if run.folder.exists() else settings(*SHRUNK)
            done = warm.run(command, start, *changes, "--out", run.folder, home=run.home)
            assert done.code == 0, done.err
        runs[name] = run
    return runs


def copy_of(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    return TinyRun(tmp_path / "run", run.home)


@pytest.mark.parametrize("name", BESIDE)
def test_a_shipped_recipe_runs_from_data_to_report(finished_runs, name):
    run = finished_runs[name]
    student = run.record("student")
    assert [row["name"] for row in student.payload["beside"]] == BESIDE[name]
    assert set(student.files) == {"model.safetensors", *(f"{r}.safetensors" for r in BESIDE[name])}
    last = student.payload["rows"][-1]
    for row in student.payload["beside"]:
        column = f"validation_{row['name'].replace('-', '')}_accuracy"
        assert row["validation_accuracy"] == last[column]
    assert student.payload["num_steps"] == run.record("control").payload["num_steps"]
    results = json.loads((run.folder / "report" / "report.json").read_text())["results"]
    assert ("teacher" in results["metrics"]) == (name == "online")
    shown = [row["name"] for row in results["beside"]]
    assert shown == ([] if name == "online" else BESIDE[name])


@pytest.mark.parametrize("name", ["mutual", "ema_teacher"])
def test_a_report_without_a_teacher_does_not_speak_of_one(finished_runs, name):
    folder = finished_runs[name].folder / "report"
    verdicts = json.loads((folder / "report.json").read_text())["verdicts"]
    found = {row["code"]: row["status"] for row in verdicts}
    assert {found[code] for code in ("US006", "US007", "US013")} == {"not_applicable"}
    for row in verdicts:
        assert "the teacher" not in row["message"].lower(), row
    page = (folder / "report.html").read_text()
    assert "without the teacher" not in page
    assert "Worth of the strategy" in page
    assert "Trained beside the student" in (folder / "report.md").read_text()


def test_the_online_teacher_is_reported_as_any_teacher(finished_runs):
    run = finished_runs["online"]
    results = json.loads((run.folder / "report" / "report.json").read_text())["results"]
    assert results["metrics"]["student"]["test"]["agreement_with_teacher"] is not None
    assert results["models"]["teacher"]["num_params"] == 75_002
    assert [row["epoch"] for row in results["curves"]["teacher"]] == [0, 1]
    assert "with the student" in (run.folder / "report" / "report.md").read_text()
    # It is the teacher after the last update, and has learnt.
    teacher = load_file(run.folder / "teacher" / "model.safetensors")
    trained = load_file(run.folder / "student" / "teacher.safetensors")
    assert all(torch.equal(value, trained[key]) for key, value in teacher.items())
    record = run.record("teacher")
    assert record.payload["validation_accuracy"] > 0.3
    assert record.parents == {"student": run.record("student").hash}


def test_stages_alone_give_the_records_of_the_whole_job(warm, finished_runs, tmp_path):
    run = copy_of(finished_runs["online"], tmp_path)
    finished = warm.run("distill", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    assert ": started" not in finished.err
    assert finished.err.count(": unchanged, reused") == len(STAGES) - 1  # no labels


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("online", "strategy online trains its teacher together with the student"),
        ("mutual", "strategy mutual has no teacher to"),
        ("ema_teacher", "strategy ema_teacher has no teacher to"),
    ],
)
@pytest.mark.parametrize("command", ["teach", "label"])
def test_there_is_no_teacher_to_train_or_ask_first(
    warm, finished_runs, tmp_path, name, message, command
):
    run = copy_of(finished_runs[name], tmp_path)
    finished = warm.run(command, run.folder, home=run.home)
    assert finished.code == 2
    assert message in finished.err
    assert f"understudy train {run.folder}" in finished.err
    assert "Traceback" not in finished.err


def test_a_lost_online_teacher_is_made_again_from_the_students_training(
    warm, finished_runs, tmp_path
):
    run = copy_of(finished_runs["online"], tmp_path)
    shutil.rmtree(run.folder / "teacher")
    missing = warm.run("evaluate", run.folder, home=run.home)
    assert missing.code == 2
    assert "has no record of its teacher" in missing.err
    assert f"understudy train {run.folder}" in missing.err
    finished = warm.run("distill", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    assert "teacher: started" in finished.err
    assert "student: unchanged, reused" in finished.err
    assert "evaluation: unchanged, reused" in finished.err


def test_an_online_teacher_goes_on_from_a_checkpoint(warm, finished_runs, tmp_path):
    first = finished_runs["online"]
    checkpoint = tmp_path / "teacher.safetensors"
    state = load_file(first.folder / "teacher" / "model.safetensors")
    shutil.copy(first.folder / "teacher" / "model.safetensors", checkpoint)
    run = TinyRun(tmp_path / "run", first.home)
    # A learning rate of next to nothing leaves the weights where the checkpoint has them.
    changes = (*SHRUNK, "training.optimizer.learning_rate=1e-9", f"teacher.checkpoint={checkpoint}")
    arguments = (*settings(*changes, "training.num_epochs=1", "control=false"), "--out", run.folder)
    finished = warm.run("train", "online", *arguments, home=run.home)
    assert finished.code == 0, finished.err
    weights = load_file(run.folder / "teacher" / "model.safetensors")
    for name, value in state.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


def test_peers_start_from_weights_of_their_own(finished_runs):
    run = finished_runs["mutual"]
    recipe = parse_recipe(yaml.safe_load((run.folder / "recipe.yaml").read_text()))
    opened = Run(recipe, run.folder, run.home)
    student, peer = (build_model(opened, role).state_dict() for role in ("student", "peer-1"))
    assert student.keys() == peer.keys()
    name = "network.stem.0.weight"
    assert not torch.equal(student[name], peer[name])


def test_a_killed_run_ends_as_an_unbroken_one(warm, finished_runs, tmp_path):
    whole = finished_runs["mutual"]
    run = TinyRun(tmp_path / "run", whole.home)
    arguments = ("mutual", *settings(*SHRUNK), "--out", run.folder)
    command = warm.start("train", *arguments, home=run.home)
    metrics = run.folder / "student" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):  # until the first epoch is done
        assert command.poll() is None, command.err()
        time.sleep(0.005)
    command.kill()
    assert command.wait().code == -9
    finished = warm.run("train", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    assert "resumed at" in finished.err
    for kind in ("student", "control"):
        assert run.record(kind).hash == whole.record(kind).hash


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("online", {"teacher": None}, "strategy online needs a teacher section"),
        (
            "online",
            {"teacher": {"model": {"name": "mlp"}, "training": {}}},
            "drop teacher.training",
        ),
        ("online", {"teacher": {"model": {"name": "t.onnx"}}}, "an .onnx file cannot be"),
        ("mutual", {"teacher": {"model": {"name": "mlp"}}}, "mutual has no teacher: drop"),
        ("ema_teacher", {"teacher": {"model": {"name": "mlp"}}}, "has no teacher: drop"),
        (
            "mutual",
            {"strategy": {"name": "mutual", "peers": [{"name": "p.onnx"}]}},
            "trains peer 1, which an .onnx file cannot be",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_strategy_is_refused(name, changes, message):
    values = {**yaml.safe_load(shipped_recipe(name)), **changes}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(values)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("online", "distillation.losses={rkd: {}}", "strategy online has no trained teacher"),
        ("mutual", "labelling.live=true", "labelling.live and strategy mutual"),
        (
            "mutual",
            "distillation.balance={method: validation}",
            "validation and strategy mutual has no",
        ),
        ("mutual", "strategy.peers=[{name: seperable}]", "peer-1: "),
        ("mutual", "strategy.peers=[{name: mlp, arguments: {hiden: [3]}}]", "peer-1: "),
        ("ema_teacher", "distillation.curriculum={difficulty: margin}", "ema_teacher has no"),
        ("online", "teacher.checkpoint=nowhere.pt", "nowhere.pt, which is not there"),
    ],
)
def test_what_the_strategy_cannot_do_is_found_before_anything_runs(
    warm, tmp_path, name, change, message
):
    arguments = (name, *settings(*SHRUNK, change), "--out", tmp_path / "run")
    finished = warm.run("train", *arguments, home=tmp_path / "home")
    assert finished.code == 2
    assert message in finished.err
    assert not (tmp_path / "run").exists()


def test_fine_tuning_leaves_the_teacher_of_the_joint_training(warm, finished_runs, tmp_path):
    values = yaml.safe_load(TINY_RECIPE)
    values["strategy"] = {"name": "online"}
    del values["teacher"]["training"]
    values["finetuning"] = {**values["training"], "num_epochs": 1}
    values["control"] = False
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    run = TinyRun(tmp_path / "run", finished_runs["online"].home)
    finished = warm.run("train", path, "--out", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    joint = run.folder / "student-untuned"
    assert file_hash(run.folder / "teacher" / "model.safetensors") == file_hash(
        joint / "teacher.safetensors"
    )
    beside = Record.load(joint).payload["beside"]
    assert run.record("teacher").payload["validation_accuracy"] == beside[0]["validation_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "online", "teacher_kl_weight": 0.2},
        {"name": "ema_teacher", "decay": 0.9},
    ],
    ids=lambda strategy: strategy["name"],
)
def test_two_processes_train_the_networks_of_one(warm, tmp_path, strategy):
    # Each process draws dropout masks of its own, so there is none here.
    values = yaml.safe_load(TINY_RECIPE)
    values |= {"strategy": strategy, "control": False}
    values["student"]["model"]["arguments"] = {"hidden": [16]}
    # AdamW makes a whole step of the rounding of a gradient that is nearly zero.
    values["training"]["optimizer"] = {"name": "sgd", "learning_rate": 0.05}
    values["teacher"] = {"model": {"name": "mlp", "arguments": {"hidden": [32]}}}
    if strategy["name"] != "online":
        del values["teacher"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    found = []
    for number in (1, 2):
        run = TinyRun(tmp_path / f"run{number}", tmp_path / "home")
        arguments = (path, *settings(f"device.num_processes={number}"), "--out", run.folder)
        finished = warm.run("train", *arguments, home=run.home)
        assert finished.code == 0, finished.err
        files = sorted((run.folder / "student").glob("*.safetensors"))
        assert len(files) == 2
        found.append({(p.name, k): v for p in files for k, v in load_file(p).items()})
    one, two = found
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, two[name], rtol=PROCESS_TOLERANCE, atol=PROCESS_TOLERANCE, msg=str(name)
        )

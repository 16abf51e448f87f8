"""Heads that are added to a finished run: the trunk stays, the teacher guides, nothing is lost."""

import json
import shutil
import time

import pytest
import torch
import yaml

from tiny_run import TINY_RECIPE, TinyRun
from understudy.artifacts import Record, file_hash
from understudy.export.task_heads import TrunkRuntime
from understudy.recipes.files import read_recipe
from understudy.recipes.heads import train_heads
from understudy.recipes.job import open_run
from understudy.recipes.schema import parse_recipe

ADD_PARITY = ("--task", "parity", "--label-column", "parity", "--set", "training.num_epochs=6")
GUIDED = ("--set", "teacher=true", "--set", "probe.num_epochs=8")


def add(warm, run, *arguments):
    finished = warm.run("heads", "add", run.folder, *arguments, home=run.home)
    assert finished.code == 0, finished.err
    return finished


def payload(run, task):
    return Record.load(run.folder / "heads" / task).payload


@pytest.fixture(scope="module")
def guided(warm, unbroken, tmp_path_factory):
    """A finished run with a guided head for parity and a plain one. Tests only read it."""
    folder = tmp_path_factory.mktemp("guided")
    run = TinyRun(folder / "run", folder / "home")
    shutil.copytree(unbroken.folder, run.folder)
    shutil.copytree(unbroken.home, run.home)
    add(warm, run, *ADD_PARITY, *GUIDED)
    add(warm, run, "--task", "large", "--label-column", "at_least_5", "--set", "hidden=[16]")
    return run


@pytest.fixture
def guided_copy(guided, tmp_path):
    run = TinyRun(tmp_path / "run", tmp_path / "home")
    shutil.copytree(guided.folder, run.folder)
    shutil.copytree(guided.home, run.home)
    return run


def test_the_student_and_all_that_was_there_stay_as_they_are(unbroken, guided):
    for path in unbroken.folder.rglob("*"):
        if path.is_file() and path.name not in ("recipe.yaml", ".lock"):
            kept = guided.folder / path.relative_to(unbroken.folder)
            assert file_hash(kept) == file_hash(path), path
    recipe = yaml.safe_load((guided.folder / "recipe.yaml").read_text())
    heads = recipe.pop("heads")
    before = yaml.safe_load((unbroken.folder / "recipe.yaml").read_text())
    assert before.pop("heads") == {}
    assert recipe == before
    assert list(heads) == ["parity", "large"]


def test_a_later_head_leaves_trunk_and_earlier_heads_bit_identical(warm, guided_copy):
    kept = [
        path
        for folder in ("trunk", "student", "heads/parity", "heads/large", "embeddings")
        for path in (guided_copy.folder / folder).rglob("*")
        if path.is_file()
    ]
    hashes = {path: file_hash(path) for path in kept}
    add(warm, guided_copy, "--task", "again", "--label-column", "parity")
    assert {path: file_hash(path) for path in kept} == hashes
    trunks = {payload(guided_copy, task)["trunk"] for task in ("parity", "large", "again")}
    assert len(trunks) == 1


def test_a_guided_head_is_trained_again_where_the_teacher_answers_otherwise(
    guided_copy, monkeypatch
):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(guided_copy.home))
    run = open_run(guided_copy.folder, changes=["labelling.precision=bfloat16"])
    train_heads(run)
    assert "heads/large" in run.reused
    assert "heads/parity" not in run.reused


def test_the_files_answer_with_the_accuracy_that_is_reported(guided, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(guided.home))
    run = open_run(guided.folder)
    test_N = run.splits.test
    runtime = TrunkRuntime(guided.folder / "trunk" / "trunk.onnx")
    runtime.add_head("classes", guided.folder / "trunk" / "head_classes.onnx")
    for task in ("parity", "large"):
        runtime.add_head(task, guided.folder / "heads" / task / f"head_{task}.onnx")
    answers = {name: v.argmax(1) for name, v in runtime.answers(run.source.images(test_N)).items()}
    evaluation = guided.record("evaluation").payload["metrics"]["student"]["test"]
    right_N = answers["classes"] == run.source.labels_N[test_N]
    assert right_N.double().mean().item() == pytest.approx(evaluation["accuracy"], abs=1e-9)
    for task, column in (("parity", "parity"), ("large", "at_least_5")):
        names = runtime.tasks[task]
        given = [run.source.metadata[column][index] for index in test_N.tolist()]
        found = [names[number] for number in answers[task].tolist()]
        right = sum(a == b for a, b in zip(given, found, strict=True))
        test = payload(guided, task)["scores"]["head"]["test"]
        assert test["accuracy"] == pytest.approx(right / len(test_N))
        assert test["num_samples"] == len(test_N)
        # It has learnt something: half is chance.
        assert test["accuracy"] > 0.6
    # Agreement with the own head, counted by hand.
    own_parity = [runtime.tasks["parity"].index("odd" if n % 2 else "even") for n in range(10)]
    expected = torch.tensor(own_parity)[answers["classes"]] == answers["parity"]
    consistency = payload(guided, "parity")["scores"]["head"]["test"]["consistency"]
    assert consistency == pytest.approx(expected.double().mean().item())


def test_the_report_beside_the_record_holds_what_it_takes_to_judge(guided):
    report = json.loads((guided.folder / "heads" / "parity" / "report.json").read_text())
    assert report == payload(guided, "parity")
    assert set(report["scores"]) == {"head", "control", "probe"}
    assert report["class_names"] == ["even", "odd"]
    assert report["nesting"] == {"kind": "coarser", "share": 1.0}
    assert set(report["baselines"]["test"]) == {"chance", "majority", "from_classes"}
    # 16 features to 2 classes; the teacher has 32.
    assert report["num_params"] == {"head": 34, "control": 34, "probe": 66}
    assert len(report["rows"]["probe"]) == 8
    steps = [report["rows"][name][-1]["step"] for name in ("head", "control")]
    assert steps[0] == steps[1]
    assert payload(guided, "large")["paired"] is None


def test_the_control_is_the_head_that_no_teacher_guides(warm, guided, copied):
    add(warm, copied, *ADD_PARITY)
    alone, both = payload(copied, "parity"), payload(guided, "parity")
    assert set(alone["scores"]) == {"head"}
    assert alone["rows"]["head"] == both["rows"]["control"]
    assert alone["scores"]["head"] == both["scores"]["control"]
    assert both["rows"]["head"] != both["rows"]["control"]
    assert "kl" in both["rows"]["head"][0]["losses"]


def test_what_is_done_is_reused_and_the_list_shows_it(warm, guided_copy):
    again = add(warm, guided_copy, *ADD_PARITY, *GUIDED)
    assert "heads/parity: unchanged, reused" in again.err
    assert "started" not in again.err
    listed = warm.run("heads", "list", guided_copy.folder, home=guided_copy.home)
    assert listed.out == again.out
    for text in ("head without the teacher", "teacher's probe", "answered from the class alone"):
        assert text in listed.out
    resumed = warm.run("resume", guided_copy.folder, home=guided_copy.home)
    assert resumed.code == 0, resumed.err
    assert "heads/large: unchanged, reused" in resumed.err
    assert "started" not in resumed.err


def test_a_head_can_be_removed(warm, guided_copy):
    run, task = guided_copy, ("--task", "large")
    assert warm.run("heads", "remove", run.folder, *task, home=run.home).code == 0
    assert not (run.folder / "heads" / "large").exists()
    assert list(parse_recipe(read_recipe(run.folder)[0]).heads) == ["parity"]
    again = warm.run("heads", "remove", run.folder, *task, home=run.home)
    assert again.code == 2
    assert "no head for the task 'large'; expected one of parity" in again.err


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("probe", marks=pytest.mark.slow),
        pytest.param("control", marks=pytest.mark.slow),
        "head",
    ],
)
def test_a_killed_training_ends_as_an_unbroken_one(warm, guided, copied, moment):
    start = ("heads", "add", copied.folder, *ADD_PARITY, *GUIDED)
    command = warm.start(*start, home=copied.home)
    metrics = copied.folder / "heads" / "parity" / moment / "metrics.jsonl"
    while command.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.001)
    if command.poll() is None:
        command.kill()
        assert command.wait().code == -9
        assert not (copied.folder / "heads" / "parity" / "record.json").exists()
    finished = warm.run(*start, home=copied.home)
    assert finished.code == 0, finished.err
    found, expected = (Record.load(r.folder / "heads" / "parity") for r in (copied, guided))
    assert found.payload == expected.payload
    assert found.hash == expected.hash


def test_all_that_is_wrong_with_tasks_is_said_before_anything_runs(warm, copied):
    changes = [
        "heads.classes.label_column=parity",
        "heads.a.label_column=pariti",
        "heads.b={label_column: parity, training: {batch_size: 5000}}",
    ]
    arguments = [argument for change in changes for argument in ("--set", change)]
    finished = warm.run("distill", copied.folder, *arguments, home=copied.home)
    assert finished.code == 2
    lines = finished.err.splitlines()
    assert len(lines) == 3, finished.err
    assert "heads.classes is the name of the student's own head" in lines[0]
    assert "which the data has not; expected one of parity, at_least_5" in lines[1]
    assert "Did you mean 'parity'?" in lines[1]
    assert "heads.b.training.batch_size is 5000" in lines[2]
    assert yaml.safe_load((copied.folder / "recipe.yaml").read_text())["heads"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distillation.losses={hint: {}}", "losses.hint is not for heads"),
        ("label_colum=x", "Did you mean `label_column`?"),
        ("training.num_epochs=0", "heads.parity.training.num_epochs"),
    ],
)
def test_a_wrong_setting_of_a_head_is_said(warm, copied, change, message):
    arguments = (*ADD_PARITY, "--set", change)
    finished = warm.run("heads", "add", copied.folder, *arguments, home=copied.home)
    assert finished.code == 2
    assert message in finished.err
    assert "Traceback" not in finished.err


def test_guidance_needs_a_teacher_with_an_embedding(warm, copied):
    finished = warm.run(
        *("heads", "add", copied.folder, *ADD_PARITY, *GUIDED),
        *("--set", "distillation.losses={dkd: {}}"),
        home=copied.home,
    )
    assert finished.code == 0, finished.err
    assert set(payload(copied, "parity")["rows"]["head"][0]["losses"]) == {"kl", "ce", "dkd"}
    recipe = yaml.safe_load(TINY_RECIPE)
    recipe |= {"teacher": None, "strategy": {"name": "mutual"}}
    recipe["heads"] = {"parity": {"label_column": "parity", "teacher": True}}
    path = copied.folder.parent / "mutual.yaml"
    path.write_text(yaml.safe_dump(recipe))
    out = ("--out", copied.folder.parent / "mutual")
    finished = warm.run("distill", path, *out, home=copied.home)
    assert finished.code == 2
    assert (
        "heads.parity.teacher is true, and this recipe's teacher has no embedding" in finished.err
    )


def test_the_shipped_recipe_runs(warm, fresh):
    changes = [
        "teacher.training.num_epochs=1",
        "teacher.training.learning_rate_schedule.warmup_epochs=0",
        "training.num_epochs=1",
        "training.learning_rate_schedule.warmup_epochs=0",
        "views.num_views=1",
        "measurement={min_seconds: 0.01, batch_sizes: [1], num_threads: [1]}",
    ]
    for task in ("parity", "at_least_5"):
        changes += [f"heads.{task}.num_views=1", f"heads.{task}.training.num_epochs=1"]
    changes.append("heads.parity.probe.num_epochs=1")
    arguments = [argument for change in changes for argument in ("--set", change)]
    finished = warm.run("distill", "two_tasks", *arguments, "--out", fresh.folder, home=fresh.home)
    assert finished.code == 0, finished.err
    assert set(payload(fresh, "parity")["scores"]) == {"head", "control", "probe"}
    assert set(payload(fresh, "at_least_5")["scores"]) == {"head"}
    losses = fresh.record("student").payload["rows"][0]["losses"]
    assert "embedding_alignment" in losses

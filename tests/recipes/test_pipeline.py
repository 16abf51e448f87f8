"""From a recipe to a report: stages alone and together, reuse, budget, parity, processes."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import understudy
from tiny_run import STAGES, TINY_RECIPE, TinyRun
from understudy.errors import InputError, RecipeError
from understudy.recipes.outputs import sample_pictures, stored_precision
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.recipes.teach import weights_hash

ALONE = ("teach", "label", "train", "evaluate", "export", "report")

# Sums in another order, over 68 updates: measured 1e-7 on weights of up to 0.5.
PROCESS_TOLERANCE = 1e-5


def started(finished):
    """Return the stages that a command ran, from its log."""
    lines = [line.split(" ", 1)[1] for line in finished.err.splitlines()]
    return [line.removesuffix(": started") for line in lines if line.endswith(": started")]


def reused(finished):
    lines = [line.split(" ", 1)[1] for line in finished.err.splitlines()]
    return [line.split(":")[0] for line in lines if line.endswith(": unchanged, reused")]


def test_stages_alone_give_the_records_of_the_whole_job(warm, tiny_recipe, fresh, unbroken):
    for number, command in enumerate(ALONE):
        recipe = fresh.folder if number else tiny_recipe
        finished = warm.run(command, recipe, "--out", fresh.folder, home=fresh.home)
        assert finished.code == 0, finished.err
    assert fresh.results() == unbroken.results()
    assert "report.html" in finished.out
    again = warm.run("distill", fresh.folder, home=fresh.home)
    assert started(again) == []
    assert reused(again) == list(STAGES)


@pytest.mark.parametrize(
    ("command", "kind", "needed"),
    [
        ("label", "teacher", "teach"),
        ("train", "labels", "label"),
        ("evaluate", "control", "train"),
        ("export", "student", "train"),
        ("report", "evaluation", "evaluate"),
        ("report", "export", "export"),
    ],
)
def test_a_stage_before_its_parent_names_the_command_to_run(warm, copied, command, kind, needed):
    shutil.rmtree(copied.folder / kind)
    finished = warm.run(command, copied.folder, home=copied.home)
    assert finished.code == 2, finished.err
    assert f"has no record of its {kind}" in finished.err
    assert f"understudy {needed} {copied.folder}" in finished.err
    assert "Traceback" not in finished.err


def sampled(labels_N, precision):
    """Return the classes of the pictures that a teacher is prepared with, and its address."""
    train_N = torch.arange(len(labels_N))
    run = SimpleNamespace(
        splits=SimpleNamespace(train=train_N),
        source=SimpleNamespace(labels_N=labels_N, class_names=tuple("abcdefghij")),
        recipe=parse_recipe(yaml.safe_load(TINY_RECIPE) | {"labelling": {"precision": precision}}),
    )
    return labels_N[sample_pictures(run)], stored_precision(run)


def test_a_teacher_is_calibrated_on_every_class_and_old_outputs_stay_in_use():
    shuffled_N, sorted_N = torch.arange(2000) % 10, torch.arange(2000) // 200
    seen_N, precision = sampled(shuffled_N, "int8")
    assert torch.equal(seen_N, shuffled_N[:512])
    assert precision == "int8 of 7-bit weights"
    seen_N, precision = sampled(sorted_N, "int8")
    assert set(torch.bincount(seen_N).tolist()) == {51, 52}
    assert precision == "int8 of 7-bit weights, spread sample"
    # Nothing is calibrated for these.
    assert sampled(sorted_N, "auto")[1] == "float32"
    seen_N, precision = sampled(sorted_N[:512], "int8")
    assert torch.equal(seen_N, sorted_N[:512])
    assert precision == "int8 of 7-bit weights"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("distillation.temperature=2", ["student", "evaluation", "export"]),
        ("measurement.min_seconds=0.06", ["export"]),
        # A teacher that is trained here sees the views as well.
        ("views.num_views=2", ["teacher", "labels", "student", "control", "evaluation", "export"]),
    ],
)
def test_a_change_runs_again_what_depends_on_it(warm, copied, change, expected):
    finished = warm.run("distill", copied.folder, "--set", change, home=copied.home)
    assert finished.code == 0, finished.err
    assert started(finished) == expected
    assert set(started(finished)) | set(reused(finished)) == set(STAGES)


def test_a_setting_that_is_taken_back_trains_nothing_again(warm, copied, unbroken):
    change = ["--set", "distillation.temperature=2"]
    assert warm.run("distill", copied.folder, *change, home=copied.home).code == 0
    assert copied.results() != unbroken.results()
    back = ["--set", f"distillation.temperature={temperature_of(unbroken)}"]
    finished = warm.run("distill", copied.folder, *back, home=copied.home)
    assert finished.code == 0, finished.err
    assert started(finished) == []
    assert copied.results() == unbroken.results()
    kept = sorted(path.name.split("-")[0] for path in (copied.folder / "replaced").iterdir())
    assert kept == ["evaluation", "export", "student"]


def temperature_of(run):
    return yaml.safe_load((run.folder / "recipe.yaml").read_text())["distillation"]["temperature"]


@pytest.mark.parametrize("prefix", ["", "timm:", "transformers:"])
def test_the_weights_of_a_teacher_are_known_by_their_bytes(tmp_path, prefix):
    folder = tmp_path / "teacher"
    folder.mkdir()
    values = yaml.safe_load(TINY_RECIPE)
    model = {"name": f"{prefix}{folder}" if prefix else "mlp"}
    file = folder / "model.safetensors"
    values["teacher"] = {"model": model, "checkpoint": None if prefix else str(file)}
    run = Run(parse_recipe(values), tmp_path / "run", tmp_path / "home")

    def hash_of(content):
        file.write_bytes(content)
        return weights_hash(run, "teacher")

    assert hash_of(b"one") == hash_of(b"one") != hash_of(b"other")


def test_an_unfinished_training_survives_another_setting(warm, copied):
    (copied.folder / "student" / "record.json").unlink()
    change = ["--set", "distillation.temperature=2"]
    finished = warm.run("train", copied.folder, *change, home=copied.home)
    assert "student: made with other settings before, kept in" in finished.err
    [kept] = (copied.folder / "replaced").glob("student-*")
    assert (kept / "checkpoint.pt").exists()


def test_a_folder_without_its_key_is_judged_by_its_record_and_never_deleted(warm, copied):
    (copied.folder / "student" / "key").unlink()
    finished = warm.run("distill", copied.folder, home=copied.home)
    assert started(finished) == []
    (copied.folder / "student" / "record.json").unlink()
    (copied.folder / "student" / "mine.txt").write_text("of a user")
    assert warm.run("train", copied.folder, home=copied.home).code == 0
    assert (copied.folder / "replaced" / "student-unknown" / "mine.txt").exists()


def test_the_number_of_threads_is_no_reason_to_train_again(warm, copied):
    finished = warm.run("distill", copied.folder, "--set", "device.num_threads=2", home=copied.home)
    assert finished.code == 0, finished.err
    assert started(finished) == []


def test_a_report_of_records_that_do_not_belong_together_is_refused(warm, copied):
    change = ["--set", "distillation.temperature=2"]
    assert warm.run("train", copied.folder, *change, home=copied.home).code == 0
    finished = warm.run("report", copied.folder, home=copied.home)
    assert finished.code == 2
    assert "the evaluation was made from an earlier student" in finished.err
    assert f"understudy evaluate {copied.folder}" in finished.err


def test_a_missed_budget_is_exit_code_3_with_the_report_written(warm, copied):
    page = copied.folder / "report" / "report.html"
    page.unlink()
    change = ["--set", "budget={num_params: 10}"]
    finished = warm.run("distill", copied.folder, *change, home=copied.home)
    assert finished.code == 3, finished.err
    assert str(page) in finished.out
    assert page.exists()
    rows = json.loads((page.parent / "report.json").read_text())["results"]["budget"]
    assert [(row["name"], row["status"]) for row in rows] == [("num_params", "failed")]
    assert warm.run("report", copied.folder, home=copied.home).code == 3


def test_a_failed_parity_fails_the_run(warm, copied):
    change = ["--set", "export.parity_tolerance=1e-12"]
    finished = warm.run("distill", copied.folder, *change, home=copied.home)
    assert finished.code == 1, finished.err
    assert "differs from the trained model" in finished.err
    assert "Traceback" not in finished.err
    assert not (copied.folder / "export" / "record.json").exists()
    mended = ["--set", "export.parity_tolerance=1e-3"]
    assert warm.run("export", copied.folder, *mended, home=copied.home).code == 0


def test_a_student_that_does_not_learn_ends_with_what_to_change(warm, copied):
    change = ["--set", "training.optimizer={name: sgd, learning_rate: 1e30}"]
    finished = warm.run("train", copied.folder, *change, home=copied.home)
    assert finished.code == 1, finished.err
    assert "training.optimizer.learning_rate" in finished.err
    assert "Traceback" not in finished.err


def test_the_same_job_through_python(copied, unbroken, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(copied.home))
    for stage in ("student", "evaluation"):
        shutil.rmtree(copied.folder / stage)
    values = yaml.safe_load(TINY_RECIPE)
    outcome = understudy.distill(values, out=copied.folder)
    assert copied.results() == unbroken.results()
    assert outcome.page == copied.folder / "report" / "report.html"
    assert not outcome.budget_missed
    assert outcome.results.metrics["student"]["test"].accuracy > 0.3
    # A recipe object is taken as well, and a run folder.
    for recipe in (understudy.Recipe.model_validate(values), copied.folder):
        again = understudy.distill(recipe, out=copied.folder)
        assert again.results.metrics == outcome.results.metrics


def test_python_raises_what_the_command_prints(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    with pytest.raises(RecipeError, match="`student` is missing"):
        understudy.distill({"teacher": {"model": {"name": "mlp"}, "training": {}}})
    with pytest.raises(InputError, match="has no record of its split"):
        understudy.stages.report(yaml.safe_load(TINY_RECIPE), out=tmp_path / "run")


@pytest.fixture
def loaded_teacher(unbroken):
    """Changes that load the finished run's teacher instead of training one."""
    path = unbroken.folder / "teacher" / "model.safetensors"
    changes = ("teacher.training=null", f"teacher.checkpoint={path}", "control=false")
    return [argument for change in changes for argument in ("--set", change)]


@pytest.mark.slow
def test_two_processes_train_the_student_of_one(warm, tiny_recipe, loaded_teacher, tmp_path):
    # Each process draws dropout masks of its own, so there is none here.
    plain = ["--set", "student.model.arguments={hidden: [16]}"]
    weights, rows = [], []
    for num_processes in (1, 2):
        run = TinyRun(tmp_path / f"run{num_processes}", tmp_path / "home")
        recipe = tiny_recipe
        for command in ("teach", "label", "train"):
            finished = warm.run(
                *(command, recipe, *loaded_teacher, *plain),
                *("--set", f"device.num_processes={num_processes}", "--out", run.folder),
                home=run.home,
            )
            assert finished.code == 0, finished.err
        weights.append(load_file(run.folder / "student" / "model.safetensors"))
        rows.append(run.rows("student"))
    for name, value in weights[0].items():
        torch.testing.assert_close(
            value, weights[1][name], rtol=PROCESS_TOLERANCE, atol=PROCESS_TOLERANCE
        )
    for one, two in zip(*rows, strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=PROCESS_TOLERANCE)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-4)
        assert one["train_accuracy"] == pytest.approx(two["train_accuracy"], abs=1e-9)

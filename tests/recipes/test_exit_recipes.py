"""Early exits and deep-to-shallow self-distillation: whole runs, other targets, bad recipes."""

import json
import shutil
import time

import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_run import TINY_RECIPE, TinyRun
from understudy.artifacts import file_hash
from understudy.errors import RecipeError
from understudy.evaluate.exit_policy import ExitPolicy, apply_policy, confidences, leave_at
from understudy.export.exits import run_choice
from understudy.export.onnx_run import open_session, run_images
from understudy.recipes.check import check_recipe
from understudy.recipes.exit_training import trained_exits, with_exits
from understudy.recipes.exits import all_exit_logits
from understudy.recipes.files import shipped_recipe
from understudy.recipes.networks import build_model
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.train.objective import LabelObjective
from understudy.train.plan import TrainPlan

SHRUNK = (
    "training.num_epochs=3",
    "training.learning_rate_schedule.warmup_epochs=0",
    "views.num_views=2",
    "student.model.arguments={stages: [[16, 1], [24, 1], [24, 2], [32, 1]]}",
    "measurement={min_seconds: 0.02, batch_sizes: [1], num_threads: [1]}",
)
TEACHER = (
    "teacher.model={name: mlp, arguments: {hidden: [32]}}",
    "teacher.training.num_epochs=3",
)


def settings(*changes):
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture(scope="module")
def finished(warm, tmp_path_factory):
    """A whole run of the shipped recipe, shrunk; tests only read it."""
    folder = tmp_path_factory.mktemp("exits")
    run = TinyRun(folder / "run", folder / "home")
    changes = settings(*SHRUNK, *TEACHER)
    done = warm.run("distill", "early_exits", *changes, "--out", run.folder, home=run.home)
    assert done.code == 0, done.err
    return run


@pytest.fixture
def opened(finished):
    """The finished run with its data."""
    recipe = parse_recipe(yaml.safe_load((finished.folder / "recipe.yaml").read_text()))
    return Run(recipe, finished.folder, finished.home)


def copy_of(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    return TinyRun(tmp_path / "run", run.home)


def test_the_record_is_what_the_stored_heads_give(finished, opened):
    record = finished.record("exits")
    payload = record.payload
    network = trained_exits(opened, finished.record("student"))
    assert payload["layers"] == ["blocks.0", "blocks.1", "last"] == [*network.layers, "last"]
    policy = ExitPolicy(*(tuple(payload["policy"][key]) for key in ("thresholds", "temperatures")))
    for name in ("validation", "test"):
        indices_N = getattr(opened.splits, name)
        labels_N = opened.source.labels_N[indices_N]
        logits_ENK = all_exit_logits(opened, network, indices_N)
        outcome = apply_policy(policy, logits_ENK, labels_N, payload["macs"]).to_json()
        assert json.loads(json.dumps(outcome)) == payload["outcomes"][name]
    validation = payload["outcomes"]["validation"]
    allowed = payload["accuracies"]["validation"][-1] - 0.005
    assert validation["accuracy"] >= allowed
    assert validation["mean_cost"] <= payload["macs"][-1]
    assert payload["macs"] == sorted(payload["macs"])
    assert min(payload["accuracies"]["test"]) > 0.13  # of ten classes, after few updates
    assert len(record.timing["latency"]["exit_ms"]) == 3


def test_the_files_decide_and_answer_as_the_stored_heads(finished, opened):
    folder, payload = finished.folder / "exits", finished.record("exits").payload
    network = trained_exits(opened, finished.record("student"))
    indices_N = opened.splits.test[:40]
    images_NCHW = opened.source.images(indices_N)
    logits_ENK = all_exit_logits(opened, network, indices_N)
    session = open_session(folder / "student_exits.onnx")
    expected_N = leave_at(
        confidences(logits_ENK, payload["policy"]["temperatures"]),
        payload["policy"]["thresholds"],
    )
    found = [run_choice(session, image[None])[1] for image in images_NCHW]
    assert found == expected_N.tolist()
    for number, row in enumerate(payload["files"]):
        assert row["parity"]["passed"]
        answer_NK = run_images(open_session(folder / row["name"]), images_NCHW)
        torch.testing.assert_close(answer_NK, logits_ENK[number], rtol=1e-3, atol=1e-3)
    # As every file of the run, they name what made the student.
    named = session.get_modelmeta().custom_metadata_map["understudy.recipe_hash"]
    assert named == finished.record("student").key
    sizes = [row["num_params"] for row in payload["files"]]
    assert sizes == sorted(set(sizes))
    parity = payload["choice"]["parity"]
    assert parity["passed"]
    assert parity["num_same_exit"] + parity["num_near"] == parity["num_images"]


def test_the_student_file_and_the_control_are_plain_networks(finished):
    student = load_file(finished.folder / "student" / "model.safetensors")
    control = load_file(finished.folder / "control" / "model.safetensors")
    assert student.keys() == control.keys()
    assert {name.split(".")[0] for name in student} == {"network"}
    heads = load_file(finished.folder / "student" / "exits.safetensors")
    assert {name.split(".")[0] for name in heads} == {"0", "1"}
    assert set(finished.record("student").files) == {"model.safetensors", "exits.safetensors"}
    assert set(finished.record("control").files) == {"model.safetensors"}
    assert "exits" not in finished.record("control").recipe
    assert finished.record("export").payload["parity"]["passed"]
    session = onnxruntime.InferenceSession(finished.folder / "export" / "student.onnx")
    assert [value.name for value in session.get_outputs()] == ["logits"]


def test_the_report_shows_the_curve_and_every_exit(finished):
    report = finished.folder / "report"
    facts = json.loads((report / "report.json").read_text())["results"]["exits"]
    assert [row["layer"] for row in facts["exits"]] == ["blocks.0", "blocks.1", "last"]
    assert sum(row["share"] for row in facts["exits"]) == pytest.approx(1)
    assert facts["exits"][-1]["threshold"] is None
    assert len(facts["curve"]) > 1
    page = (report / "report.html").read_text()
    assert '<h2 id="exits">Early exits</h2>' in page
    assert '<a href="#exits">Early exits</a>' in page
    assert 'id="chart-exits"' in page
    assert "blocks.1" in page
    text = (report / "report.md").read_text()
    assert "## Early exits" in text
    assert "| 1 | blocks.1 |" in text
    assert "points below the last exit" in text


def test_another_target_is_a_matter_of_one_stage(warm, finished, tmp_path):
    run = copy_of(finished, tmp_path)
    limit = 20 * run.record("exits").timing["latency"]["exit_ms"][-1]
    target = settings("exits.policy.target=mean_latency_ms", f"exits.policy.at_most={limit}")
    done = warm.run("exits", run.folder, *target, home=run.home)
    assert done.code == 0, done.err
    assert "exits: started" in done.err
    assert "mean_latency_ms of at most" in done.out
    assert "blocks.0" in done.out
    payload = run.record("exits").payload
    assert payload["target"] == ["mean_latency_ms", limit]
    # Any time will do: then it is the most accurate policy that counts.
    validation = payload["outcomes"]["validation"]["accuracy"]
    assert validation >= payload["accuracies"]["validation"][-1]
    again = warm.run("distill", run.folder, home=run.home)
    assert again.code == 0, again.err
    assert ": started" not in again.err  # the student does not depend on the policy


def test_a_target_out_of_reach_is_told_before_anything_runs(warm, finished, tmp_path):
    run = copy_of(finished, tmp_path)
    first = run.record("exits").payload["macs"][0]
    target = settings("exits.policy.target=mean_macs", "exits.policy.at_most=100")
    done = warm.run("exits", run.folder, *target, home=run.home)
    assert done.code == 2
    assert "exits.policy asks for mean_macs of at most 100" in done.err
    assert f"between {first:,} and" in done.err
    assert "Traceback" not in done.err


def test_exits_of_a_student_without_or_with_other_heads_are_refused(warm, finished, tmp_path):
    run = copy_of(finished, tmp_path)
    done = warm.run("exits", run.folder, *settings("exits.layers=[blocks.0]"), home=run.home)
    assert done.code == 2
    assert "the student was trained with other side heads" in done.err
    assert "understudy distill" in done.err
    done = warm.run("exits", run.folder, *settings("exits=null"), home=run.home)
    assert done.code == 2
    assert "has no exits; expected a section exits with layers" in done.err


def checked(tmp_path, **changes):
    values = yaml.safe_load(TINY_RECIPE) | changes
    check_recipe(Run(parse_recipe(values), tmp_path / "run", tmp_path / "home"))


def test_bad_exits_are_told_before_anything_runs(tmp_path):
    with pytest.raises(RecipeError) as caught:
        checked(tmp_path, exits={"layers": ["layer.1", "embedding"]})
    text = str(caught.value)
    assert "exits.layers: 'embedding' is what the last exit reads" in text
    assert "no layer 'layer.1' to tap" in text
    assert "layers.1 [16]" in text
    with pytest.raises(RecipeError, match=r"0\.005 is half a point"):
        checked(tmp_path, exits={"layers": ["layers.1"], "policy": {"at_most": 1}})
    with pytest.raises(RecipeError, match=r"unknown key `exits\.policy\.tarket`"):
        checked(tmp_path, exits={"layers": ["layers.1"], "policy": {"tarket": "mean_macs"}})
    own = {"name": "deep_to_shallow", "layers": ["layers.2"]}
    with pytest.raises(RecipeError, match="expected the same layers"):
        checked(tmp_path, strategy=own, teacher=None, exits={"layers": ["layers.1"]})
    taught = {"ce_weight": 0, "last_weight": 0, "teacher_weight": 1}
    untaught = {"layers": ["layers.1"], "guidance": taught}
    model = yaml.safe_load(TINY_RECIPE)["teacher"]["model"]
    online = {"strategy": {"name": "online"}, "teacher": {"model": model}}
    with pytest.raises(RecipeError, match="only teacher_weight, and there is no trained teacher"):
        checked(tmp_path, **online, exits=untaught)
    compiled = {**yaml.safe_load(TINY_RECIPE)["training"], "compile": True}
    with pytest.raises(RecipeError, match=r"compile together with strategy\.hint_weight"):
        checked(tmp_path, strategy=own, teacher=None, training=compiled)


def test_side_heads_smooth_labels_as_the_training_that_they_are_in(tmp_path):
    values = yaml.safe_load(TINY_RECIPE) | {"exits": {"layers": ["layers.1"]}}
    values["training"]["label_smoothing"] = 0.2
    run = Run(parse_recipe(values), tmp_path, tmp_path)
    for smoothing in (0.2, 0.05):  # of the recipe's training, and of finetuning
        settings = run.recipe.training.model_copy(update={"label_smoothing": smoothing})
        plan = TrainPlan(None, LabelObjective(smoothing), settings, None, tmp_path)
        _, found = with_exits(run, "student", build_model(run, "student"), plan)
        assert found.objective.label_smoothing == smoothing


@pytest.fixture(scope="module")
def self_taught(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("self")
    run = TinyRun(folder / "run", folder / "home")
    changes = (*SHRUNK, "training.num_epochs=2", "training.checkpoint_every_steps=5")
    out = ("--out", run.folder)
    done = warm.run("distill", "deep_to_shallow", *settings(*changes), *out, home=run.home)
    assert done.code == 0, done.err
    return run


def test_deep_to_shallow_has_no_teacher_and_ships_no_heads(self_taught):
    run = self_taught
    assert not (run.folder / "teacher").exists()
    assert not (run.folder / "exits").exists()
    losses = run.rows("student")[-1]["losses"]
    assert losses.keys() == {"ce", "exit_ce", "exit_last", "exit_hint"}
    assert run.rows("control")[-1]["losses"].keys() == {"ce"}
    results = json.loads((run.folder / "report" / "report.json").read_text())["results"]
    assert set(results["metrics"]) == {"student", "control"}
    assert results["exits"] is None
    assert "Early exits" not in (run.folder / "report" / "report.html").read_text()


def test_a_killed_deep_to_shallow_ends_as_an_unbroken_one(warm, self_taught, tmp_path):
    run = TinyRun(tmp_path / "run", self_taught.home)
    command = warm.start("train", self_taught.folder, "--out", run.folder, home=run.home)
    while not list(run.folder.glob("student/checkpoint.pt")) and command.poll() is None:
        time.sleep(0.01)
    command.kill()
    command.wait()
    done = warm.run("train", run.folder, home=run.home)
    assert done.code == 0, done.err
    for name in ("model.safetensors", "exits.safetensors"):
        expected = file_hash(self_taught.folder / "student" / name)
        assert file_hash(run.folder / "student" / name) == expected
    assert run.rows("student") == self_taught.rows("student")


def test_deep_to_shallow_with_exits_goes_on_with_its_heads_in_finetuning(warm, tmp_path):
    values = yaml.safe_load(shipped_recipe("deep_to_shallow"))
    values |= {"exits": {"layers": ["blocks.0", "blocks.1"], "head_channels": 8}, "control": False}
    values["finetuning"] = {**values["training"], "num_epochs": 1}
    values["finetuning"]["learning_rate_schedule"] = {}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    run = TinyRun(tmp_path / "run", tmp_path / "home")
    changes = settings(*SHRUNK, "training.num_epochs=1")
    done = warm.run("train", path, *changes, "--out", run.folder, home=run.home)
    assert done.code == 0, done.err
    untuned = load_file(run.folder / "student-untuned" / "exits.safetensors")
    tuned = load_file(run.folder / "student" / "exits.safetensors")
    assert untuned.keys() == tuned.keys()
    assert not all(torch.equal(untuned[name], tuned[name]) for name in tuned)
    assert untuned["0.hidden.0.weight"].shape[0] == 8

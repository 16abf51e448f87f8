"""A student that is trained already is taken as it is: the run proves it and compresses it."""

import pytest
import yaml

import understudy
from tiny_run import TINY_RECIPE
from understudy.artifacts import Record, file_hash
from understudy.errors import RecipeError
from understudy.recipes import further_training
from understudy.recipes.compress import step_section
from understudy.recipes.networks import build_model
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.train.distillation import DistillObjective
from understudy.train.objective import LabelObjective


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDERSTUDY_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def given(unbroken, tiny_recipe, tmp_path_factory):
    checkpoint = unbroken.folder / "student" / "model.safetensors"
    changes = [f"student.checkpoint={checkpoint}", "control=false"]
    out = tmp_path_factory.mktemp("given") / "run"
    return understudy.distill(str(tiny_recipe), changes=changes, out=out), out


def test_it_has_the_accuracy_and_weights_it_came_with(given, unbroken):
    outcome, folder = given
    before = Record.load(unbroken.folder / "evaluation").payload["metrics"]["student"]["test"]
    assert outcome.results.test("student").accuracy == before["accuracy"]
    record = Record.load(folder / "student")
    assert record.payload["num_steps"] == 0
    weights = "student/model.safetensors"
    assert file_hash(folder / weights) == file_hash(unbroken.folder / weights)


def test_where_the_file_lies_does_not_matter_but_what_is_in_it(given, unbroken, tmp_path):
    _, folder = given
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes((unbroken.folder / "student" / "model.safetensors").read_bytes())
    key = Record.load(folder / "student").key
    understudy.distill(str(folder), changes=[f"student.checkpoint={copy}"], out=folder)
    assert Record.load(folder / "student").key == key


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["student.checkpoint=nowhere.pt", "control=false"], "student.checkpoint is nowhere.pt"),
        (["student.checkpoint=nowhere.pt"], "set control to false"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(tiny_recipe, tmp_path, changes, text):
    with pytest.raises(RecipeError, match=text):
        understudy.distill(str(tiny_recipe), changes=changes, out=tmp_path / "run")
    assert not (tmp_path / "run" / "split").exists()


def test_weights_of_another_network_are_refused(unbroken, tiny_recipe, tmp_path):
    changes = [
        f"student.checkpoint={unbroken.folder / 'teacher' / 'model.safetensors'}",
        "control=false",
    ]
    with pytest.raises(RecipeError, match="checkpoint"):
        understudy.distill(str(tiny_recipe), changes=changes, out=tmp_path / "run")


FURTHER = {"num_epochs": 1, "batch_size": 64, "optimizer": {"name": "adamw"}}


@pytest.fixture
def further_run(tmp_path):
    """A run whose student is pruned and trained further, with labels smoothed in either training.

    ``own`` is the step's smoothing, and the first argument that of the student's training.
    """

    def make(smoothing, own=0.0, guidance=None, checkpoint="student.safetensors", trains=True):
        values = yaml.safe_load(TINY_RECIPE) | {"control": False}
        values["training"]["label_smoothing"] = smoothing
        values["student"]["checkpoint"] = checkpoint
        training = FURTHER | {"label_smoothing": own} if trains else None
        prune = {"name": "prune", "num_macs": 9, "guidance": guidance, "training": training}
        values["compression"] = {"steps": [prune]}
        return Run(parse_recipe(values), tmp_path, tmp_path)

    return make


def section_of(run):
    (step,) = run.recipe.compression.steps
    return step_section(run, step, run.recipe.compression.gates)


def test_steps_that_go_on_from_it_depend_on_their_own_smoothing_alone(further_run):
    assert section_of(further_run(0.1, own=0.0)) != section_of(further_run(0.1, own=0.1))
    for options in ({}, {"guidance": "labels"}, {"trains": False}):
        assert section_of(further_run(0.0, **options)) == section_of(further_run(0.1, **options))


def test_steps_that_were_made_with_another_smoothing_are_made_again(further_run):
    """Guided steps once had the smoothing of the student's training instead of their own."""
    for checkpoint in (None, "student.safetensors"):
        for own in (0.0, 0.1):
            assert section_of(further_run(0.1, own, checkpoint=checkpoint)).get(
                "label_smoothing"
            ) == (own if checkpoint or own != 0.1 else None)
    for unread in ({"guidance": "labels"}, {"trains": False}):
        assert "label_smoothing" not in section_of(further_run(0.1, **unread))


@pytest.mark.parametrize("guidance", [None, "labels"])
def test_a_step_smooths_labels_as_its_own_training_says(further_run, monkeypatch, guidance):
    monkeypatch.setattr(further_training, "teacher_source", lambda run: None)
    run = further_run(0.1, own=0.3, guidance=guidance)
    (step,) = run.recipe.compression.steps
    model = build_model(run, "student")
    plan = further_training.further_plan(run, model, step, phase="prune-1", folder=run.folder)
    assert isinstance(plan.objective, LabelObjective if guidance else DistillObjective)
    assert plan.objective.label_smoothing == 0.3

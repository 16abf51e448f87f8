"""A student that is trained already is taken as it is: the run proves it and compresses it."""

import pytest
import yaml

import understudy
from tiny_run import TINY_RECIPE
from understudy.artifacts import Record, file_hash
from understudy.errors import RecipeError
from understudy.recipes.compress import step_section
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe


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


def test_steps_that_go_on_from_it_depend_on_how_its_labels_are_smoothed(tmp_path):
    """Of a student that is trained here that is in its own record, and of this one nowhere."""
    further = {"num_epochs": 1, "batch_size": 64, "optimizer": {"name": "adamw"}}

    def section(smoothing, guidance=None, training=further, checkpoint="student.safetensors"):
        values = yaml.safe_load(TINY_RECIPE) | {"control": False}
        values["training"]["label_smoothing"] = smoothing
        values["student"]["checkpoint"] = checkpoint
        prune = {"name": "prune", "num_macs": 9, "guidance": guidance, "training": training}
        values["compression"] = {"steps": [prune]}
        recipe = parse_recipe(values)
        (step,) = recipe.compression.steps
        return step_section(Run(recipe, tmp_path, tmp_path), step, recipe.compression.gates)

    assert section(0.0) != section(0.1)
    for unread in ({"guidance": "labels"}, {"training": None}, {"checkpoint": None}):
        assert section(0.0, **unread) == section(0.1, **unread)

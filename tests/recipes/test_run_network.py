"""`understudy profile` of a run's networks: those that were trained, with their own pictures."""

import re
from types import SimpleNamespace

import pytest
import torch

from understudy.artifacts import Record
from understudy.errors import InputError
from understudy.evaluate.eager import EagerModel
from understudy.evaluate.profile import profile_command
from understudy.recipes.job import open_run
from understudy.recipes.networks import trained_model
from understudy.recipes.run_network import run_network


@pytest.fixture(autouse=True)
def home(unbroken, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_HOME", str(unbroken.home))


@pytest.mark.parametrize("role", ["student", "teacher", "control"])
def test_a_runs_network_has_its_trained_weights(unbroken, tmp_path, role):
    named = unbroken.folder if role == "student" else unbroken.folder / role
    file = run_network(str(named), tmp_path)
    assert file.label == f"eager run-{role}.eager.json"
    network = EagerModel(file.path)
    assert network.facts["image_shape"] == [1, 8, 8]
    assert network.facts["num_classes"] == 10
    run = open_run(unbroken.folder)
    expected = trained_model(run, role, run.parent(role, "train"))
    images_NCHW = run.source.images(run.splits.test[:50]).float() / 255
    with torch.no_grad():
        assert torch.equal(network.model(images_NCHW), expected(images_NCHW))


def test_a_recipes_student_is_built_for_its_data(unbroken, tmp_path):
    recipe = tmp_path / "other.yaml"
    recipe.write_text((unbroken.folder / "recipe.yaml").read_text())
    file = run_network(str(recipe), tmp_path / "eager")
    network = EagerModel(file.path)
    assert network.facts["weights"] == "as built"
    assert network.model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_in_a_runs_folder_names_mean_what_they_mean_elsewhere(unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(unbroken.folder)
    for name in ("resnet20", "module:callable", "techer", "report"):
        assert run_network(name, tmp_path) is None
    assert run_network("teacher", tmp_path).label == "eager run-teacher.eager.json"


def test_files_and_names_are_left_to_others(unbroken, tmp_path):
    exported = unbroken.folder / "export"
    for text in ("resnet20", "module:callable", str(exported), str(exported / "student.onnx")):
        assert run_network(text, tmp_path) is None
    payload = {"target": "onnx", "precision": "float32", "files": ["student.onnx"]}
    artifact = tmp_path / "artifact-onnx-float32"
    (tmp_path / "recipe.yaml").write_text("not read")
    Record(kind="artifact-onnx-float32", key="key", seed=0, payload=payload).save(artifact)
    assert run_network(str(artifact), tmp_path) is None


def test_the_command_shows_the_operators_of_a_runs_student(unbroken, warm):
    finished = warm.run("profile", unbroken.folder, "--batch", "2", home=unbroken.home)
    assert finished.code == 0, finished.err
    assert "run in eager PyTorch, one batch of 2" in finished.out
    assert re.search(r"^linear +[\d.]+ +[\d.]+% +2 ", finished.out, re.MULTILINE)


def test_what_a_run_is_compared_with(unbroken, monkeypatch):
    seen = []

    def measured(target, file, other, image_shape, settings, **options):
        seen.append((file.label, other.label, image_shape))
        return SimpleNamespace(to_text=str)

    monkeypatch.setattr("understudy.evaluate.profile._measured", measured)
    teacher = unbroken.folder / "teacher"
    for against in (str(teacher), "mlp", "onnx"):
        profile_command(str(unbroken.folder), against=against, find_network=run_network)
    others = ["eager run-teacher.eager.json", "eager mlp.eager.json", "onnx student.onnx"]
    assert seen == [("eager run-student.eager.json", other, (1, 8, 8)) for other in others]


def test_what_a_run_does_not_have_is_one_clear_error(unbroken, copied, tmp_path):
    for name, text in (
        ("techer", r"no network 'techer' \(did you mean 'teacher'\?\).*student, control, teacher"),
        ("student/nothing", "no file"),
    ):
        with pytest.raises(InputError, match=text):
            profile_command(str(unbroken.folder / name), find_network=run_network)
    (copied.folder / "student" / "record.json").unlink()
    with pytest.raises(InputError, match=r"no record of its student.*understudy train"):
        run_network(str(copied.folder), tmp_path)
    weights = copied.folder / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"changed or missing files: model\.safetensors"):
        run_network(str(copied.folder / "teacher"), tmp_path)


def test_another_shape_than_the_runs_is_refused(unbroken):
    with pytest.raises(InputError, match=r"pictures are \(3, 8, 8\) and those of .* \(1, 8, 8\)"):
        profile_command(str(unbroken.folder), shape="3,8,8", find_network=run_network)
    with pytest.raises(InputError, match="--runtime onnx with the network"):
        profile_command(str(unbroken.folder), runtime="onnx", find_network=run_network)

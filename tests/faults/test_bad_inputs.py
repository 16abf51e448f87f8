"""What users give that cannot work: one clear error a problem, exit code 2, nothing written."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tiny_run import TINY_RECIPE


def assert_refused(finished, *, num_problems=1):
    """Exit code 2 and so many lines that each say what is wrong; no traceback."""
    assert finished.code == 2, finished.err
    assert "Traceback" not in finished.err
    lines = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == num_problems, finished.err
    return "\n".join(lines)


def with_checkpoint(path):
    return ["--set", "teacher.training=null", "--set", f"teacher.checkpoint={path}"]


def test_a_recipe_with_five_mistakes_lists_five_problems(warm, fresh, tmp_path):
    recipe = tmp_path / "wrong.yaml"
    text = TINY_RECIPE.replace("num_epochs: 4", "num_epoch: 4")  # unknown key
    text = text.replace("seed: 3", "seed: three")  # wrong type
    text = text.replace("min_seconds: 0.05", "min_seconds: -1")  # impossible value
    text = text.replace("source: digits", "source: ./absent")  # missing file
    recipe.write_text(text.replace("padding: 1", "paddin: 1"))  # a transform's parameter
    finished = warm.run("distill", recipe, "--out", fresh.folder, home=fresh.home)
    errors = assert_refused(finished, num_problems=5)
    for words in (
        "unknown key `training.num_epoch`",
        "Did you mean `num_epochs`?",
        "`seed` is 'three'",
        "`measurement.min_seconds` is -1",
        "data.source is ./absent",
        "paddin",
    ):
        assert words in errors
    assert not fresh.folder.exists()
    assert not fresh.home.exists()


def test_a_checkpoint_of_another_architecture_names_what_does_not_fit(
    warm, tiny_recipe, fresh, tmp_path
):
    path = tmp_path / "other.safetensors"
    save_file({"layers.1.weight": torch.zeros(64, 64), "conv.weight": torch.zeros(3, 3)}, path)
    finished = warm.run(
        "distill", tiny_recipe, *with_checkpoint(path), "--out", fresh.folder, home=fresh.home
    )
    assert finished.code == 2, finished.err
    assert "Traceback" not in finished.err
    assert "layers.1.weight" in finished.err
    assert "[64, 64]" in finished.err
    assert "[32, 64]" in finished.err
    assert not fresh.folder.exists()


class RunsCode:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(warm, tiny_recipe, fresh, tmp_path, form):
    proof, path = tmp_path / "it_ran", tmp_path / "hostile.pt"
    values = {"state_dict": {"layers.1.weight": RunsCode(str(proof))}}
    if form == "torch":
        torch.save(values, path)
    else:
        path.write_bytes(pickle.dumps(values))
    finished = warm.run(
        "distill", tiny_recipe, *with_checkpoint(path), "--out", fresh.folder, home=fresh.home
    )
    assert str(path) in assert_refused(finished)
    assert not proof.exists()


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of noisy bright and dark pictures, one of them broken."""
    generator = np.random.default_rng(0)
    for name, level in (("bright", 170), ("dark", 60)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(80):
            pixels = generator.integers(level - 50, level + 50, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
    broken = tmp_path / "images" / "dark" / "07.png"
    broken.write_bytes(broken.read_bytes()[:40])
    return tmp_path / "images"


def test_a_broken_picture_stops_the_run_or_is_skipped_and_listed(
    warm, tiny_recipe, fresh, image_folder
):
    changes = ["--set", f"data.source={image_folder}", "--set", "training.batch_size=16"]
    changes += ["--set", "teacher.training.batch_size=16", "--set", "control=false"]
    start = ["distill", tiny_recipe, *changes, "--out", fresh.folder]
    errors = assert_refused(warm.run(*start, home=fresh.home), num_problems=2)
    assert "row 87 of train: dark/07.png: broken image" in errors
    assert not fresh.folder.exists()
    finished = warm.run(*start, "--set", "data.on_bad=skip", home=fresh.home)
    assert finished.code == 0, finished.err
    split = fresh.record("split").payload
    assert sum(split["num_samples"].values()) == 159
    assert [issue["kind"] for issue in split["issues"]] == ["broken_image"]
    assert "07.png" in (fresh.folder / "report" / "report.html").read_text()


CLUMSY = {
    "no such recipe": (["distill", "/not/there/recipe.yaml"], "there is no recipe at"),
    "no such shipped recipe": (["distill", "digit"], "no shipped recipe named digit"),
    "a folder that is no run": (["distill", "FOLDER"], "there is no recipe at"),
    "an empty recipe": (["distill", "EMPTY"], "holds NoneType"),
    "a binary as recipe": (["distill", "BINARY"], "cannot be read"),
    "out is a file": (["distill", "RECIPE", "--out", "EMPTY"], "is a file"),
    "out is below a file": (["distill", "RECIPE", "--out", "EMPTY/run"], "is a file"),
    "set without a value": (["distill", "RECIPE", "--set", "seed"], "path.to.key=value"),
    "set without a key": (["distill", "RECIPE", "--set", "=3"], "path.to.key=value"),
    "set of an unknown key": (["distill", "RECIPE", "--set", "sed=1"], "Did you mean `seed`?"),
    "set into a number": (["distill", "RECIPE", "--set", "seed.x=1"], "`seed` is"),
    "set of broken YAML": (["distill", "RECIPE", "--set", "seed=["], "is not YAML"),
    "set of a wrong type": (["distill", "RECIPE", "--set", "training.num_epochs=x"], "num_epochs"),
    "set of a section": (["distill", "RECIPE", "--set", "teacher=5"], "a mapping of keys"),
    "set past a list": (["distill", "RECIPE", "--set", "views.transforms.7=x"], "list of 2"),
    "data is a recipe": (["distill", "RECIPE", "--set", "data.source=RECIPE"], "is no data set"),
    "data is an empty folder": (["distill", "RECIPE", "--set", "data.source=FOLDER"], "no data"),
    "data that is yours to give": (
        ["distill", "cifar10", "--set", "teacher.checkpoint=EMPTY"],
        "--set data.source=FOLDER_OR_NAME",
    ),
    "checkpoint is a folder": (
        ["distill", "RECIPE", *with_checkpoint("FOLDER")],
        "which is a folder",
    ),
    "checkpoint is a recipe": (["distill", "RECIPE", *with_checkpoint("RECIPE")], ".safetensors"),
    "resume nothing": (["resume", "FOLDER"], "is not a run folder"),
    "resume a file": (["resume", "EMPTY"], "is not a run folder"),
    "label nothing": (["label", "FOLDER"], "there is no recipe at"),
    "no such store": (["store", "verify", "--store", "/not/there"], "is no folder"),
    "gc of everything": (["store", "gc"], "--older-than-days or --incomplete"),
    "copy over a file": (["recipes", "copy", "digits", "EMPTY"], "exists"),
    "show nothing": (["recipes", "show", "digit"], "no shipped recipe"),
    "batch too large": (["distill", "RECIPE", "--set", "training.batch_size=5000"], "batch_size"),
}


@pytest.mark.parametrize("name", CLUMSY)
def test_a_clumsy_command_gives_one_clear_error(warm, tiny_recipe, tmp_path, name):
    arguments, words = CLUMSY[name]
    folder, empty, binary = tmp_path / "folder", tmp_path / "empty", tmp_path / "binary"
    folder.mkdir()
    empty.touch()
    binary.write_bytes(b"\xd0\xff\x00")
    places = {"FOLDER": folder, "EMPTY": empty, "RECIPE": tiny_recipe, "BINARY": binary}
    for place, path in places.items():
        arguments = [argument.replace(place, str(path)) for argument in arguments]
    finished = warm.run(*arguments, home=tmp_path / "home", cwd=tmp_path)
    assert words in assert_refused(finished)
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_permission(warm, tiny_recipe, fresh, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    finished = warm.run("distill", tiny_recipe, "--out", closed / "run", home=fresh.home)
    assert "cannot be written to" in assert_refused(finished)

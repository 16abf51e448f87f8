"""Networks of the user's own code: a change of it is noticed, and weights of another are refused.

And the same of the settings in the folders of transformers.
"""

import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_pipeline import reused, started

from tiny_run import STAGES, TINY_RECIPE, TinyRun
from understudy.artifacts import Record, content_hash
from understudy.errors import ModelError
from understudy.models.own_code import code_hash
from understudy.recipes.given_student import load_student
from understudy.recipes.networks import WEIGHTS_NAME, build_model, trained_model
from understudy.recipes.outputs import teacher_identity
from understudy.recipes.prepare import split
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.recipes.search import known_ingredients
from understudy.recipes.teach import teach_one
from understudy.recipes.train import role_section

CODE = """\
from torch import nn

WIDTH, SLOPE = 12, 0.0


def make(num_classes, image_shape):
    num_pixels = image_shape[0] * image_shape[1] * image_shape[2]
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(num_pixels, WIDTH),
        nn.LeakyReLU(SLOPE),
        nn.Linear(WIDTH, num_classes),
    )
"""
# Of another length: Python tells compiled files from their sources by second and size.
SAME_SHAPE = CODE.replace("0.0", "0.25")
OTHER_SHAPE = CODE.replace("12", "9")


@pytest.fixture
def write_code(tmp_path, monkeypatch):
    """Writes the module of a network, as an edited file that a new process reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text, module="own_net"):
        (tmp_path / f"{module}.py").write_text(text)
        sys.modules.pop(module, None)

    yield write
    for module in ("own_net", "own_wrapper"):
        sys.modules.pop(module, None)


def run_of(tmp_path, **changes):
    values = yaml.safe_load(TINY_RECIPE) | changes
    return Run(parse_recipe(values), tmp_path / "run", tmp_path / "home")


OWN = {"model": {"name": "own_net:make"}}
TRAINED = {"training": {"num_epochs": 1}}


# One function of all keys


def test_a_callable_is_known_by_the_file_that_it_is_written_in(write_code, tmp_path):
    write_code(CODE)
    first = code_hash("own_net:make")
    assert first is not None
    # The code that runs is that of the import, whatever was written since.
    (tmp_path / "own_net.py").write_text(SAME_SHAPE)
    assert code_hash("own_net:make") == first
    write_code(SAME_SHAPE)
    assert code_hash("own_net:make") not in (None, first)
    for name in ("mlp", "timm:resnet18", "transformers:some/name", "teacher.onnx"):
        assert code_hash(name) is None


@pytest.mark.parametrize(
    "text",
    [
        "import functools, own_net\nmake = functools.partial(own_net.make)\n",
        "import functools, own_net\n@functools.cache\ndef make(): ...\n",
        "import contextlib\n@contextlib.contextmanager\ndef make(): ...\n",
        "class make: ...\n",
    ],
)
def test_wrapped_callables_are_known_by_a_file_of_the_user(write_code, text):
    write_code(CODE)
    write_code(text, "own_wrapper")
    first = code_hash("own_wrapper:make")
    write_code(f"{text}# edited\n", "own_wrapper")
    assert code_hash("own_wrapper:make") not in (None, first)


def test_a_callable_without_a_file_has_no_hash():
    assert code_hash("builtins:len") is None


@pytest.mark.parametrize(
    ("role", "changes"),
    [
        ("student", {"student": OWN}),
        ("control", {"student": OWN}),
        ("teacher", {"teacher": OWN | TRAINED}),
        ("teacher-2", {"strategy": {"name": "ensemble", "teachers": [OWN | TRAINED]}}),
        ("student", {"strategy": {"name": "mutual", "peers": [OWN["model"]]}, "teacher": None}),
        ("student", {"strategy": {"name": "online"}, "teacher": OWN}),
    ],
)
def test_every_training_of_own_code_depends_on_it(write_code, tmp_path, role, changes):
    write_code(CODE)
    run = run_of(tmp_path, **changes)
    first = role_section(run, role)
    write_code(SAME_SHAPE)
    assert role_section(run, role) != first


def test_the_keys_of_other_networks_are_what_they_were(tmp_path):
    run = run_of(tmp_path)
    for role in ("student", "control", "teacher"):
        assert "code" not in role_section(run, role)
    known = role_section(run, "control")
    assert known == run.recipe.section("seed", "views", "device", "student", "training")
    record = Record("teacher", "key", 0, {}, parents={"weights": "w"})
    section = {
        "color_order": "rgb",
        "class_names": None,
        "model": {
            "name": "mlp",
            "arguments": {"hidden": [32], "dropout": 0.1},
            "normalization": None,
        },
    }
    expected = content_hash([section, "w", list(run.source.class_names)])
    assert teacher_identity(run, "teacher", record) == expected


def test_loaded_weights_and_their_outputs_depend_on_own_code(write_code, tmp_path):
    write_code(CODE)
    path = tmp_path / "own.safetensors"
    run = run_of(
        tmp_path,
        teacher=OWN | {"checkpoint": str(path)},
        student=OWN | {"checkpoint": str(path)},
        labelling={"live": True},
        control=False,
    )
    split(run)
    save_file(build_model(run, "student").network.state_dict(), path)

    def keys():
        teacher = teach_one(run, "teacher", known_accuracy=0.9)
        return [
            teacher.key,
            teacher_identity(run, "teacher", teacher),
            load_student(run, path).key,
            known_ingredients(run),
        ]

    first = keys()
    assert keys() == first
    write_code(SAME_SHAPE)
    assert all(one != other for one, other in zip(first, keys(), strict=True))


def test_weights_of_another_network_are_one_clear_error(write_code, tmp_path):
    write_code(CODE)
    run = run_of(tmp_path, student=OWN)
    (run.folder / "student").mkdir(parents=True)
    save_file(build_model(run, "student").state_dict(), run.folder / "student" / WEIGHTS_NAME)
    record = Record("student", "key", 0, {})
    assert trained_model(run, "student", record) is not None
    write_code(OTHER_SHAPE)
    with pytest.raises(ModelError, match=r"does not fit the model 'own_net:make'.*size mismatch"):
        trained_model(run, "student", record)


def test_a_change_of_own_code_trains_again_what_depends_on_it(warm, tmp_path):
    recipe, code = tmp_path / "own.yaml", tmp_path / "own_net.py"
    values = yaml.safe_load(TINY_RECIPE)
    values["teacher"] |= {"model": {"name": "teacher_net:make"}}
    values["student"] = OWN
    recipe.write_text(yaml.safe_dump(values))
    code.write_text(CODE)
    (tmp_path / "teacher_net.py").write_text(CODE)
    run = TinyRun(tmp_path / "run", tmp_path / "home")

    def distill():
        finished = warm.run("distill", recipe, "--out", run.folder, home=run.home, cwd=tmp_path)
        assert finished.code == 0, finished.err
        return finished

    distill()
    again = distill()
    assert (started(again), reused(again)) == ([], list(STAGES))
    code.write_text(OTHER_SHAPE)
    # Without the training, the weights that are there do not fit.
    alone = warm.run("evaluate", run.folder, home=run.home, cwd=tmp_path)
    assert alone.code == 2, alone.err
    assert "Traceback" not in alone.err
    assert f"Run `understudy distill {run.folder}`" in alone.err
    assert started(distill()) == ["student", "control", "evaluation", "export"]
    stored = set(run.store_files())
    (tmp_path / "teacher_net.py").write_text(SAME_SHAPE)
    assert started(distill())[:3] == ["teacher", "labels", "student"]
    assert set(run.store_files()) > stored
    # What was made with the first code comes back with it.
    code.write_text(CODE)
    (tmp_path / "teacher_net.py").write_text(CODE)
    assert started(distill()) == []


# Settings in the folder of a teacher


@pytest.mark.parametrize("checkpoint", [None, "more.safetensors"])
def test_outputs_of_a_folders_teacher_depend_on_its_settings(tmp_path, monkeypatch, checkpoint):
    folder, path = tmp_path / "vit", tmp_path / "more.safetensors"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, path)
    teacher = {"model": {"name": f"transformers:{folder}"}}
    if checkpoint is not None:
        teacher["checkpoint"] = str(path)
    run = run_of(tmp_path, teacher=teacher)
    record = Record("teacher", "key", 0, {}, files={WEIGHTS_NAME: "weights"})

    def identity(mean, size):
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [mean], "image_std": [0.5]})
        )
        (folder / "config.json").write_text(json.dumps({"image_size": size}))
        return teacher_identity(run, "teacher", record)

    def teaches_from():
        # Up to the key: what is in the folder is no network.
        def begin(self, kind, *, section, parents):
            raise KeyError(parents)

        monkeypatch.setattr(Run, "parent", lambda *_: record)
        monkeypatch.setattr(Run, "begin", begin)
        with pytest.raises(KeyError) as found:
            teach_one(run, "teacher")
        return found.value.args[0]

    first = identity(0.5, 8)
    parents = teaches_from()
    assert identity(0.5, 8) == first
    assert len({first, identity(0.4, 8), identity(0.5, 16)}) == 3
    assert teaches_from() != parents

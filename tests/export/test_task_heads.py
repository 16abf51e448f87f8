"""Trunk and heads as files of their own, put together and changed at run time."""

import itertools
import threading

import onnx
import pytest
import torch
from torch import nn

from understudy.artifacts import file_hash
from understudy.errors import InputError, ModelError
from understudy.export.onnx_file import export_onnx, portable_copy, write_onnx
from understudy.export.onnx_run import open_session, run_images
from understudy.export.task_heads import (
    TrunkRuntime,
    check_head_parity,
    export_head,
    export_trunk,
)
from understudy.heads.tasks import OwnHead, TaskHead, Trunk
from understudy.models.build import NormalizedModel, build_network

SHAPE = (3, 16, 16)
CLASSES = ("ant", "bee", "cat", "dog", "eel")
TOLERANCE = 1e-5


def make_model(seed, width=16):
    torch.manual_seed(seed)
    network = build_network(
        "separable", num_classes=5, image_shape=SHAPE, arguments={"stages": [[8, 1], [width, 2]]}
    )
    return NormalizedModel(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2]).eval()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(256, (12, *SHAPE), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def model():
    return make_model(1)


@pytest.fixture(scope="module")
def trunk(model):
    return Trunk(model, SHAPE)


@pytest.fixture(scope="module")
def heads():
    """A linear head and an MLP, with weights and statistics that are not those of the start."""
    torch.manual_seed(3)
    made = {"parity": TaskHead(16, 2), "breed": TaskHead(16, 12, (9,))}
    for head in made.values():
        head.standardize(torch.randn(30, 16) * 3 + 1)
    return {name: head.eval() for name, head in made.items()}


@pytest.fixture(scope="module")
def files(trunk, heads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = {name: folder / f"{name}.onnx" for name in ("trunk", "classes", "parity", "breed")}
    export_trunk(trunk, paths["trunk"], image_shape=SHAPE)
    own = OwnHead(trunk, SHAPE)
    export_head(own, paths["classes"], trunk=trunk, task="classes", class_names=CLASSES)
    for name, head in heads.items():
        names = [f"{name} {number}" for number in range(head.layers[-1].out_features)]
        export_head(head, paths[name], trunk=trunk, task=name, class_names=names)
    return paths


@pytest.fixture
def runtime(files):
    return TrunkRuntime(files["trunk"], num_threads=1)


def test_trunk_and_own_head_are_the_file_of_the_whole_model(
    model, files, runtime, images, tmp_path
):
    export_onnx(model, tmp_path / "whole.onnx", image_shape=SHAPE, class_names=CLASSES)
    expected_NK = run_images(open_session(tmp_path / "whole.onnx"), images)
    runtime.add_head("classes", files["classes"])
    found_NK = runtime.answers(images)["classes"]
    torch.testing.assert_close(found_NK, expected_NK, rtol=TOLERANCE, atol=TOLERANCE)
    assert runtime.tasks == {"classes": CLASSES}
    parity = check_head_parity(model, runtime, "classes", images, tolerance=TOLERANCE)
    assert parity.passed
    assert parity.num_images == 12
    other = check_head_parity(make_model(2), runtime, "classes", images, tolerance=TOLERANCE)
    assert not other.passed


def test_the_trunk_file_holds_no_classifier_and_is_always_the_same(
    model, trunk, heads, files, tmp_path
):
    proto = onnx.load(files["trunk"])
    own_shape = tuple(model.network.linear.weight.shape)
    assert own_shape not in {tuple(tensor.dims) for tensor in proto.graph.initializer}
    assert [value.name for value in proto.graph.output] == ["embedding"]
    # After heads were made and exported the trunk is what it was, byte for byte.
    export_trunk(Trunk(model, SHAPE), tmp_path / "again.onnx", image_shape=SHAPE)
    assert file_hash(tmp_path / "again.onnx") == file_hash(files["trunk"])


def test_every_task_is_answered_as_trained(trunk, heads, files, runtime, images):
    for name, head in heads.items():
        runtime.add_head(name, files[name])
        parity = check_head_parity(
            nn.Sequential(trunk, head), runtime, name, images, tolerance=TOLERANCE
        )
        assert parity.passed, (name, parity)
    answers = runtime.answers(images)
    assert {name: tuple(logits.shape) for name, logits in answers.items()} == {
        "parity": (12, 2),
        "breed": (12, 12),
    }
    assert list(runtime.answers(images, tasks=["breed"])) == ["breed"]
    pixels = runtime.answers(images.float() / 255)
    assert all(torch.equal(pixels[name], answers[name]) for name in answers)


def test_the_trunk_runs_once_for_all_tasks(files, runtime, images, monkeypatch):
    for name in ("classes", "parity", "breed"):
        runtime.add_head(name, files[name])
    runs, session = [], runtime._trunk

    class Counting:
        def run(self, *arguments):
            runs.append(arguments)
            return session.run(*arguments)

        def __getattr__(self, name):
            return getattr(session, name)

    monkeypatch.setattr(runtime, "_trunk", Counting())
    assert len(runtime.answers(images)) == 3
    assert len(runs) == 1


def test_heads_come_and_go_while_it_runs(heads, trunk, files, runtime, images, tmp_path):
    assert runtime.answers(images) == {}
    runtime.add_head("classes", files["classes"]).add_head("parity", files["parity"])
    before = runtime.answers(images)
    runtime.remove_head("parity")
    assert list(runtime.tasks) == ["classes"]
    with pytest.raises(InputError, match="no head for the task 'parity'; expected one of classes"):
        runtime.answers(images, tasks=["parity"])
    with pytest.raises(InputError, match="no head for the task 'parity'"):
        runtime.remove_head("parity")
    # Another head takes the place of one under its name; the other tasks do not notice.
    torch.manual_seed(8)
    path = tmp_path / "other.onnx"
    export_head(TaskHead(16, 3), path, trunk=trunk, task="parity", class_names=("x", "y", "z"))
    runtime.add_head("parity", files["parity"]).add_head("parity", path)
    after = runtime.answers(images)
    assert after["parity"].shape == (12, 3)
    assert runtime.tasks["parity"] == ("x", "y", "z")
    assert torch.equal(after["classes"], before["classes"])


def test_changing_heads_does_not_disturb_calls_under_way(files, runtime, images):
    runtime.add_head("classes", files["classes"])
    expected_NK = runtime.answers(images)["classes"]
    stop, problems = threading.Event(), []

    def ask():
        while not stop.is_set():
            answers = runtime.answers(images)
            if not torch.equal(answers["classes"], expected_NK):
                problems.append("classes changed")

    asking = threading.Thread(target=ask)
    asking.start()
    for name in itertools.islice(itertools.cycle(("parity", "breed")), 20):
        runtime.add_head(name, files[name]).remove_head(name)
    stop.set()
    asking.join()
    assert problems == []


# Heads that do not belong


def test_a_head_of_another_width_is_refused(runtime, files, images, tmp_path):
    narrow = Trunk(make_model(5, width=8), SHAPE)
    path = tmp_path / "narrow.onnx"
    export_head(TaskHead(8, 2), path, trunk=narrow, task="parity", class_names=("even", "odd"))
    runtime.add_head("classes", files["classes"])
    with pytest.raises(InputError, match=r"\[None, 8\]; expected a head for embeddings of 16"):
        runtime.add_head("parity", path)
    assert list(runtime.answers(images)) == ["classes"]


def test_a_head_of_another_trunk_is_refused_though_its_width_fits(runtime, tmp_path):
    other = Trunk(make_model(5), SHAPE)
    path = tmp_path / "other.onnx"
    export_head(TaskHead(16, 2), path, trunk=other, task="parity", class_names=("even", "odd"))
    with pytest.raises(InputError, match=r"trained on another trunk .*equal widths do not make"):
        runtime.add_head("parity", path)


def test_a_head_from_elsewhere_is_taken_if_its_width_fits(runtime, images, tmp_path):
    path = tmp_path / "foreign.onnx"
    layer = nn.Linear(16, 4)
    write_onnx(portable_copy(layer), path, example=torch.rand(2, 16), opset=18, entries={})
    runtime.add_head("foreign", path)
    assert runtime.answers(images)["foreign"].shape == (12, 4)
    assert runtime.tasks == {"foreign": ()}


def test_a_file_that_is_no_trunk_or_no_head_is_refused(files, runtime, tmp_path):
    with pytest.raises(InputError, match=r"gives 'logits' .*expected a trunk"):
        TrunkRuntime(files["parity"])
    with pytest.raises(InputError, match=r"takes 'images' of shape .*expected a head"):
        runtime.add_head("trunk", files["trunk"])
    with pytest.raises(InputError, match="cannot be read as an ONNX model"):
        runtime.add_head("nothing", tmp_path / "nothing.onnx")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (TaskHead(16, 3), r"returns \(2, 3\); expected logits of shape \(2, 2\)"),
        (TaskHead(8, 2), "returns an error"),
    ],
)
def test_a_head_that_does_not_fit_is_not_exported(trunk, head, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        export_head(
            head, tmp_path / "h.onnx", trunk=trunk, task="parity", class_names=("even", "odd")
        )
    assert not (tmp_path / "h.onnx").exists()

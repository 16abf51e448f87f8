import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from understudy.errors import InputError, ModelError
from understudy.export.artifact_parity import check_artifact_parity
from understudy.export.runtimes import openvino as runtime
from understudy.export.target import Artifact, ExportSource, find_target, open_artifact
from understudy.models.build import NormalizedModel, build_network

# Not importorskip: a plain import of it reports itself over the network.
pytestmark = pytest.mark.skipif(
    find_spec("openvino") is None, reason="the extra 'openvino' is not installed"
)

CLASS_NAMES = ("ant", "bee", "größer", "dog, wild")
IMAGE_SHAPE = (3, 16, 16)
NUM_COMPUTING = 4  # the stem, a depthwise and a pointwise convolution and the linear layer


def make_model() -> NormalizedModel:
    torch.manual_seed(0)
    arguments = {"stages": [[8, 1], [16, 2]]}
    network = build_network(
        "separable", num_classes=4, image_shape=IMAGE_SHAPE, arguments=arguments
    )
    network.train()
    network(torch.randn(32, *IMAGE_SHAPE))  # running statistics that are not 0 and 1
    return NormalizedModel(network, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)).eval()


def make_images(num_images: int = 120) -> Tensor:
    """Smooth pictures, whose classes are not a matter of the last digit."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(num_images, 3, 2, 2, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=IMAGE_SHAPE[1:], mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def make_source(model: nn.Module) -> ExportSource:
    return ExportSource(
        model,
        IMAGE_SHAPE,
        CLASS_NAMES,
        calibration_NCHW=make_images(64),
        metadata={"recipe_hash": "c0ffee"},
    )


@pytest.fixture(scope="module")
def model() -> NormalizedModel:
    return make_model()


@pytest.fixture(scope="module")
def float32(model: NormalizedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("float32")
    return find_target("openvino").export(make_source(model), folder, precision="float32")


@pytest.fixture(scope="module")
def int8(model: NormalizedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("int8")
    return find_target("openvino").export(make_source(model), folder, precision="int8")


def test_float32_files_compute_what_the_model_does(model, float32):
    parity = check_artifact_parity(model, float32, make_images())
    assert parity.passed
    assert parity.max_abs_difference < 1e-4
    assert parity.top1_agreement == 1.0
    assert float32.files == ("student.xml", "student.bin")
    assert sorted(path.name for path in float32.folder.iterdir()) == sorted(float32.files)
    # Every weight in four bytes, not two.
    num_weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert (float32.folder / "student.bin").stat().st_size > 4 * num_weights


@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_batch_size_in_float32_with_the_threads_asked_for(model, float32, batch_size):
    running = open_artifact(float32, num_threads=1)
    images_NCHW = make_images(batch_size).float() / 255
    given_NK = running(images_NCHW.numpy())
    with torch.inference_mode():
        expected_NK = model(images_NCHW)
    torch.testing.assert_close(torch.from_numpy(given_NK), expected_NK, atol=1e-5, rtol=1e-5)
    assert running.facts["num_threads"] == 1
    assert running.facts["computing_layers"] == {"f32": NUM_COMPUTING}
    again_NK = running(images_NCHW.flip(0).numpy())
    torch.testing.assert_close(torch.from_numpy(given_NK), torch.from_numpy(again_NK).flip(0))


def test_int8_is_really_executed_in_int8(model, float32, int8):
    layers = int8.facts["computing_layers"]
    assert layers.get("u8", 0) + layers.get("i8", 0) == NUM_COMPUTING
    assert set(layers) <= {"u8", "i8"}
    assert int8.notes == ()
    parity = check_artifact_parity(model, int8, make_images())
    assert parity.passed
    assert 1e-4 < parity.max_abs_difference < 0.5
    weights = [(artifact.folder / "student.bin").stat().st_size for artifact in (float32, int8)]
    assert weights[1] < 0.6 * weights[0]


def test_the_metadata_is_in_the_file(float32):
    text = float32.path.read_text()
    assert 'understudy.recipe_hash value="c0ffee"' in text
    assert "größer" in text or "gr\\u00f6" in text
    assert str(float32.folder) not in text


class Determinant(nn.Module):
    def forward(self, features_NCHW: Tensor) -> Tensor:
        return torch.linalg.det(features_NCHW)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.determinant = Determinant()

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.determinant(torch.relu(self.conv(images_NCHW)))


def test_an_operator_that_openvino_lacks_is_named_with_its_layer(tmp_path):
    lacking = nn.Sequential(Inner(), nn.Linear(4, 4)).eval()
    message = r"layer 0\.determinant \(Determinant\) cannot be exported to OpenVINO .*ONNX's Det"
    with pytest.raises(ModelError, match=message):
        find_target("openvino").export(make_source(lacking), tmp_path, precision="float32")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_bad_input(float32, tmp_path):
    for name in float32.files:
        (tmp_path / name).write_bytes((float32.folder / name).read_bytes()[:200])
    damaged = Artifact("openvino", "float32", tmp_path, float32.files)
    with pytest.raises(InputError, match=r"openvino cannot load .*student\.xml"):
        open_artifact(damaged)


def test_the_script_alone_opens_the_file_and_sends_nothing(float32):
    """In a process of its own, where any use of the network ends it."""
    code = f"""
import importlib.util, os, socket, sys
def refuse(*arguments, **options):
    os._exit(99)
socket.socket.connect = socket.getaddrinfo = refuse
spec = importlib.util.spec_from_file_location("script", {str(runtime.__file__)!r})
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
running = script.open_model({str(float32.path)!r}, num_threads=1)
import numpy as np
print(running(np.zeros((2, *{IMAGE_SHAPE}), np.float32)).shape)
assert "openvino_telemetry" not in sys.modules
assert "torch" not in sys.modules and "understudy" not in sys.modules
from openvino.tools.ovc import telemetry_utils
print(telemetry_utils.tm.__name__)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(2,", "4)", "openvino.tools.ovc.telemetry_stub"]
    assert Path(runtime.__file__).name == "openvino.py"

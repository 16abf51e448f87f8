import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from understudy.errors import InputError, ModelError
from understudy.export.artifact_parity import check_artifact_parity
from understudy.export.target import Artifact, ExportSource, find_target
from understudy.export.targets import coreml
from understudy.models.build import NormalizedModel, build_network

CLASS_NAMES = ("ant", "bee", "cat", "dog")
IMAGE_SHAPE = (3, 16, 16)
FILES = (
    "student.mlpackage/Manifest.json",
    "student.mlpackage/Data/com.apple.CoreML/model.mlmodel",
    "student.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
)


@pytest.fixture(scope="module", autouse=True)
def tools():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of coremltools' own code and what it imports
        if find_spec("coremltools") is None:
            pytest.skip("the extra 'coreml' is not installed")
        yield coreml._import()


@pytest.fixture(scope="module")
def model() -> NormalizedModel:
    torch.manual_seed(0)
    network = build_network(
        "separable",
        num_classes=4,
        image_shape=IMAGE_SHAPE,
        arguments={"stages": [[8, 1], [16, 2], [32, 1]]},
    )
    network.train()
    network(torch.randn(32, *IMAGE_SHAPE))
    return NormalizedModel(network, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)).eval()


@pytest.fixture(scope="module")
def artifacts(
    model: NormalizedModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    source = ExportSource(
        model,
        IMAGE_SHAPE,
        CLASS_NAMES,
        float_layers=("network.blocks.1.pointwise",),
        metadata={"recipe_hash": "c0ffee"},
    )
    return {
        precision: find_target("coreml").export(
            source, tmp_path_factory.mktemp(precision), precision=precision
        )
        for precision in ("float32", "int8")
    }


def spec_of(tools, artifact: Artifact):
    package = artifact.folder / "student.mlpackage"
    return tools.models.MLModel(str(package), skip_model_load=True).get_spec()


def folded_pointwise(model: NormalizedModel, block: int) -> Tensor:
    """Return the weights of a pointwise convolution with its batch norm in it."""
    part = model.network.blocks[block]
    norm = part.pointwise_norm
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return (part.pointwise.weight * factor.reshape(-1, 1, 1, 1)).detach()


def stored_weights(tools, artifact: Artifact) -> list[Tensor]:
    """Return the large tensors of a package as Core ML will use them: int8 scaled back."""
    package = artifact.folder / "student.mlpackage"
    network = tools.models.MLModel(str(package), skip_model_load=True)
    with coreml._quiet():
        plain = tools.optimize.coreml.decompress_weights(network)
        found = tools.optimize.coreml.get_weights_metadata(plain, weight_threshold=64)
    return [torch.from_numpy(entry.val.copy()) for entry in found.values()]


def test_the_package_is_whole_and_says_what_it_takes(tools, artifacts):
    float32 = artifacts["float32"]
    assert float32.path == float32.folder / "student.mlpackage"
    assert float32.size_bytes == sum((float32.folder / name).stat().st_size for name in FILES)
    found = {
        path.relative_to(float32.folder).as_posix()
        for path in float32.folder.rglob("*")
        if path.is_file()
    }
    assert found == set(FILES)
    description = spec_of(tools, float32).description
    (images,), (logits,) = description.input, description.output
    assert (images.name, logits.name) == ("images", "logits")
    ranges = [
        (r.lowerBound, r.upperBound) for r in images.type.multiArrayType.shapeRange.sizeRanges
    ]
    assert ranges == [(1, 128), (3, 3), (16, 16), (16, 16)]
    float32_type = images.type.multiArrayType.FLOAT32
    assert images.type.multiArrayType.dataType == float32_type
    assert logits.type.multiArrayType.dataType == float32_type
    entries = dict(description.metadata.userDefined)
    assert json.loads(entries["understudy.class_names"]) == list(CLASS_NAMES)
    assert entries["understudy.recipe_hash"] == "c0ffee"
    assert not any("date" in key for key in entries)


def test_float32_weights_are_the_models(tools, model, artifacts):
    stored = stored_weights(tools, artifacts["float32"])
    for block in (0, 1):
        expected = folded_pointwise(model, block)
        same = [w for w in stored if w.shape == expected.shape and torch.allclose(w, expected)]
        assert len(same) == 1
    assert artifacts["float32"].facts["max_batch"] == 128


def test_int8_weights_are_within_half_a_step_but_for_layers_kept(tools, model, artifacts):
    int8 = artifacts["int8"]
    assert int8.size_bytes < artifacts["float32"].size_bytes
    stored = stored_weights(tools, int8)
    quantized, kept = folded_pointwise(model, 0), folded_pointwise(model, 1)
    step = quantized.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    near = [w for w in stored if w.shape == quantized.shape and not torch.equal(w, quantized)]
    assert any(bool(((w - quantized).abs() <= 0.51 * step).all()) for w in near)
    assert any(w.shape == kept.shape and torch.allclose(w, kept, atol=1e-6) for w in stored)
    # The stem, the second depthwise convolution, the first pointwise one and the linear layer.
    assert int8.facts["num_int8_weights"] == 8 * 3 * 9 + 16 * 9 + 16 * 8 + 32 * 4


def test_the_same_network_gives_the_same_bytes(model, artifacts, tmp_path, capfd):
    source = ExportSource(model, IMAGE_SHAPE, CLASS_NAMES, metadata={"recipe_hash": "c0ffee"})
    again = find_target("coreml").export(source, tmp_path, precision="float32")
    assert capfd.readouterr() == ("", "")
    for name in FILES:
        assert (again.folder / name).read_bytes() == (
            artifacts["float32"].folder / name
        ).read_bytes(), name


def test_nothing_here_runs_it_and_that_is_said(model, artifacts):
    assert not find_target("coreml").RUNS_HERE
    assert artifacts["int8"].notes == ("not run: Core ML predicts on macOS only",)
    images_NCHW = torch.zeros(2, *IMAGE_SHAPE, dtype=torch.uint8)
    with pytest.raises(InputError, match="not run: Core ML predicts on macOS only"):
        check_artifact_parity(model, artifacts["int8"], images_NCHW)


class LogGamma(nn.Module):
    def forward(self, features_NCHW: Tensor) -> Tensor:
        return torch.lgamma(features_NCHW + 1)


def test_an_operator_that_core_ml_lacks_is_named_with_its_layer(tmp_path: Path):
    lacking = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Sequential(LogGamma()),
        nn.Flatten(),
        nn.Linear(4 * 16 * 16, 4),
    ).eval()
    source = ExportSource(lacking, IMAGE_SHAPE, CLASS_NAMES)
    with pytest.raises(ModelError, match=r"layer 1\.0 \(LogGamma\) cannot .*Core ML .*lgamma"):
        find_target("coreml").export(source, tmp_path, precision="float32")
    assert not list(tmp_path.iterdir())

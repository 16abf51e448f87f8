"""Networks by name, users' own networks, and the preprocessing around them."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from understudy.errors import CheckpointError, MissingExtraError, ModelError
from understudy.models.build import NormalizedModel, build_network
from understudy.models.catalog import CATALOG
from understudy.models.foreign import stated_normalization

SHAPE = (3, 8, 8)


class Linear(nn.Module):
    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], gain: float = 1.0):
        super().__init__()
        self.linear = nn.Linear(int(np.prod(image_shape)), num_classes)
        self.gain = gain

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1)) * self.gain


class Identity(nn.Module):
    """Returns the pixels it gets, flattened: shows what preprocessing did."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.fixture
def user_module() -> Iterator[types.ModuleType]:
    module = types.ModuleType("a_users_module")
    module.Linear = Linear
    module.number = 3
    module.make_list = lambda: [1]
    module.make_pair = lambda: Pair()
    module.explode = lambda depth: 1 / 0
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


@pytest.mark.parametrize("name", CATALOG)
def test_built_in_networks_map_pictures_to_logits(name: str) -> None:
    network = build_network(name, num_classes=7, image_shape=(1, 12, 12))
    assert network(torch.randn(2, 1, 12, 12)).shape == (2, 7)
    assert network.training


def test_flip_average_is_the_mean_over_mirror_images_in_evaluation_only() -> None:
    torch.manual_seed(0)
    network = Linear(5, SHAPE)
    model = NormalizedModel(network, mean=[0.5] * 3, std=[0.25] * 3, flip_average=True)
    plain = NormalizedModel(network, mean=[0.5] * 3, std=[0.25] * 3)
    images = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    as_they_are, mirrored = plain(images), plain(torch.from_numpy(images.numpy()[..., ::-1].copy()))
    assert not torch.allclose(as_they_are, mirrored, atol=1e-2)
    torch.testing.assert_close(model.eval()(images), (as_they_are + mirrored) / 2)
    torch.testing.assert_close(model.train()(images), as_they_are)


def test_arguments_reach_the_network(user_module: types.ModuleType) -> None:
    resnet = build_network(
        "resnet", num_classes=7, image_shape=SHAPE, arguments={"depth": 8, "widths": [4, 8, 8]}
    )
    assert resnet.conv1.out_channels == 4
    own = build_network(
        "a_users_module:Linear", num_classes=5, image_shape=SHAPE, arguments={"gain": 2.0}
    )
    assert own.gain == 2.0


def test_wrong_built_in_arguments_are_all_listed() -> None:
    with pytest.raises(ModelError) as caught:
        build_network(
            "resnet", num_classes=7, image_shape=SHAPE, arguments={"depth": 9, "width": 1}
        )
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("no_such_module_anywhere:make", {}, "No module named 'no_such_module_anywhere'"),
        (
            "a_users_module:missing",
            {},
            "has no 'missing'; expected one of its callables, such as L",
        ),
        ("a_users_module:number", {}, "is not callable: 'number'"),
        ("a_users_module:Linear", {"gian": 2.0}, "unexpected keyword argument 'gian'"),
        ("a_users_module:explode", {"depth": 1}, "raised ZeroDivisionError"),
        ("a_users_module:make_list", {}, "returned a list; expected a torch.nn.Module"),
        ("a_users_module:make_pair", {}, "returned tuple; expected logits of shape (2, 5)"),
        (
            "a_users_module:Linear",
            {"num_classes": 4},
            "returned (2, 4); expected logits of shape (2, 5)",
        ),
        ("a_users_module:Linear", {"image_shape": (3, 9, 9)}, "raised RuntimeError"),
    ],
)
def test_wrong_user_models_are_explained(
    user_module: types.ModuleType, name: str, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(ModelError) as caught:
        build_network(name, num_classes=5, image_shape=SHAPE, arguments=arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\ny = (\n", r"raised SyntaxError: '\(' was never closed \(.*own_net\.py, line 2\)"),
        ("from math import nosuch\n", r"raised ImportError: cannot import name 'nosuch'.*line 1\)"),
        ("\nimport nosuchmodule\n", r"No module named 'nosuchmodule' \(.*own_net\.py, line 2\)"),
        (
            "def fail():\n    return 1 / 0\n\nTABLE = fail()\n",
            r"raised ZeroDivisionError: division by zero \(.*own_net\.py, line 4\)",
        ),
        ("import sys\nsys.exit(3)\n", r"raised SystemExit: 3 \(.*own_net\.py, line 2\)"),
        ("x = '\0'\n", r"raised (SyntaxError|ValueError): source code"),
    ],
)
def test_user_code_that_cannot_be_imported_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, found: str
) -> None:
    (tmp_path / "own_net.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ModelError, match=found):
        build_network("own_net:make", num_classes=5, image_shape=SHAPE)
    assert "own_net" not in sys.modules


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_a_missing_extra_names_its_install_command(package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(MissingExtraError) as caught:
        build_network(f"{package}:anything", num_classes=5, image_shape=SHAPE)
    assert f'pip install "understudy[{package}]"' in str(caught.value)


def test_timm_models(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm cannot be imported", exc_type=Exception)
    network = build_network("timm:test_vit", num_classes=5, image_shape=(3, 160, 160))
    assert network(torch.randn(1, 3, 160, 160)).shape == (1, 5)
    timm.models.save_for_hf(network, tmp_path)
    with pytest.raises(CheckpointError, match=r"only as pytorch_model\.bin, a pickle"):
        build_network(f"timm:{tmp_path}", num_classes=5, image_shape=(3, 160, 160))
    (tmp_path / "pytorch_model.bin").unlink()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    loaded = build_network(f"timm:{tmp_path}", num_classes=5, image_shape=(3, 160, 160))
    images = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(loaded.eval()(images), network.eval()(images))
    with pytest.raises(ModelError, match="no model 'resnet_nothing'"):
        build_network("timm:resnet_nothing", num_classes=5, image_shape=SHAPE)


def test_transformers_models_from_a_local_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    config.save_pretrained(tmp_path / "fresh")
    name = f"transformers:{tmp_path / 'fresh'}"
    fresh = build_network(name, num_classes=3, image_shape=SHAPE)
    assert fresh(torch.randn(2, *SHAPE)).shape == (2, 3)

    classifier = transformers.ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "trained")
    name = f"transformers:{tmp_path / 'trained'}"
    trained = build_network(name, num_classes=5, image_shape=SHAPE).eval()
    images = torch.randn(2, *SHAPE)
    torch.testing.assert_close(trained(images), classifier(images).logits)
    with pytest.raises(ModelError, match=r"returned \(2, 5\)"):
        build_network(name, num_classes=4, image_shape=SHAPE)
    with pytest.raises(ModelError, match="could not load"):
        build_network(f"transformers:{tmp_path / 'no'}", num_classes=4, image_shape=SHAPE)


def tiny_vit(transformers: types.ModuleType) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=64,
        patch_size=16,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_transformers_get_pictures_of_the_size_that_they_ask_for(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    classifier = tiny_vit(transformers)
    classifier.save_pretrained(tmp_path / "vit")
    name, shape = f"transformers:{tmp_path / 'vit'}", (3, 32, 32)
    network = build_network(name, num_classes=5, image_shape=shape).eval()
    small, large = torch.randn(3, *shape), torch.randn(3, 3, 64, 64)
    resized = nn.functional.interpolate(small, (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(small), classifier(resized).logits)
    assert torch.equal(network(large), classifier(large).logits)
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(
        network,
        (small,),
        tmp_path / "vit.onnx",
        input_names=["images"],
        dynamic_shapes={"images_NCHW": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    (logits,) = onnxruntime.InferenceSession(tmp_path / "vit.onnx").run(
        None, {"images": small[:2].numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(logits), network(small[:2]), rtol=0, atol=1e-5)


def test_a_folder_of_transformers_states_its_normalisation(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    assert stated_normalization(tmp_path) is None
    path.write_text('{"image_mean": [0.5, 0.4], "image_std": [0.2, 0.25]}')
    assert stated_normalization(tmp_path) == {"mean": [0.5, 0.4], "std": [0.2, 0.25]}
    path.write_text('{"image_mean": [1, 1], "image_std": [1, 2], "rescale_factor": 0.00784313725}')
    found = stated_normalization(tmp_path)
    assert found is not None
    assert found["mean"] == pytest.approx([0.5, 0.5])
    assert found["std"] == pytest.approx([0.5, 1])
    path.write_text('{"do_normalize": false, "image_mean": [0.5, 0.5], "image_std": [0.2, 0.2]}')
    assert stated_normalization(tmp_path) == {"mean": [0, 0], "std": [1, 1]}
    path.write_text('{"size": 224}')
    assert stated_normalization(tmp_path) is None
    path.write_text("[1")
    with pytest.raises(ModelError, match="cannot be read"):
        stated_normalization(tmp_path)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalisation_is_pixels_minus_mean_over_std(dtype: torch.dtype) -> None:
    images = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    model = NormalizedModel(Identity(), mean=MEAN, std=STD)
    given = images if dtype == torch.uint8 else images.float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    expected = ((images.double() / 255 - mean) / std).float().flatten(1)
    torch.testing.assert_close(model(given), expected, rtol=0, atol=1e-6)


def test_colour_orders() -> None:
    images = torch.rand(2, 3, 4, 4)
    bgr = NormalizedModel(Identity(), mean=(0, 0, 0), std=(1, 1, 1), color_order="bgr")
    assert torch.equal(bgr(images), images[:, [2, 1, 0]].flatten(1))
    gray = NormalizedModel(Identity(), mean=(0.0,), std=(1.0,), color_order="gray")
    luma = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    torch.testing.assert_close(gray(images), luma.flatten(1))
    assert torch.equal(gray(images[:, :1]), images[:, :1].flatten(1))


def test_outputs_come_in_the_data_order() -> None:
    model = NormalizedModel(Identity(), mean=(0.0,), std=(1.0,), output_order=(2, 0))
    pixels = torch.rand(2, 1, 1, 3)
    assert torch.equal(model(pixels), pixels.flatten(1)[:, [2, 0]])


def test_preprocessing_keeps_channels_last_and_is_not_saved() -> None:
    model = NormalizedModel(Identity(), mean=MEAN, std=STD, output_order=(0, 1))
    images = torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    assert model.normalize(images).is_contiguous(memory_format=torch.channels_last)
    assert not model.state_dict()
    assert not list(model.parameters())


def test_impossible_preprocessing_is_listed_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        NormalizedModel(Identity(), mean=(0.5,), std=(0.0,), color_order="rbg", output_order=(1, 1))
    texts = ("positive std", "color_order 'rbg'", "output_order [1, 1]")
    for found, text in zip(caught.value.problems, texts, strict=True):
        assert text in found


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_models_export_to_onnx_with_a_dynamic_batch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    network = build_network(
        "paper_student", num_classes=5, image_shape=SHAPE, arguments={"channels": 8}
    )
    model = NormalizedModel(
        network, mean=MEAN, std=STD, color_order="bgr", output_order=(4, 3, 2, 1, 0)
    ).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (torch.rand(2, *SHAPE),),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images_NCHW": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path)
    for num_images in (1, 5):
        images = torch.rand(num_images, *SHAPE)
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=0, atol=1e-5)

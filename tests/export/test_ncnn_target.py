from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from understudy.errors import InputError, ModelError
from understudy.export.artifact_parity import check_artifact_parity
from understudy.export.target import Artifact, ExportSource, find_target, open_artifact
from understudy.models.build import NormalizedModel, build_network

for name in ("ncnn", "pnnx"):
    pytest.importorskip(name, reason="the extra 'ncnn' is not installed")

CLASS_NAMES = ("ant", "bee", "cat", "dog")
IMAGE_SHAPE = (3, 16, 16)


def make_model(name: str, **how) -> NormalizedModel:
    torch.manual_seed(0)
    arguments = {"separable": {"stages": [[8, 1], [16, 2]]}, "resnet8": {"widths": (4, 8, 8)}}
    num_channels = 1 if how.get("color_order") == "gray" else 3
    network = build_network(
        name,
        num_classes=4,
        image_shape=(num_channels, *IMAGE_SHAPE[1:]),
        arguments=arguments.get(name, {}),
    )
    network.train()
    network(torch.randn(32, num_channels, *IMAGE_SHAPE[1:]))
    statistics = {"mean": (0.5, 0.4, 0.3)[:num_channels], "std": (0.2, 0.3, 0.1)[:num_channels]}
    return NormalizedModel(network, **statistics, **how).eval()


def make_images(num_images: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (num_images, *IMAGE_SHAPE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def export(model: nn.Module, folder) -> Artifact:
    source = ExportSource(model, IMAGE_SHAPE, CLASS_NAMES)
    return find_target("ncnn").export(source, folder, precision="float32")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        # Shortcuts that take every second pixel and pad channels, which ncnn has no slicing for.
        ("resnet8", {"color_order": "bgr"}),
        ("separable", {"output_order": (2, 0, 3, 1)}),
        ("separable", {"color_order": "gray"}),
        # No convolution that would tell pnnx which axis is the batch.
        ("mlp", {}),
    ],
)
def test_files_compute_what_the_model_does(name, how, tmp_path, capfd):
    model = make_model(name, **how)
    artifact = export(model, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert artifact.files == ("student.param", "student.bin")
    assert artifact.batch == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.bin", "student.param"]
    parity = check_artifact_parity(model, artifact, make_images())
    assert parity.passed, parity
    assert parity.max_abs_difference < 1e-5
    assert parity.top1_agreement == 1.0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(make_model("separable"), tmp_path_factory.mktemp("ncnn"))


def test_weights_stay_in_float32_and_so_do_the_sums(artifact):
    num_weights = sum(p.numel() for p in make_model("separable").parameters() if p.dim() > 1)
    assert (artifact.folder / "student.bin").stat().st_size > 4 * num_weights
    running = open_artifact(artifact)
    options = running.net.opt
    assert not any(
        getattr(options, name)
        for name in dir(options)
        if name.startswith(("use_fp16_", "use_bf16_", "use_int8_"))
    )
    assert running.facts == {"num_threads": 1, "num_layers": artifact.facts["num_layers"]}
    logits_NK = running(np.zeros((3, *IMAGE_SHAPE), np.float32))
    assert logits_NK.shape == (3, 4)
    assert logits_NK.dtype == np.float32


def test_int8_is_refused(tmp_path):
    source = ExportSource(make_model("separable"), IMAGE_SHAPE, CLASS_NAMES)
    assert find_target("ncnn").PRECISIONS == ("float32",)
    with pytest.raises(InputError, match="ncnn is asked for int8; expected float32"):
        find_target("ncnn").export(source, tmp_path, precision="int8")


class Spectrum(nn.Module):
    def forward(self, features_NCHW: Tensor) -> Tensor:
        return torch.fft.fft2(features_NCHW).abs()


class EveryThirdChannel(nn.Module):
    def forward(self, features_NCHW: Tensor) -> Tensor:
        return features_NCHW[:, ::3].repeat(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Spectrum(), r"layer 1\.1 \(Spectrum\) cannot be exported to ncnn .*torch\.fft\.fft2"),
        # pnnx says that it cannot, writes the files and ends as if all were well.
        (EveryThirdChannel(), r"layer 1\.1 \(EveryThirdChannel\) .*slice with step 3"),
    ],
)
def test_an_operator_that_ncnn_lacks_is_named_with_its_layer(layer, message, tmp_path, capfd):
    lacking = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Sequential(nn.ReLU(inplace=True), layer),
        nn.Flatten(),
        nn.Linear(6 * 16 * 16, 4),
    ).eval()
    with pytest.raises(ModelError, match=message):
        export(lacking, tmp_path)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_of_weights_is_bad_input(artifact, tmp_path):
    (tmp_path / "student.param").write_bytes(artifact.path.read_bytes())
    with pytest.raises(InputError, match=r"ncnn cannot load .*does not read .*student\.bin"):
        open_artifact(replace(artifact, folder=tmp_path))

"""The built-in families: sizes, names, forms."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from understudy.errors import ModelError
from understudy.models.build import NormalizedModel, build_network
from understudy.models.cost import model_cost
from understudy.models.inverted import InvertedResidualNet
from understudy.models.load import load_weights
from understudy.models.mlp import MLP
from understudy.models.paper import PaperStudent, PaperTeacher
from understudy.models.resnet import BasicBlock, ResNet
from understudy.models.separable import SeparableNet, scale_channels

CIFAR = (3, 32, 32)
DIGITS = (1, 8, 8)


def num_params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_paper_networks_have_the_parameter_counts_of_table_5() -> None:
    assert num_params(PaperStudent(num_classes=10)) == 11_444
    counts = [num_params(PaperTeacher(num_classes=10, num_layers=n)) for n in (4, 6, 8)]
    assert counts == [39_316, 57_876, 76_436]


def test_paper_student_computes_the_layers_of_section_3_1() -> None:
    student = PaperStudent(num_classes=10).eval()
    weights = list(student.parameters())
    images = torch.randn(2, *CIFAR)
    x = F.leaky_relu(F.conv2d(images, weights[0], weights[1], padding=1))
    x = F.leaky_relu(F.conv2d(x, weights[2], weights[3], padding=1))
    x = F.leaky_relu(F.linear(x.mean((2, 3)), weights[4], weights[5]))
    torch.testing.assert_close(student(images), F.linear(x, weights[6], weights[7]))


def test_paper_teacher_orders_its_added_layers_as_written() -> None:
    teacher = PaperTeacher(num_classes=10, num_layers=2)
    kinds = [type(layer).__name__ for layer in teacher.features]
    block = ["FastConv3x3", "LeakyReLU", "BatchNorm2d", "FastDropout"]
    assert kinds == ["FastConv3x3", *block, *block]
    assert teacher.features[0].activation.rate == 0.2
    assert teacher.features[1].bias is None


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (56, 853_018), (110, 1_727_962)])
def test_resnet_parameter_counts(depth: int, count: int) -> None:
    assert num_params(ResNet(num_classes=10, depth=depth)) == count


def test_resnet8_with_convolution_shortcuts_is_that_of_mlperf_tiny() -> None:
    model = ResNet(num_classes=10, depth=8, shortcut="conv")
    # The published network counts 78,666: 240 superfluous biases and 480 batch-norm statistics
    # more than its trained parameters here.
    assert sum(p.numel() for p in model.parameters()) == 78_666 - 240 - 480
    assert model_cost(model, (3, 32, 32)).macs == 12_501_632
    assert model.layer2[0].shortcut.bias is not None
    assert not hasattr(model.layer1[0], "shortcut")


def test_resnet_names_match_published_checkpoints() -> None:
    names = set(ResNet(num_classes=10, depth=8).state_dict())
    assert {"conv1.weight", "bn1.running_var", "linear.bias"} <= names
    for stage in (1, 2, 3):
        block = f"layer{stage}.0"
        assert {f"{block}.conv1.weight", f"{block}.bn2.weight", f"{block}.conv2.weight"} <= names
    assert not any("downsample" in name or "shortcut" in name for name in names)


def test_option_a_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    features = torch.rand(1, 4, 6, 6)
    output = block(features)
    assert torch.equal(output[:, 2:6], features[:, :, ::2, ::2])
    assert output[:, :2].count_nonzero() == output[:, 6:].count_nonzero() == 0


def test_resnet_reports_depth_and_widths_together() -> None:
    with pytest.raises(ModelError) as caught:
        ResNet(num_classes=10, depth=21, widths=(32, 16))
    assert "depth 21" in caught.value.problems[0]
    assert "widths [32, 16]" in caught.value.problems[1]


def test_separable_students_are_as_small_as_promised() -> None:
    assert num_params(SeparableNet(num_classes=10)) < 12_000
    digits = SeparableNet(num_classes=10, in_channels=1, stages=((16, 1), (24, 2)), depth=1)
    assert num_params(digits) < 2_000
    assert num_params(MLP(num_classes=10, image_shape=DIGITS)) == 64 * 24 + 24 + 24 * 10 + 10


def test_separable_family_scales_in_width_depth_kernel_and_stride() -> None:
    images = torch.randn(2, *CIFAR)
    plain = SeparableNet(num_classes=5, stages=((8, 1), (16, 2)))
    assert plain.blocks(plain.stem(images)).shape == (2, 16, 16, 16)
    assert plain(images).shape == (2, 5)
    deep = SeparableNet(num_classes=5, stages=((8, 1), (16, 2)), depth=3, residual=True)
    assert [block.residual for block in deep.blocks] == [False, True, True]
    assert deep.blocks(deep.stem(images)).shape == (2, 16, 16, 16)
    wide = SeparableNet(num_classes=5, stages=((8, 1), (16, 2)), width=1.6, kernel=5)
    assert wide.linear.in_features == 24
    assert wide.blocks[0].depthwise.weight.shape == (16, 1, 5, 5)


def test_inverted_residual_blocks_have_the_parameters_of_their_table() -> None:
    network = InvertedResidualNet(
        num_classes=5, stem=(8, 1), blocks=((8, 1, 1, 3), (16, 2, 3, 5)), squeeze=4, head=24
    )
    stem = 3 * 8 * 9 + 16
    first = 8 * 9 + 16 + (8 * 2 + 2 + 2 * 8 + 8) + 8 * 8 + 16
    expansion, filters = 8 * 24 + 48, 24 * 25 + 48
    squeeze = 24 * 6 + 6 + 6 * 24 + 24
    second = expansion + filters + squeeze + 24 * 16 + 32
    assert num_params(network) == stem + first + second + (16 * 24 + 48) + 24 * 5 + 5
    images = torch.randn(2, *CIFAR)
    assert network.blocks(network.stem(images)).shape == (2, 16, 16, 16)
    assert network(images).shape == (2, 5)
    assert [block.adds_input for block in network.blocks] == [True, False]


def test_an_inverted_block_that_keeps_its_shape_adds_its_input() -> None:
    block = InvertedResidualNet(num_classes=5, stem=(8, 1), blocks=((8, 1, 2, 3),)).blocks[0].eval()
    images = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(images), block.layers(images) + images)


def test_the_activation_stands_after_every_convolution_but_a_blocks_last() -> None:
    blocks = ((8, 1, 2, 3), (16, 2, 1, 3))
    network = InvertedResidualNet(
        num_classes=5, stem=(8, 1), blocks=blocks, squeeze=4, head=24, activation="hardswish"
    )
    kinds = [type(module) for module in network.modules()]
    assert nn.ReLU not in kinds
    # Stem, head; expansion, depthwise and gates of the first block, the last two of the second.
    assert kinds.count(nn.Hardswish) == 2 + 3 + 2


def test_the_passes_of_a_block_share_its_convolutions_and_have_norms_of_their_own() -> None:
    blocks = ((16, 1, 1, 3), (16, 1, 1, 3, 3))
    network = InvertedResidualNet(num_classes=5, stem=(16, 1), blocks=blocks, squeeze=4)
    once = InvertedResidualNet(num_classes=5, stem=(16, 1), blocks=((16, 1, 1, 3),) * 2, squeeze=4)
    assert num_params(network) == num_params(once) + 2 * (32 + 32)
    block = network.blocks[1].eval()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-1, 1)
    images = torch.randn(2, 16, 4, 4)
    depthwise, first, relu, squeeze, pointwise, second = block.layers
    expected = images
    for before, after in ((first, second), *block.again):
        filtered = squeeze(relu(before(depthwise(expected))))
        expected = after(pointwise(filtered)) + expected
    torch.testing.assert_close(block(images), expected)


def test_a_block_that_changes_the_shape_has_one_pass() -> None:
    with pytest.raises(ModelError, match="stride 2 has 2 passes; expected passes in blocks that"):
        InvertedResidualNet(num_classes=5, stem=(8, 1), blocks=((16, 2, 1, 3, 2),))


@pytest.mark.parametrize(("width", "expected"), [(1.0, 12), (0.1, 8), (1.5, 16), (2.0, 24)])
def test_scaled_channels_are_multiples_of_8(width: float, expected: int) -> None:
    assert scale_channels(12, width) == expected


@pytest.mark.shared_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpoint", "num_right"),
    [("resnet20", "resnet20-12fca82f.th", 9173), ("resnet56", "resnet56-4bfd9763.th", 9339)],
)
def test_published_checkpoints_have_their_published_accuracy(
    name: str, checkpoint: str, num_right: int
) -> None:
    if "UNDERSTUDY_SHARED" not in os.environ:
        pytest.skip("UNDERSTUDY_SHARED does not name the folder of real data and teachers")
    shared = Path(os.environ["UNDERSTUDY_SHARED"])
    from PIL import Image
    from pyarrow import parquet

    table = parquet.read_table(shared / "data/cifar10/test.parquet")
    pictures = [
        np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["img"].to_pylist()
    ]
    images_NCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    labels_N = torch.tensor(table["label"].to_pylist())

    network = build_network(name, num_classes=10, image_shape=CIFAR)
    load_weights(network, shared / "teachers" / checkpoint)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    teacher = NormalizedModel(network, mean=mean, std=std).eval()
    teacher = teacher.to(memory_format=torch.channels_last)
    with torch.no_grad():
        predicted_N = torch.cat([teacher(batch).argmax(1) for batch in images_NCHW.split(500)])
    assert int((predicted_N == labels_N).sum()) == num_right

"""Costs against hand counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from understudy.models.build import NormalizedModel, build_network
from understudy.models.cost import model_cost
from understudy.models.onnx_cost import onnx_cost
from understudy.models.separable import SeparableNet

CIFAR = (3, 32, 32)
FLOAT_BYTES = 4


def test_paper_student() -> None:
    cost = model_cost(build_network("paper_student", num_classes=10, image_shape=CIFAR), CIFAR)
    assert cost.num_params == 11_444
    assert cost.weight_bytes == 11_444 * FLOAT_BYTES
    assert cost.macs == 1024 * (3 * 9 * 32 + 32 * 9 * 32) + 32 * 30 + 30 * 10
    # The second convolution's input and output.
    assert cost.peak_activation_bytes == 2 * 32 * 1024 * FLOAT_BYTES


def test_resnet20_macs_and_residual_activations() -> None:
    cost = model_cost(build_network("resnet20", num_classes=10, image_shape=CIFAR), CIFAR)
    stage1 = 1024 * 9 * (3 * 16 + 6 * 16 * 16)
    stage2 = 256 * 9 * (16 * 32 + 5 * 32 * 32)
    stage3 = 64 * 9 * (32 * 64 + 5 * 64 * 64)
    assert cost.macs == stage1 + stage2 + stage3 + 64 * 10
    # In a block's second convolution: the shortcut, its input and its output.
    assert cost.peak_activation_bytes == 3 * 16 * 1024 * FLOAT_BYTES
    # Batch norm's running statistics are stored, but are no parameters.
    num_statistics = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert cost.weight_bytes == (cost.num_params + num_statistics) * FLOAT_BYTES


def test_depthwise_convolutions_count_their_groups() -> None:
    network = SeparableNet(num_classes=10, in_channels=1, stages=((8, 1), (16, 2)))
    macs = 64 * 9 * 8 + 16 * 9 * 8 + 16 * 8 * 16 + 16 * 10
    assert model_cost(network, (1, 8, 8)).macs == macs


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0].mean(1)


def test_matrix_products_in_functions_count() -> None:
    num_tokens, width = 16, 8
    projections = num_tokens * width * width * 4
    attention = 2 * num_tokens * num_tokens * width
    assert model_cost(Attention(), (8, 4, 4)).macs == projections + attention


class Branches(nn.Module):
    """Keeps one result over three others: liveness, not just the largest pair."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 1)
        self.second = nn.Conv2d(4, 2, 1)
        self.third = nn.Conv2d(2, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        kept = self.first(images)
        x = self.third(torch.relu(self.second(kept)))
        return torch.cat([kept, x.flatten(1).view_as(x)], dim=1).mean((2, 3))


def test_peak_counts_what_is_still_needed() -> None:
    # At the concatenation: 4 and 8 channels in, 12 out; the view of x takes nothing.
    assert model_cost(Branches(), (1, 5, 5)).peak_activation_bytes == 24 * 25 * FLOAT_BYTES


def test_elementwise_operations_reuse_a_dying_input() -> None:
    network = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.BatchNorm2d(6), nn.Flatten())
    # The convolution: 1 channel in, 6 out; what follows works in place.
    assert model_cost(network, (1, 5, 5)).peak_activation_bytes == 7 * 25 * FLOAT_BYTES


def test_shared_parameters_count_once_and_modes_are_restored() -> None:
    shared = nn.Linear(4, 4, bias=False)
    network = nn.Sequential(nn.Flatten(), shared, shared, nn.Dropout(0.5))
    network[3].eval()
    cost = model_cost(network, (1, 2, 2))
    assert (cost.num_params, cost.macs, cost.weight_bytes) == (16, 32, 64)
    assert network.training
    assert not network[3].training


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_the_graph_of_an_exported_model_costs_the_same(tmp_path: Path) -> None:
    shape = (3, 8, 8)
    network = SeparableNet(num_classes=10, stages=((8, 1), (16, 2)), residual=True, depth=2)
    model = NormalizedModel(network, mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (torch.rand(2, *shape),),
        path,
        dynamic_shapes={"images_NCHW": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    expected = model_cost(model, shape)
    _, macs, _, peak = onnx_cost(path)
    assert macs == expected.macs
    assert peak is not None

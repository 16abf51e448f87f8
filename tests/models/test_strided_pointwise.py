"""Strided 1x1 convolutions learn what PyTorch's do, and no training of them ends in a crash."""

import copy
import subprocess
import sys

import pytest
import torch
from kernel_inputs import channels_last
from torch import nn

from understudy.models.build import build_network
from understudy.models.strided_pointwise import (
    StridedPointwise,
    guard_strided_pointwise,
    has_narrow_strides,
)
from understudy.teachers.folding import folded

NARROW = {"depth": 8, "widths": [4, 6, 9], "shortcut": "conv"}
TRAINING = """
import torch
from understudy.models.build import build_network

torch.set_num_threads(1)
network = build_network(
    "resnet", num_classes=10, image_shape=(1, 8, 8), arguments={arguments}
).to(memory_format=torch.channels_last)
pictures = torch.rand(64, 1, 8, 8)
for _ in range(100):
    network(pictures).sum().backward()
    others = [torch.ones(7 * size) for size in range(1, 50)]
"""


@pytest.mark.parametrize(("in_channels", "stride"), [(4, 2), (7, 3), (3, (1, 2)), (16, 2)])
def test_values_and_gradients_are_those_of_the_plain_convolution(in_channels, stride):
    torch.manual_seed(0)
    plain = nn.Conv2d(in_channels, 6, 1, stride)
    guarded = nn.Sequential(copy.deepcopy(plain))
    guard_strided_pointwise(guarded)
    assert isinstance(guarded[0], StridedPointwise)
    assert has_narrow_strides(guarded) == (in_channels < 16)
    features = channels_last(5, in_channels, 9, 8)
    exact = copy.deepcopy(plain).double()
    expected = exact(features.double().contiguous().requires_grad_())
    answer = guarded(features.requires_grad_())
    torch.testing.assert_close(answer.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(answer)
    answer.backward(gradient)
    expected.backward(gradient.double())
    torch.testing.assert_close(
        guarded[0].weight.grad.double(), exact.weight.grad, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(guarded[0].bias.grad.double(), exact.bias.grad, rtol=1e-5, atol=1e-5)


def test_other_convolutions_are_left_alone():
    others = [
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 3, 2),
        nn.Conv2d(4, 8, 1, 2, groups=4),
        nn.Conv2d(4, 6, 1, 2, padding=1),
    ]
    network = nn.Sequential(*others)
    guard_strided_pointwise(network)
    assert {type(module) for module in network} == {nn.Conv2d}


def test_the_captured_graph_keeps_its_strides():
    network = build_network("resnet", num_classes=10, image_shape=(1, 8, 8), arguments=NARROW)
    program = torch.export.export(network.train(), (torch.rand(2, 1, 8, 8),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("slice" in name for name in names)


def test_the_convolution_is_a_layer_to_those_who_fold_norms():
    network = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    guard_strided_pointwise(network)
    network.train()(torch.rand(5, 4, 8, 8))
    small = folded(network.eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    pictures = torch.rand(5, 4, 8, 8)
    torch.testing.assert_close(small(pictures), network(pictures))


def test_a_narrow_network_trains_without_a_crash():
    """PyTorch's own kernels write past their memory here, which shows on AVX2 above all."""
    program = TRAINING.format(arguments=NARROW)
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]

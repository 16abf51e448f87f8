"""A student with channels that are 0 for every picture, in the runtimes of int8.

Their range would give a scale so small that the bias behind them leaves int32.
"""

import pytest
import torch
from edge_student import (
    CLASS_NAMES,
    SMALL_SHAPE,
    model_logits,
    relative_difference,
    runtime_logits,
    small_images,
)

from understudy.export.target import ExportSource
from understudy.models.build import NormalizedModel
from understudy.models.inverted import InvertedResidualNet, SqueezeExcite

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    network = InvertedResidualNet(
        num_classes=10, stem=(16, 1), blocks=((16, 1, 1, 3), (24, 2, 1, 3)), squeeze=4
    )
    model = NormalizedModel(network, mean=(0.4,) * 3, std=(0.2,) * 3).train()
    for _ in range(3):
        model(small_images(64))
    for module in network.modules():
        if isinstance(module, SqueezeExcite):
            torch.nn.init.constant_(module.reduce.bias, -100.0)
    return ExportSource(model.eval(), SMALL_SHAPE, CLASS_NAMES, calibration_NCHW=small_images(64))


@pytest.mark.parametrize("name", ["onnx", "executorch", "tflite", "tflm", "c"])
def test_gates_that_stand_still_are_what_the_model_computes(name, source, tmp_path):
    images_NCHW = small_images(20)
    found_NK = runtime_logits(name, source, images_NCHW, tmp_path, precision="int8")
    assert relative_difference(found_NK, model_logits(source, images_NCHW)) < 0.05

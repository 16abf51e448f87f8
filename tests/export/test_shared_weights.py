"""A student that runs its layers several times with the same convolutions, in every runtime.

Each pass of a block has another batch norm, which exporters fold into the convolution before it:
the passes must not share what is folded. The whole network runs on the picture and its mirror.
"""

import pytest
import torch
from edge_student import (
    CLASS_NAMES,
    PACKAGES,
    SMALL_SHAPE,
    model_logits,
    relative_difference,
    runtime_logits,
    small_images,
)

from understudy.export.target import ExportSource
from understudy.models.build import NormalizedModel
from understudy.models.inverted import InvertedResidualNet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["relu", "hardswish"])
def source(request):
    torch.manual_seed(0)
    network = InvertedResidualNet(
        num_classes=10,
        stem=(16, 1),
        blocks=((16, 1, 1, 3, 2), (24, 2, 1, 3), (24, 1, 1, 3, 3)),
        squeeze=4,
        activation=request.param,
    )
    model = NormalizedModel(network, mean=(0.4,) * 3, std=(0.2,) * 3, flip_average=True).train()
    for _ in range(3):  # statistics that are not those of the start, another for each run
        model(small_images(64))
    return ExportSource(model.eval(), SMALL_SHAPE, CLASS_NAMES, calibration_NCHW=small_images(64))


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        *((name, "float32", 1e-4) for name in PACKAGES),
        *((name, "int8", 0.15) for name in ("onnx", "executorch", "tflite", "tflm", "c")),
    ],
)
def test_passes_and_mirror_images_are_what_the_model_computes(
    name, precision, tolerance, source, tmp_path
):
    images_NCHW = small_images(20)
    found_NK = runtime_logits(name, source, images_NCHW, tmp_path, precision=precision)
    assert relative_difference(found_NK, model_logits(source, images_NCHW)) < tolerance

"""ONNX files made by anyone as teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from understudy.errors import ModelError
from understudy.models.build import NormalizedModel
from understudy.models.cost import model_cost
from understudy.models.onnx_model import OnnxModel

SHAPE = (3, 4, 5)
NUM_CLASSES = 6
NUM_PIXELS = 60
WEIGHT = np.random.default_rng(0).normal(size=(NUM_PIXELS, NUM_CLASSES)).astype(np.float32)

TYPES = {"uint8": TensorProto.UINT8, "float": TensorProto.FLOAT, "half": TensorProto.FLOAT16}


def write_linear(
    path: Path,
    *,
    layout: str = "NCHW",
    batch: int | str = "batch",
    kind: str = "float",
    num_outputs: int = NUM_CLASSES,
) -> Path:
    """Write a linear classifier of the flattened NCHW pixels."""
    sizes = SHAPE if layout == "NCHW" else (SHAPE[1], SHAPE[2], SHAPE[0])
    nodes = [helper.make_node("Cast", ["Pixels:0"], ["float"], to=TensorProto.FLOAT)]
    last = "float"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [last], ["nchw"], perm=[0, 3, 1, 2]))
        last = "nchw"
    nodes += [
        helper.make_node("Flatten", [last], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("Pixels:0", TYPES[kind], [batch, *sizes])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, num_outputs])],
        [numpy_helper.from_array(WEIGHT[:, :num_outputs], "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def expected_logits(images: torch.Tensor) -> torch.Tensor:
    return images.float().flatten(1) @ torch.from_numpy(WEIGHT)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("batch", ["batch", 1, 3])
@pytest.mark.parametrize("kind", ["float", "uint8", "half"])
@pytest.mark.parametrize("num_images", [1, 7])
def test_any_input_form_gives_the_same_logits(
    layout: str, batch: int | str, kind: str, num_images: int, tmp_path: Path
) -> None:
    path = write_linear(tmp_path / "teacher.onnx", layout=layout, batch=batch, kind=kind)
    model = OnnxModel(path, num_classes=NUM_CLASSES, image_shape=SHAPE)
    images = torch.randint(256, (num_images, *SHAPE), dtype=torch.uint8)
    given = images if kind == "uint8" else images.float()
    torch.testing.assert_close(model(given), expected_logits(images), rtol=1e-4, atol=1e-2)


def test_inside_a_normalized_model(tmp_path: Path) -> None:
    images = torch.randint(256, (4, *SHAPE), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    for kind in ("float", "uint8"):
        path = write_linear(tmp_path / f"{kind}.onnx", kind=kind)
        network = OnnxModel(path, num_classes=NUM_CLASSES, image_shape=SHAPE)
        model = NormalizedModel(network, mean=(0, 0, 0), std=(1, 1, 1), output_order=range(6)[::-1])
        pixels = images if kind == "uint8" else images / 255
        expected = expected_logits(pixels).flip(1)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-2)
        assert model(images[:0]).shape == (0, NUM_CLASSES)


def test_cost_is_counted_from_the_graph(tmp_path: Path) -> None:
    model = OnnxModel(write_linear(tmp_path / "a.onnx"), num_classes=NUM_CLASSES, image_shape=SHAPE)
    cost = model_cost(model, SHAPE)
    assert cost.num_params == cost.macs == NUM_PIXELS * NUM_CLASSES
    assert cost.weight_bytes == 4 * NUM_PIXELS * NUM_CLASSES
    assert cost.peak_activation_bytes == 2 * 4 * NUM_PIXELS


@pytest.mark.parametrize(
    ("written", "asked", "text"),
    [
        ({}, {"num_classes": 5}, "has the outputs: scores ['batch', 6]; expected logits of shape"),
        ({}, {"image_shape": (1, 4, 5)}, "takes pictures of shape ['batch', 3, 4, 5]"),
    ],
)
def test_misfits_are_explained(
    written: dict[str, Any], asked: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = write_linear(tmp_path / "teacher.onnx", **written)
    with pytest.raises(ModelError) as caught:
        OnnxModel(path, **{"num_classes": NUM_CLASSES, "image_shape": SHAPE} | asked)
    assert text in str(caught.value)


def test_unreadable_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        OnnxModel(tmp_path / "none.onnx", num_classes=2, image_shape=SHAPE)
    whole = write_linear(tmp_path / "teacher.onnx").read_bytes()
    (tmp_path / "teacher.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be opened by ONNX Runtime"):
        OnnxModel(tmp_path / "teacher.onnx", num_classes=2, image_shape=SHAPE)


def test_inputs_that_are_no_pictures_are_explained(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["tokens"], ["out"])],
        "text",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n", 7])],
        [helper.make_tensor_value_info("out", TensorProto.INT64, ["n", 7])],
    )
    path = tmp_path / "text.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
    with pytest.raises(ModelError, match=r"inputs: tokens tensor\(int64\)"):
        OnnxModel(path, num_classes=7, image_shape=SHAPE)

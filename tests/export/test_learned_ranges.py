"""int8 files of every runtime keep the ranges that quantisation-aware training learned."""

import dataclasses

import pytest
import torch
from edge_student import (
    CLASS_NAMES,
    SMALL_SHAPE,
    relative_difference,
    runtime_logits,
    separable_source,
    small_images,
)

from understudy.export.learned_ranges import learned_ranges
from understudy.export.target import ExportSource, find_target
from understudy.models.build import NormalizedModel
from understudy.models.inverted import InvertedResidualNet

pytest.importorskip("torchao", reason="the extra 'compress' is not installed")
pytestmark = pytest.mark.slow


# Normalising pixels is a layer of the file, but none that training learned ranges of.
PIXELS = b"pixel_normalization"
PACKAGES = {"executorch": "executorch", "tflite": "litert_torch", "tflm": "tflite_micro"}


def need(target):
    pytest.importorskip(PACKAGES[target], reason=f"the extra '{target}' is not installed")


@pytest.fixture(scope="module")
def source():
    """A network whose learned ranges are half as wide as what the pictures give."""
    from understudy.compress.quantize import convert_qat, float_weights, prepare_qat

    torch.manual_seed(0)
    network = InvertedResidualNet(
        num_classes=10,
        stem=(8, 1),
        blocks=((8, 1, 1, 3, 2), (16, 2, 1, 3)),
        activation="hardswish",
    )
    model = NormalizedModel(network, mean=(0.4,) * 3, std=(0.2,) * 3, flip_average=True).train()
    for _ in range(3):
        model(small_images(64))
    prepared = prepare_qat(model.eval(), example_NCHW=small_images(64))
    for name, value in prepared.graph.named_buffers():
        if name.endswith(("minimum", "maximum")):
            value.mul_(0.5)
    return ExportSource(
        float_weights(prepared, model),
        SMALL_SHAPE,
        CLASS_NAMES,
        calibration_NCHW=small_images(64),
        quantized=convert_qat(prepared),
    )


def test_a_row_for_each_run_of_a_layer(source):
    rows = learned_ranges(source.quantized)
    again = [f"network.blocks.0.layers.{number}" for number in (0, 3)] * 2
    last = [f"network.blocks.1.layers.{number}" for number in (0, 3)]
    assert [row.layer for row in rows] == ["network.stem.0", *again, *last, "network.linear"]
    assert all(row.inputs[0] <= 0 < row.inputs[1] for row in rows)
    assert rows[0].outputs[0] < 0 < rows[0].outputs[1]
    assert rows[-1].outputs is None, "logits stay as they are"


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_the_file_answers_as_the_trained_network_does(name, source, tmp_path):
    need(name)
    images_NCHW = small_images(20)
    wanted_NK = source.quantized(images_NCHW.float() / 255)
    differences = []
    for given in (source, dataclasses.replace(source, quantized=None)):
        found_NK = runtime_logits(name, given, images_NCHW, tmp_path, precision="int8")
        differences.append(relative_difference(found_NK, wanted_NK))
    assert differences[0] < 0.02
    assert differences[1] > 2 * differences[0]


def weight_integers(path):
    """Return (steps, integers) of the weights of the file's layers in their order."""
    from understudy.export.tflite_file import WEIGHTED, flatbuffer_tools, operator_name

    tools = flatbuffer_tools()
    file = tools.read_model_from_bytearray(path.read_bytes())
    tensors = file.subgraphs[0].tensors
    layers = [
        node
        for node in file.subgraphs[0].operators
        if operator_name(tools, file, node) in WEIGHTED
        and not tensors[node.outputs[0]].name.startswith(PIXELS)
    ]
    weights = [tensors[node.inputs[1]] for node in layers]
    return [
        (
            torch.tensor(weight.quantization.scale),
            torch.tensor(bytearray(file.buffers[weight.buffer].data)).to(torch.int8),
        )
        for weight in weights
    ]


def activation_scales(path):
    """Return (operator, scale read, scale given) of the file's operators in their order."""
    from understudy.export.tflite_file import flatbuffer_tools, operator_name

    tools = flatbuffer_tools()
    file = tools.read_model_from_bytearray(path.read_bytes())
    graph = file.subgraphs[0]

    def scale(place):
        found = graph.tensors[place].quantization
        return None if found is None or found.scale is None else float(found.scale[0])

    return [
        (operator_name(tools, file, node), scale(node.inputs[0]), scale(node.outputs[0]))
        for node in graph.operators
        if not graph.tensors[node.outputs[0]].name.startswith(PIXELS)
    ]


@pytest.mark.parametrize("name", ["tflite", "tflm"])
def test_scales_are_the_learned_ones_and_a_constant_factor_rounds_nothing(name, source, tmp_path):
    need(name)
    artifact = find_target(name).export(source, tmp_path, precision="int8")
    operators = activation_scales(artifact.path)
    layers = [row for row in operators if row[0] in ("CONV_2D", "DEPTHWISE_CONV_2D")]
    learned = learned_ranges(source.quantized)[:-1]
    for (_, read, given), row in zip(layers, learned, strict=True):
        assert read == pytest.approx((row.inputs[1] - row.inputs[0]) / 255, rel=1e-3)
        assert given == pytest.approx((row.outputs[1] - row.outputs[0]) / 255, rel=1e-3)

    counts = artifact.facts["operators"]
    at_ends = {"tflite": 1, "tflm": 0}
    assert counts.get("QUANTIZE", 0) == at_ends[name], "a picture and its mirror image are rounded"
    if name == "tflm":
        assert counts["HARD_SWISH"] == 4
        return
    assert "HARD_SWISH" not in counts, "LiteRT's fast kernels have none in int8"
    sixths = [r for r in operators if r[0] == "MUL" and r[2] == pytest.approx(r[1] / 6, rel=1e-3)]
    assert len(sixths) == 4


@pytest.mark.parametrize("name", ["tflite", "tflm"])
def test_weights_are_rounded_in_the_learned_steps(name, source, tmp_path):
    need(name)
    artifact = find_target(name).export(source, tmp_path, precision="int8")
    rows = learned_ranges(source.quantized)
    for (steps, integers), row in zip(weight_integers(artifact.path), rows, strict=True):
        torch.testing.assert_close(steps, row.weight_scales)
        layer = source.model.get_submodule(row.layer)
        largest = 127 if getattr(layer, "groups", 1) > 1 else 63
        assert integers.int().abs().max() == largest, "as many bits as training rounded to"


def test_pixels_are_normalised_and_rounded_once(source, tmp_path):
    need("tflite")
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    artifact = find_target("tflite").export(source, tmp_path, precision="int8")
    interpreter = Interpreter(
        str(artifact.path),
        experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    channels, height, width = SMALL_SHAPE
    layer = next(
        tensor
        for tensor in interpreter.get_tensor_details()
        if tensor["name"].startswith("pixel_normalization")
        and list(tensor["shape"]) == [1, height, width, channels]
    )
    step, zero_point = layer["quantization"]
    image_HWC = (small_images(1)[0].float() / 255).permute(1, 2, 0)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image_HWC[None].numpy())
    interpreter.invoke()
    found_HWC = torch.tensor(interpreter.get_tensor(layer["index"]))[0]
    wanted_HWC = (((image_HWC - 0.4) / 0.2) / step).round() + zero_point
    differs = found_HWC != wanted_HWC.clamp(-128, 127)
    assert differs.float().mean() < 0.01  # a half may go to either side


@pytest.mark.parametrize("name", ["executorch", "tflite"])
def test_ranges_of_another_network_are_not_taken(name, source, tmp_path):
    need(name)
    other = separable_source()
    files = []
    for quantized in (None, source.quantized):
        given = dataclasses.replace(other, quantized=quantized)
        artifact = find_target(name).export(given, tmp_path, precision="int8")
        files.append(artifact.path.read_bytes())
    assert files[0] == files[1]

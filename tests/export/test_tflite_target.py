import json
import sys

import numpy as np
import pytest
import torch
from edge_student import (
    CLASS_NAMES,
    digits_source,
    digits_test,
    model_logits,
    odd_source,
    relative_difference,
    separable_source,
    small_images,
    wide_source,
)

from understudy.errors import InputError, MissingExtraError, ModelError
from understudy.export.target import find_target, open_artifact, run_artifact

pytest.importorskip("litert_torch", reason="the extra 'tflite' is not installed")
pytestmark = [
    pytest.mark.slow,
]

TARGET = find_target("tflite")


def export(source, folder, precision):
    return TARGET.export(source, folder, precision=precision)


@pytest.fixture(scope="module")
def resnet_float32(tmp_path_factory):
    source = digits_source(metadata={"recipe_hash": "c0ffee"})
    return export(source, tmp_path_factory.mktemp("float32"), "float32")


@pytest.fixture(scope="module")
def resnet_int8(tmp_path_factory):
    return export(digits_source(), tmp_path_factory.mktemp("int8"), "int8")


def test_float32_logits_are_those_of_pytorch(resnet_float32):
    images_NCHW, _ = digits_test()
    running = open_artifact(resnet_float32)
    wanted_NK = model_logits(digits_source(), images_NCHW)
    assert relative_difference(run_artifact(running, images_NCHW), wanted_NK) < 1e-4
    assert running.facts["num_threads"] == 1


def test_int8_is_hardly_less_accurate(resnet_float32, resnet_int8):
    images_NCHW, labels_N = digits_test()
    wanted_N = model_logits(digits_source(), images_NCHW).argmax(1)
    given_N = run_artifact(open_artifact(resnet_int8), images_NCHW).argmax(1)
    accuracy = [(found_N == labels_N).double().mean().item() for found_N in (wanted_N, given_N)]
    assert accuracy[0] > 0.9
    assert accuracy[1] > accuracy[0] - 0.02
    assert (given_N == wanted_N).double().mean().item() > 0.95
    assert resnet_int8.facts["operators"]["QUANTIZE"] == 1
    assert "QUANTIZE" not in resnet_float32.facts["operators"]


def test_the_file_says_what_it_takes_and_names_layers(resnet_float32):
    from understudy.export.tflite_file import operators, read_metadata

    content = resnet_float32.path.read_bytes()
    entries = read_metadata(content)
    assert json.loads(entries["class_names"]) == list(CLASS_NAMES)
    assert json.loads(entries["input"]) == {
        "name": "args_0",
        "dtype": "float32",
        "layout": "NHWC",
        "range": [0, 1],
        "image_shape": [8, 8, 1],
    }
    assert entries["recipe_hash"] == "c0ffee"
    blocks = [f"network.layer{stage}.0.conv{index}" for stage in (1, 2, 3) for index in (1, 2)]
    assert [step.layer for step in operators(content) if step.name.endswith("CONV_2D")] == [
        "network.conv1",
        *blocks,
    ]
    assert operators(content)[-1].layer == "network.linear"
    # The converter's own names alone take twice that.
    assert resnet_float32.size_bytes < 17_000


def test_the_screen_and_the_folder_stay_clean(tmp_path, capfd):
    source, images_NCHW = separable_source(), small_images(5)
    artifact = export(source, tmp_path, "float32")
    wanted_NK = model_logits(source, images_NCHW)
    logits_NK = run_artifact(open_artifact(artifact), images_NCHW)
    assert relative_difference(logits_NK, wanted_NK) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["student.tflite"]
    assert capfd.readouterr() == ("", "")


def test_a_float_layer_keeps_its_precision_and_the_bytes_are_the_same_again(tmp_path):
    source = odd_source(torch.relu, float_layers=("first", "last"))
    contents = []
    for _ in range(2):
        artifact = export(source, tmp_path, "int8")
        contents.append(artifact.path.read_bytes())
    assert contents[0] == contents[1]
    images_NCHW = small_images(5)
    running = open_artifact(artifact)
    logits_NK = run_artifact(running, images_NCHW)
    # Between two float layers the mean alone is in int8.
    assert relative_difference(logits_NK, model_logits(source, images_NCHW)) < 0.01
    weights = [
        tensor
        for tensor in running.interpreter.get_tensor_details()
        if tuple(tensor["shape"]) in {(4, 3, 3, 3), (10, 4)}
    ]
    assert [tensor["dtype"] for tensor in weights] == [np.float32, np.float32]


def test_weights_that_the_quantizer_puts_behind_the_flatbuffer_are_in_the_file(tmp_path):
    source, images_NCHW = wide_source(), small_images(32)
    artifact = export(source, tmp_path, "int8")
    assert artifact.size_bytes > 768 * 400
    logits_NK = run_artifact(open_artifact(artifact), images_NCHW)
    assert relative_difference(logits_NK, model_logits(source, images_NCHW)) < 0.05


def test_an_operator_without_a_place_is_named_with_its_layer(tmp_path):
    with pytest.raises(ModelError, match=r"layer odd cannot .* no operator for aten\.erfinv"):
        export(odd_source(torch.erfinv), tmp_path, "float32")
    with pytest.raises(ModelError, match=r"layer odd \(Applied\) cannot be exported to tflite"):
        export(odd_source(lambda x: x * 2 if x.mean() > 0 else x), tmp_path, "float32")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="int8 without calibration images"):
        export(odd_source(torch.relu, calibration_NCHW=None), tmp_path, "int8")
    with pytest.raises(InputError, match="odd_one should stay in float32, but"):
        export(odd_source(torch.relu, float_layers=("odd_one",)), tmp_path, "int8")
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(MissingExtraError, match=r'litert-torch.* install "understudy\[tflite\]"'):
        export(odd_source(torch.relu), tmp_path, "float32")


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_file_is_an_input_error(resnet_float32, damage):
    intact = resnet_float32.path.read_bytes()
    resnet_float32.path.write_bytes(intact[: len(intact) // 2] if damage == "cut" else b"x" * 999)
    try:
        with pytest.raises(InputError, match=r"tflite cannot load .*student\.tflite"):
            open_artifact(resnet_float32)
    finally:
        resnet_float32.path.write_bytes(intact)

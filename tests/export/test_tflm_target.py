import sys

import numpy as np
import pytest
import torch
from edge_student import (
    digits_source,
    digits_test,
    model_logits,
    odd_source,
    paper_source,
    relative_difference,
    separable_source,
    small_images,
)

from understudy.errors import InputError, MissingExtraError, ModelError
from understudy.export.target import find_target, open_artifact, run_artifact

pytest.importorskip("litert_torch", reason="the extra 'tflm' is not installed")
pytest.importorskip("tflite_micro", reason="the extra 'tflm' is not installed")
pytestmark = pytest.mark.slow

TARGET = find_target("tflm")


def export(source, folder, precision):
    return TARGET.export(source, folder, precision=precision)


@pytest.fixture(scope="module")
def resnet_int8(tmp_path_factory):
    return export(digits_source(), tmp_path_factory.mktemp("int8"), "int8")


def test_int8_is_hardly_less_accurate(resnet_int8):
    images_NCHW, labels_N = (values[:300] for values in digits_test())
    wanted_N = model_logits(digits_source(), images_NCHW).argmax(1)
    given_N = run_artifact(open_artifact(resnet_int8), images_NCHW).argmax(1)
    accuracy = [(found_N == labels_N).double().mean().item() for found_N in (wanted_N, given_N)]
    assert accuracy[1] > accuracy[0] - 0.02
    assert (given_N == wanted_N).double().mean().item() > 0.95


def test_int8_from_end_to_end(resnet_int8):
    running = open_artifact(resnet_int8)
    assert (running.image["dtype"], running.logits["dtype"]) == (np.int8, np.int8)
    assert not {"QUANTIZE", "DEQUANTIZE"} & set(resnet_int8.facts["operators"])
    # Levels of the file's own, so that 0 and 255 are both exact pixels.
    assert running.image["quantization_parameters"]["scales"][0] == pytest.approx(1 / 255, rel=0.01)


def test_the_arena_that_is_stated_is_enough(resnet_int8):
    from tflite_micro.python.tflite_micro import runtime

    facts, content = resnet_int8.facts, resnet_int8.path.read_bytes()
    parts = ("arena_activation_bytes", "arena_persistent_bytes")
    assert facts["arena_used_bytes"] == sum(facts[part] for part in parts)
    assert facts["flash_bytes"] == len(content)
    runtime.Interpreter.from_bytes(content, arena_size=facts["arena_bytes"])
    with pytest.raises(RuntimeError):
        runtime.Interpreter.from_bytes(content, arena_size=facts["arena_bytes"] - 16)
    assert "64 bits" in resnet_int8.notes[0]


def test_float32_logits_are_those_of_pytorch(tmp_path, capfd):
    source, images_NCHW = separable_source(), small_images(5)
    artifact = export(source, tmp_path, "float32")
    logits_NK = run_artifact(open_artifact(artifact), images_NCHW)
    assert relative_difference(logits_NK, model_logits(source, images_NCHW)) < 1e-4
    # The widest layer's input and output are in memory together.
    assert artifact.facts["arena_activation_bytes"] >= 2 * 16 * 16 * 8 * 4
    assert artifact.facts["operators"]["DEPTHWISE_CONV_2D"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["student.tflite"]
    assert capfd.readouterr() == ("", "")


def test_what_has_no_int8_form_is_said_to_be_float32(resnet_int8, tmp_path):
    source, images_NCHW = paper_source(), small_images(20)
    artifact = export(source, tmp_path, "int8")
    assert artifact.facts["float_operators"] == {"LEAKY_RELU": 3}
    logits_NK = run_artifact(open_artifact(artifact), images_NCHW)
    assert relative_difference(logits_NK, model_logits(source, images_NCHW)) < 0.05
    assert resnet_int8.facts["float_operators"] == {}


def test_an_operator_without_a_kernel_is_named_with_its_layer(tmp_path):
    with pytest.raises(ModelError, match=r"layer odd cannot .* tflm \(there is no .* for ATAN2\)"):
        export(odd_source(lambda values: torch.atan2(values, values + 2)), tmp_path, "float32")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="tflm is asked for int8 without calibration images"):
        export(odd_source(torch.relu, calibration_NCHW=None), tmp_path, "int8")
    monkeypatch.setitem(sys.modules, "tflite_micro.python.tflite_micro.runtime", None)
    with pytest.raises(MissingExtraError, match=r'tflite-micro.* install "understudy\[tflm\]"'):
        export(odd_source(torch.relu), tmp_path, "float32")


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_file_is_an_input_error(resnet_int8, damage):
    intact = resnet_int8.path.read_bytes()
    resnet_int8.path.write_bytes(intact[: len(intact) // 2] if damage == "cut" else b"x" * 999)
    try:
        with pytest.raises(InputError, match=r"tflm cannot load .*student\.tflite"):
            open_artifact(resnet_int8)
    finally:
        resnet_int8.path.write_bytes(intact)

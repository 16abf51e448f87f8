import sys

import pytest
import torch
from edge_student import (
    CLASS_NAMES,
    SMALL_SHAPE,
    digits_source,
    digits_test,
    model_logits,
    odd_source,
    paper_source,
    relative_difference,
    separable_source,
    small_images,
)
from torch import nn

from understudy.errors import InputError, MissingExtraError, ModelError
from understudy.export.target import ExportSource, find_target, open_artifact, run_artifact

pytest.importorskip("executorch", reason="the extra 'executorch' is not installed")
pytestmark = pytest.mark.slow

TARGET = find_target("executorch")


def export(source, folder, precision):
    return TARGET.export(source, folder, precision=precision)


@pytest.fixture(scope="module")
def resnet_float32(tmp_path_factory):
    return export(digits_source(), tmp_path_factory.mktemp("float32"), "float32")


@pytest.fixture(scope="module")
def resnet_int8(tmp_path_factory):
    return export(digits_source(), tmp_path_factory.mktemp("int8"), "int8")


def test_float32_logits_are_those_of_pytorch(resnet_float32):
    images_NCHW, _ = digits_test()
    logits_NK = run_artifact(open_artifact(resnet_float32), images_NCHW)
    wanted_NK = model_logits(digits_source(), images_NCHW)
    assert relative_difference(logits_NK, wanted_NK) < 1e-4


def test_int8_is_smaller_and_hardly_less_accurate(resnet_int8):
    images_NCHW, labels_N = digits_test()
    wanted_N = model_logits(digits_source(), images_NCHW).argmax(1)
    given_N = run_artifact(open_artifact(resnet_int8), images_NCHW).argmax(1)
    accuracy = [(found_N == labels_N).double().mean().item() for found_N in (wanted_N, given_N)]
    assert accuracy[0] > 0.9
    assert accuracy[1] > accuracy[0] - 0.02
    assert (given_N == wanted_N).double().mean().item() > 0.95


def test_facts_name_what_xnnpack_does_not_run(resnet_float32, resnet_int8):
    for artifact in (resnet_float32, resnet_int8):
        # XNNPACK slices with steps of one only: the shortcuts of the two strided blocks.
        assert artifact.facts["not_delegated"] == [
            f"aten::slice_copy in network.layer{stage}.0" for stage in (2, 2, 3, 3)
        ]
        assert 0.8 < artifact.facts["delegated_share"] < 1
        assert artifact.batch == "one"


def test_a_separable_network_goes_to_xnnpack_as_a_whole(tmp_path, capfd):
    source, images_NCHW = separable_source(), small_images(5)
    artifact = export(source, tmp_path, "float32")
    assert artifact.facts["not_delegated"] == []
    assert artifact.facts["delegated_share"] == 1
    assert artifact.facts["num_delegates"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["student.pte"]
    running = open_artifact(artifact)
    wanted_NK = model_logits(source, images_NCHW)
    assert relative_difference(run_artifact(running, images_NCHW), wanted_NK) < 1e-4
    assert running.facts["num_threads"] == 1
    assert capfd.readouterr() == ("", "")


def test_a_float_layer_keeps_its_precision_and_the_bytes_are_the_same_again(tmp_path):
    source, contents = odd_source(torch.relu, float_layers=("first", "last")), []
    for _ in range(2):
        artifact = export(source, tmp_path, "int8")
        contents.append(artifact.path.read_bytes())
    images_NCHW = small_images(5)
    logits_NK = run_artifact(open_artifact(artifact), images_NCHW)
    # The others of this network's layers are never quantised.
    assert relative_difference(logits_NK, model_logits(source, images_NCHW)) < 1e-4
    assert contents[0] == contents[1]


def test_the_mean_as_a_sum_and_a_division_goes_to_xnnpack(tmp_path):
    source, images_NCHW = paper_source(), small_images(5)
    artifact = export(source, tmp_path, "float32")
    assert artifact.facts["not_delegated"] == []
    logits_NK = run_artifact(open_artifact(artifact), images_NCHW)
    assert relative_difference(logits_NK, model_logits(source, images_NCHW)) < 1e-4


class Averaged(nn.Module):
    """Its features have some ten times the range of their mean over the pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 8, 3, bias=False)
        self.linear = nn.Linear(8, 10, bias=False)

    def forward(self, images_NCHW):
        return self.linear(self.features(images_NCHW - 0.5).mean((2, 3)))


def test_a_global_mean_is_rounded_in_a_range_of_its_own(tmp_path):
    images_NCHW = small_images(20)
    source = ExportSource(
        Averaged().eval(), SMALL_SHAPE, CLASS_NAMES, calibration_NCHW=small_images(64)
    )
    artifact = export(source, tmp_path, "int8")
    assert artifact.facts["not_delegated"] == []
    logits_NK = run_artifact(open_artifact(artifact), images_NCHW)
    # 0.012; in the range of the features 0.087.
    assert relative_difference(logits_NK, model_logits(source, images_NCHW)) < 0.03


def test_an_operator_without_a_place_is_named_with_its_layer(tmp_path):
    # Not in the operators that can be lowered at all.
    with pytest.raises(ModelError, match=r"layer odd cannot be .*aten\.erfinv.* of standard"):
        export(odd_source(torch.erfinv), tmp_path, "float32")
    # Lowered, but neither XNNPACK nor the portable kernels have it.
    with pytest.raises(ModelError, match=r"layer odd cannot .* no operator for aten::sort\)"):
        export(odd_source(lambda values: values.sort(-1).values), tmp_path, "float32")
    # A branch on values cannot be traced.
    with pytest.raises(ModelError, match=r"layer odd \(Applied\) cannot be exported to executorch"):
        export(odd_source(lambda x: x * 2 if x.mean() > 0 else x), tmp_path, "float32")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="int8 without calibration images"):
        export(odd_source(torch.relu, calibration_NCHW=None), tmp_path, "int8")
    with pytest.raises(InputError, match="odd_one should stay in float32, but"):
        export(odd_source(torch.relu, float_layers=("odd_one",)), tmp_path, "int8")
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(MissingExtraError, match=r'pip install "understudy\[executorch\]"'):
        export(odd_source(torch.relu), tmp_path, "float32")


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_file_is_an_input_error(resnet_float32, damage):
    intact = resnet_float32.path.read_bytes()
    resnet_float32.path.write_bytes(intact[: len(intact) // 2] if damage == "cut" else b"x" * 999)
    try:
        with pytest.raises(InputError, match=r"executorch cannot load .*student\.pte"):
            open_artifact(resnet_float32)
    finally:
        resnet_float32.path.write_bytes(intact)

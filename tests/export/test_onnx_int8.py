"""int8 ONNX files: in ONNX Runtime, against PyTorch, by the kernels that really run."""

import collections
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from understudy.compress.quantize import convert_qat, float_weights, prepare_qat
from understudy.errors import InputError, ModelError
from understudy.export import onnx_quantize
from understudy.export.onnx_file import file_entries, read_onnx_facts
from understudy.export.onnx_quantize import (
    CALIBRATION_METHODS,
    CalibrationImages,
    aware_int8_proto,
    static_int8_proto,
)
from understudy.export.target import Artifact, ExportSource, open_artifact, run_artifact
from understudy.export.target_names import DEFAULT_OPSET
from understudy.export.targets import onnx as target
from understudy.models.build import NormalizedModel, build_network

# Found, not imported: that takes seconds.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs the extra 'compress'"
)

SHAPE = (3, 16, 16)
CLASS_NAMES = tuple("abcdefghij")
FLOAT_LAYERS = ("network.layer2.0.conv2", "network.layer1")
FAMILIES = {
    "separable": {"stages": [[8, 1], [16, 2], [16, 1]], "residual": True},
    "resnet": {"depth": 8, "widths": [4, 8, 8]},
    "paper_student": {"channels": 8},
    "mlp": {},
}


def make_model(family):
    torch.manual_seed(4)
    network = build_network(family, num_classes=10, image_shape=SHAPE, arguments=FAMILIES[family])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = NormalizedModel(network, mean=mean, std=std).train()
    for seed in range(3):
        model(make_images(16, seed=seed))
    return model.eval()


def make_images(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear")
    return (images * 255).round().to(torch.uint8)


def source_of(model, **values):
    given = {"calibration_NCHW": make_images(40), "metadata": {"recipe_hash": "r"}, **values}
    return ExportSource(model, SHAPE, CLASS_NAMES, **given)


def kernels(path, folder):
    """Count the operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(folder / "optimized.onnx")
    return collections.Counter(node.op_type for node in optimized.graph.node)


@dataclass(frozen=True)
class Files:
    """A network as both int8 files: calibrated after training, and from aware training."""

    model: nn.Module
    converted: nn.Module
    static: Artifact
    aware: Artifact


def make_files(model, folder, **values):
    prepared = prepare_qat(model, example_NCHW=make_images(40), **values)
    converted = convert_qat(prepared)
    artifacts = {}
    for name, given in (
        ("static", source_of(model, **values)),
        ("aware", source_of(float_weights(prepared, model), quantized=converted, **values)),
    ):
        (folder / name).mkdir()
        artifacts[name] = target.export(given, folder / name, precision="int8")
    return Files(model, converted, **artifacts)


@pytest.fixture(scope="module")
def resnet_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    return make_files(make_model("resnet"), folder, float_layers=FLOAT_LAYERS)


@pytest.fixture(scope="module", params=["separable", "resnet", "paper_student"])
def files(request, tmp_path_factory):
    if request.param == "resnet":
        return request.getfixturevalue("resnet_files")
    return make_files(make_model(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mlp():
    return make_model("mlp")


@pytest.fixture(scope="module")
def mlp_file(mlp, tmp_path_factory):
    return target.export(source_of(mlp), tmp_path_factory.mktemp("mlp"), precision="int8")


@pytest.mark.parametrize("name", ["static", "aware"])
def test_depthwise_weights_alone_take_eight_bits(name, files):
    proto = onnx.load(getattr(files, name).path)
    constants, given = constants_of(proto), {n.output[0]: n for n in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type == "Conv" and node.input[1] in given:  # and not in float
            integers = constants[given[node.input[1]].input[0]].astype(int)
            groups = {a.name: a.i for a in node.attribute}.get("group", 1)
            largest = 127 if integers.shape[1] == 1 and groups > 1 else 63
            assert largest - 1 <= abs(integers).max() <= largest + 1


EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
ASK = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"images": numpy.load(sys.argv[2])})[0])
"""


def asked_without_vnni(proto, pixels, folder):
    """Ask ONNX Runtime on an emulated processor with AVX2, where it adds products in pairs."""
    files = [folder / name for name in ("net.onnx", "pixels.npy", "logits.npy")]
    files[0].write_bytes(proto.SerializeToString())
    np.save(files[1], pixels)
    subprocess.run(
        [EMULATOR, "-cpu", "Haswell", os.path.realpath(sys.executable), "-c", ASK, *files],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        check=True,
        timeout=240,
    )
    return np.load(files[2])


@pytest.mark.skipif(
    EMULATOR is None or platform.machine() != "x86_64", reason="needs QEMU's qemu-x86_64, on x86-64"
)
def test_eight_bits_of_depthwise_weights_overflow_nowhere(tmp_path, monkeypatch):
    """All weights and pixels at their largest; of a dense layer the same bits do overflow."""
    layers = nn.Conv2d(3, 16, 3, groups=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 144, 4)).eval()
    for layer in (model[0], model[2]):
        nn.init.ones_(layer.weight)
    images = make_images(8, seed=1)
    images[:, :, 4:12] = 255
    pixels = images.numpy().astype(np.float32) / 255
    differences = []
    for depthwise in (None, lambda proto: [proto.graph.node[0].input[1]]):
        if depthwise is not None:
            monkeypatch.setattr(onnx_quantize, "_depthwise_weights", depthwise)
        proto = static_int8_proto(model, images, image_shape=SHAPE)
        # Each operator by itself, in float: processors without VNNI overflow here as well.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
        (wanted,) = session.run(None, {"images": pixels})
        error = np.abs(asked_without_vnni(proto, pixels, tmp_path) - wanted).max()
        differences.append(error / np.abs(wanted).max())
    assert differences[0] < 1e-5
    assert differences[1] > 1e-3, differences


@pytest.mark.parametrize(
    ("activation", "lowest", "highest"),
    [("HardSwish", -3, np.inf), ("HardSigmoid", -3, 3), ("Sigmoid", -np.inf, np.inf)],
)
def test_no_step_is_spent_where_an_activation_is_flat(activation, lowest, highest):
    torch.manual_seed(0)
    layer = {"HardSwish": nn.Hardswish, "HardSigmoid": nn.Hardsigmoid, "Sigmoid": nn.Sigmoid}
    layers = (
        nn.Conv2d(3, 8, 3),
        layer[activation](),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(1152, 4),
    )
    model = nn.Sequential(*layers).eval()
    model[0].weight.data *= 40
    images = make_images(32)
    with torch.no_grad():
        given = model[:1](images.float() / 255)
        expected = model(images.float() / 255).numpy()
    assert given.min() < -6
    assert given.max() > 6
    proto = static_int8_proto(model, images, image_shape=SHAPE)
    constants, producers = constants_of(proto), {n.output[0]: n for n in proto.graph.node}
    (node,) = [n for n in proto.graph.node if n.op_type == activation]
    reading = producers[node.input[0]]
    assert list(producers[reading.input[0]].input[1:]) == list(reading.input[1:])
    scale, zero = (constants[name].item() for name in reading.input[1:])
    assert scale * (0 - zero) == pytest.approx(max(lowest, given.min().item()), rel=0.02)
    assert scale * (255 - zero) == pytest.approx(min(highest, given.max().item()), rel=0.02)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (answers,) = session.run(None, {"images": images.float().numpy() / 255})
    assert np.abs(answers - expected).max() < 0.1 * np.abs(expected).max()


def constants_of(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def first_scale(proto):
    first = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")
    return constants_of(proto)[first.input[1]].item()


def test_every_layer_but_the_float_ones_runs_in_an_int8_kernel(files, tmp_path):
    modules = list(files.model.modules())
    num_float = 3 if "layer1" in dict(files.model.network.named_children()) else 0
    for artifact in (files.static, files.aware):
        found = kernels(artifact.path, tmp_path)
        assert found["QLinearConv"] == sum(isinstance(m, nn.Conv2d) for m in modules) - num_float
        assert found["QGemm"] == sum(isinstance(m, nn.Linear) for m in modules)
        assert found["Conv"] + found["FusedConv"] == num_float
        assert found["Gemm"] == found["MatMul"] == 0
        # The normalisation is all the float arithmetic there is before the first rounding.
        assert found["Mul"] == 1
        assert found["Add"] == 1 or num_float


def test_a_static_file_answers_nearly_as_the_model(files):
    images = make_images(64, seed=9)
    with torch.no_grad():
        expected = files.model(images)
    logits = run_artifact(open_artifact(files.static), images)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert (logits - expected).abs().mean() < 0.03 * expected.abs().max()


def test_an_aware_file_answers_as_the_converted_network(files):
    """Up to values that lie between two levels and go the other way in integer arithmetic."""
    images = make_images(64, seed=9)
    with torch.no_grad():
        expected = files.converted(images.float() / 255)
    logits = run_artifact(open_artifact(files.aware), images)
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()
    assert (logits - expected).abs().mean() < 0.003 * expected.abs().max()


def test_two_products_of_dense_layers_fit_16_bits(files):
    """So processors without VNNI instructions, which add pairs of them there, do not overflow."""
    for artifact in (files.static, files.aware):
        proto = onnx.load(artifact.path)
        constants, given = constants_of(proto), {n.output[0]: n for n in proto.graph.node}
        dense = [
            np.abs(constants[given[node.input[1]].input[0]].astype(int)).max()
            for node in proto.graph.node
            if node.op_type in ("Conv", "Gemm")
            and node.input[1] in given  # and not in float
            and {a.name: a.i for a in node.attribute}.get("group", 1) == 1
        ]
        assert max(dense) > 50
        assert 2 * 255 * max(dense) < 2**15


def test_the_largest_products_are_added_exactly(tmp_path):
    model = NormalizedModel(
        nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(576, 4)),
        mean=[0.0] * 3,
        std=[1.0] * 3,
    ).eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.0)
    images = torch.full((8, 3, 8, 8), 255, dtype=torch.uint8)
    source = ExportSource(
        model=model,
        image_shape=(3, 8, 8),
        class_names=("a", "b", "c", "d"),
        calibration_NCHW=images,
    )
    artifact = target.export(source, tmp_path, precision="int8")
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(
        torch.as_tensor(run_artifact(open_artifact(artifact), images)), expected, rtol=0.02, atol=0
    )


def test_any_batch_size_gives_the_same_logits(files):
    images = make_images(7)
    for artifact in (files.static, files.aware):
        running = open_artifact(artifact)
        together = run_artifact(running, images)
        single = torch.cat([run_artifact(running, one) for one in images.split(1)])
        torch.testing.assert_close(together, single, rtol=0, atol=1e-5)


def test_the_file_says_what_the_float_file_says(files):
    entries = file_entries(SHAPE, CLASS_NAMES) | {"recipe_hash": "r"}
    for artifact in (files.static, files.aware):
        facts = read_onnx_facts(artifact.path)
        assert facts.metadata == {f"understudy.{key}": value for key, value in entries.items()}
        assert facts.class_names == CLASS_NAMES
        assert (facts.input_name, facts.output_name) == ("images", "logits")
        assert facts.input_shape == (None, *SHAPE)
        assert facts.output_shape == (None, 10)
        assert facts.opset == DEFAULT_OPSET
        assert artifact.facts == {"num_nodes": facts.num_nodes}


def test_nothing_but_the_graph_is_in_the_file(files):
    for path in (files.static.path, files.aware.path):
        proto = onnx.load(path)
        assert not proto.graph.value_info
        assert not any(n.metadata_props or n.doc_string for n in proto.graph.node)
        read = {name for node in proto.graph.node for name in node.input}
        assert {tensor.name for tensor in proto.graph.initializer} <= read
        assert {path.name for path in path.parent.iterdir()} == {"student.onnx"}


def test_weights_have_a_scale_for_each_channel(files):
    proto = onnx.load(files.static.path)
    constants = constants_of(proto)
    producers = {name: node for node in proto.graph.node for name in node.output}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm") and node.input[1] in producers:
            levels, scales, *_ = producers[node.input[1]].input
            assert constants[levels].dtype == np.int8
            assert constants[scales].shape == constants[levels].shape[:1]


@pytest.mark.parametrize("method", CALIBRATION_METHODS[1:])
def test_every_calibration_method_gives_a_file_that_agrees(mlp, method, tmp_path, capfd):
    artifact = target.export(source_of(mlp), tmp_path, precision="int8", calibration=method)
    images = make_images(64, seed=9)
    with torch.no_grad():
        expected = mlp(images)
    logits = run_artifact(open_artifact(artifact), images)
    assert (logits - expected).abs().mean() < 0.08 * expected.abs().max()
    assert capfd.readouterr() == ("", "")


def test_a_percentile_cuts_the_tails_off(mlp, mlp_file):
    images = make_images(40)
    cut = static_int8_proto(mlp, images, image_shape=SHAPE, method="percentile", percentile=90.0)
    assert first_scale(cut) < 0.9 * first_scale(onnx.load(mlp_file.path))


def test_float_layers_are_float_in_the_file(resnet_files):
    for artifact in (resnet_files.static, resnet_files.aware):
        weights = [t for t in onnx.load(artifact.path).graph.initializer if len(t.dims) == 4]
        floats = [t for t in weights if t.data_type == onnx.TensorProto.FLOAT]
        assert [list(t.dims) for t in floats] == [[4, 4, 3, 3], [4, 4, 3, 3], [8, 8, 3, 3]]


def test_equal_work_gives_equal_bytes_in_another_process(mlp_file, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, test_onnx_int8 as t; "
        "t.target.export(t.source_of(t.make_model('mlp')), pathlib.Path(sys.argv[2]), "
        "precision='int8')"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, check=True)
    assert (tmp_path / "student.onnx").read_bytes() == mlp_file.path.read_bytes()


def test_normalisation_costs_one_rounding(mlp, mlp_file):
    """The first rounding has the step of the normalised range, and there is none before it."""
    proto = onnx.load(mlp_file.path)
    order = [node.op_type for node in proto.graph.node]
    assert order[:4] == ["Mul", "Add", "Reshape", "QuantizeLinear"]
    normalized = mlp.normalize(make_images(40))
    span = normalized.max().clamp(min=0) - normalized.min().clamp(max=0)
    assert first_scale(proto) == pytest.approx(span.item() / 255, rel=1e-4)


def test_calibration_feeds_each_image_once():
    images = make_images(70)
    reader = CalibrationImages(images, "images")
    assert len(reader) == 3
    batches = [reader.get_next()["images"] for _ in range(3)]
    assert reader.get_next() is None
    np.testing.assert_array_equal(np.concatenate(batches), images.numpy() / np.float32(255))
    reader.set_range(1, 2)
    np.testing.assert_array_equal(reader.get_next()["images"], batches[1])
    assert reader.get_next() is None


def test_float32_is_as_it_was(mlp, tmp_path):
    artifact = target.export(source_of(mlp), tmp_path, precision="float32")
    images = make_images(8)
    with torch.no_grad():
        expected = mlp(images)
    logits = run_artifact(open_artifact(artifact), images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_int8_without_images_is_refused(mlp, tmp_path):
    for images in (None, torch.zeros(0, *SHAPE)):
        with pytest.raises(InputError, match="asked for int8 without calibration images"):
            target.export(source_of(mlp, calibration_NCHW=images), tmp_path, precision="int8")
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_is_said_at_once(mlp):
    with pytest.raises(InputError) as caught:
        static_int8_proto(
            mlp,
            torch.zeros(4, 1, 16, 16),
            image_shape=SHAPE,
            float_layers=("network.nine",),
            method="average",
        )
    first, second, third = caught.value.problems
    assert "calibration images have shape (4, 1, 16, 16)" in first
    assert "expected one of minmax, percentile, entropy" in second
    assert "'network.nine' is not in the model" in third
    assert "network.layers.1, network.layers.3, or a module" in third


def test_nothing_left_to_quantise_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    with pytest.raises(InputError, match="no layer is left to quantise"):
        static_int8_proto(model, make_images(4), image_shape=SHAPE, float_layers=("1",))


class Twice(nn.Module):
    def forward(self, images):
        return images.flatten(1), images.flatten(1)


def test_a_model_of_several_outputs_is_a_model_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Twice())
    with pytest.raises(ModelError, match="returns 2 tensors"):
        prepare_qat(model, example_NCHW=make_images(4))


def test_a_bias_beside_a_dead_input_stays_what_it_is():
    """ONNX Runtime would write it in int32 in units that it does not fit, and answer nonsense."""
    torch.manual_seed(0)
    arguments = {"stem": [16, 1], "blocks": [[16, 1, 1, 3, 2], [16, 1, 1, 3]], "squeeze": 4}
    network = build_network("inverted", num_classes=10, image_shape=(3, 8, 8), arguments=arguments)
    for name, parameter in network.named_parameters():
        if ".reduce." in name:  # the squeezed channels are 0 for every picture
            torch.nn.init.constant_(parameter, -1.0)
        elif name.endswith(".expand.bias"):
            torch.nn.init.constant_(parameter, 2.5)
    model = NormalizedModel(network, mean=[0.5] * 3, std=[0.25] * 3).train()
    images_NCHW = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        model(images_NCHW)
    prepared = prepare_qat(model.eval(), example_NCHW=images_NCHW).eval()
    converted = convert_qat(prepared)
    with torch.no_grad():
        expected_NK = converted(images_NCHW)
    session = onnxruntime.InferenceSession(
        aware_int8_proto(converted, (3, 8, 8)).SerializeToString()
    )
    (found_NK,) = session.run(None, {"images": images_NCHW.numpy()})
    difference = torch.from_numpy(found_NK) - expected_NK
    assert difference.norm() < 0.03 * expected_NK.norm()

"""What the C files compute in another way than ONNX Runtime, and with the same results."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edge_student import CLASS_NAMES, SMALL_SHAPE, small_images
from onnx import TensorProto, helper, numpy_helper
from torch import nn

pytest.importorskip("emx_onnx_cgen", reason="the extra 'c' is not installed")

from understudy.export.c_mirror import one_pass
from understudy.export.c_network import generate_network, join_operators, prepare
from understudy.export.c_tables import with_tables
from understudy.export.target import ExportSource, find_target
from understudy.models.build import NormalizedModel


def source(*, flip_average, order=None):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Hardswish(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    model = NormalizedModel(
        network, mean=(0.4,) * 3, std=(0.2,) * 3, flip_average=flip_average, output_order=order
    )
    return ExportSource(model.eval(), SMALL_SHAPE, CLASS_NAMES, calibration_NCHW=small_images(32))


def onnx_path(folder, precision, **arguments):
    folder.mkdir(exist_ok=True)
    return find_target("onnx").export(source(**arguments), folder, precision=precision).path


def logits(model: onnx.ModelProto | Path, pixels_NCHW: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: one[None]})[0] for one in pixels_NCHW])


def aware_path(folder, **arguments):
    """Return the int8 file of a network prepared for quantisation-aware training."""
    pytest.importorskip("torchao", reason="the extra 'compress' is not installed")
    from understudy.compress.quantize import convert_qat, prepare_qat

    given = source(**arguments)
    prepared = prepare_qat(given.model, example_NCHW=small_images(32))
    trained = replace(given, quantized=convert_qat(prepared))
    return find_target("onnx").export(trained, folder, precision="int8").path


@pytest.mark.parametrize("precision", ["float32", "int8", "aware"])
@pytest.mark.parametrize("order", [None, [1, 0, 2, 3, 4, 5, 6, 7, 9, 8]])
def test_the_mean_of_two_passes_is_what_the_file_gives(precision, order, tmp_path):
    if precision == "aware":
        path = aware_path(tmp_path, flip_average=True, order=order)
    else:
        path = onnx_path(tmp_path, precision, flip_average=True, order=order)
    whole = prepare(onnx.load(path))
    single = one_pass(whole)
    onnx.checker.check_model(single)
    pixels_NCHW = small_images(5).numpy().astype(np.float32) / 255
    both = [logits(single, view) for view in (pixels_NCHW, pixels_NCHW[..., ::-1].copy())]
    assert np.array_equal((both[0] + both[1]) / 2, logits(whole, pixels_NCHW))
    assert not np.allclose(*both)
    assert "Concat" not in {node.op_type for node in single.graph.node}


def test_a_file_of_one_way_is_left_alone(tmp_path):
    assert one_pass(prepare(onnx.load(onnx_path(tmp_path, "float32", flip_average=False)))) is None


class MirroredFeatures(nn.Module):
    """Averages over mirror images of a layer's features, not of the picture."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.last = nn.Linear(4 * 8 * 8, 10)

    def forward(self, images_NCHW):
        features_NCHW = self.first(images_NCHW)
        columns_W = torch.arange(7, -1, -1)
        both_MCHW = torch.cat([features_NCHW, features_NCHW.index_select(3, columns_W)])
        return self.last(both_MCHW.flatten(1)).view(2, -1, 10).mean(dim=0)


def test_features_that_are_mirrored_are_not_the_picture(tmp_path):
    given = ExportSource(MirroredFeatures().eval(), SMALL_SHAPE, CLASS_NAMES)
    artifact = find_target("onnx").export(given, tmp_path, precision="float32")
    assert {"Concat", "Gather"} <= {node.op_type for node in onnx.load(artifact.path).graph.node}
    assert one_pass(prepare(onnx.load(artifact.path))) is None


def test_a_mean_of_everything_is_not_that_of_two_passes():
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    mean = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])
    node = helper.make_node("ReduceMean", ["x"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [value], [mean]))
    assert one_pass(model) is None


def test_two_passes_take_hardly_more_memory_than_one(tmp_path):
    both = generate_network(onnx_path(tmp_path / "both", "float32", flip_average=True))
    single = generate_network(onnx_path(tmp_path / "single", "float32", flip_average=False))
    assert both.averages_mirror
    assert not single.averages_mirror
    assert both.arena_bytes == single.arena_bytes


def test_activations_between_int8_values_are_tables(tmp_path):
    path = onnx_path(tmp_path, "int8", flip_average=False)
    joined = join_operators(prepare(onnx.load(path)))
    changed, tables = with_tables(joined)
    found = [node.op_type for node in changed.graph.node]
    assert {"HardSigmoid", "HardSwish", "Sigmoid"}.isdisjoint(found)
    assert found.count("BitwiseNot") == len(tables) > 0
    network = generate_network(path)
    assert "Table" in network.operators
    assert len(re.findall(r"uint8_t understudy_table_\d+\[256\] = \{", network.code)) == len(tables)
    assert "bitwise_not(input0" not in network.code
    # Nothing of the activation is in float32: 8 channels of a byte, in and out.
    assert network.arena_bytes < 3 * 8 * 16 * 16


def chain(dtype, nodes, *, extra_output=None, scale=0.05):
    """A graph of one 8-bit tensor, dequantised, taken through nodes, quantised again."""
    kind = np.uint8 if dtype == TensorProto.UINT8 else np.int8
    constants = [
        numpy_helper.from_array(np.float32(scale), "s"),
        numpy_helper.from_array(kind(7), "z"),
        numpy_helper.from_array(np.float32(0.02), "t"),
        numpy_helper.from_array(kind(3), "w"),
        numpy_helper.from_array(np.float32(1.5), "half"),
    ]
    all_nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["a"]),
        *nodes,
        helper.make_node("QuantizeLinear", ["b", "t", "w"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", dtype, [1, 256])]
    if extra_output:
        outputs.append(helper.make_tensor_value_info(extra_output, TensorProto.FLOAT, [1, 256]))
    inputs = [helper.make_tensor_value_info("x", dtype, [1, 256])]
    graph = helper.make_graph(all_nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


HARD_SWISH = [
    helper.make_node("HardSigmoid", ["a"], ["h"], alpha=1 / 6, beta=0.5),
    helper.make_node("Mul", ["a", "h"], ["b"]),
]


@pytest.mark.parametrize("dtype", [TensorProto.UINT8, TensorProto.INT8])
@pytest.mark.parametrize(
    "nodes",
    [
        HARD_SWISH,
        [helper.make_node("Tanh", ["a"], ["b"])],
        [helper.make_node("Mul", ["half", "a"], ["b"])],
    ],
)
def test_a_table_holds_the_result_of_every_value(dtype, nodes):
    model = chain(dtype, nodes)
    changed, tables = with_tables(model)
    (table,) = tables.values()
    bytes_N = np.arange(256, dtype=np.uint8)
    values = bytes_N if dtype == TensorProto.UINT8 else bytes_N.view(np.int8)
    assert np.array_equal(table[bytes_N], logits(model, values[None]).reshape(-1))
    assert table.dtype == values.dtype
    assert [node.op_type for node in changed.graph.node] == ["BitwiseNot"]


@pytest.mark.parametrize(
    "model",
    [
        chain(TensorProto.UINT8, [helper.make_node("Softmax", ["a"], ["b"])]),
        chain(TensorProto.UINT8, [helper.make_node("Tanh", ["a"], ["b"])], extra_output="b"),
        chain(TensorProto.UINT8, [helper.make_node("Identity", ["a"], ["b"])]),
    ],
    ids=["not by element", "read elsewhere", "unknown"],
)
def test_other_chains_are_left_alone(model):
    changed, tables = with_tables(model)
    assert tables == {}
    assert changed == model

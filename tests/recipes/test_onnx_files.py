"""Of an ONNX teacher the weights in files beside it are part of it."""

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

from tiny_run import TINY_RECIPE
from understudy.artifacts import file_hash
from understudy.models.onnx_model import external_files
from understudy.recipes.run import Run
from understudy.recipes.schema import parse_recipe
from understudy.recipes.teach import weights_hash


def run_of(tmp_path, path):
    values = yaml.safe_load(TINY_RECIPE) | {"teacher": {"model": {"name": str(path)}}}
    return Run(parse_recipe(values), tmp_path / "run", tmp_path / "home")


def write_external(folder, weight_ND):
    """Write a classifier of digits whose weights lie in a file of their own."""
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weight_ND.astype(np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = folder / "teacher.onnx"
    (folder / "teacher.onnx.data").unlink(missing_ok=True)
    onnx.save(
        model, path, save_as_external_data=True, location="teacher.onnx.data", size_threshold=0
    )
    return path


def test_weights_beside_an_onnx_teacher_are_part_of_it(tmp_path):
    path = write_external(tmp_path, np.zeros((64, 10)))
    graph, run = path.read_bytes(), run_of(tmp_path, path)
    first = weights_hash(run, "teacher")
    assert weights_hash(run, "teacher") == first
    write_external(tmp_path, np.ones((64, 10)))
    assert path.read_bytes() == graph
    assert weights_hash(run, "teacher") != first


def test_an_onnx_teacher_in_one_file_is_known_by_it_alone(tmp_path):
    path = write_external(tmp_path, np.zeros((64, 10)))
    onnx.save(onnx.load(path), tmp_path / "whole.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for name in ("whole.onnx", "broken.onnx"):
        run = run_of(tmp_path, tmp_path / name)
        assert weights_hash(run, "teacher") == file_hash(tmp_path / name)


def test_external_weights_of_inner_graphs_are_found(tmp_path):
    inner = onnx.load(write_external(tmp_path, np.zeros((64, 10))), load_external_data=False).graph
    inner.ClearField("input")
    node = helper.make_node("If", ["which"], ["scores"], then_branch=inner, else_branch=inner)
    which = helper.make_tensor_value_info("which", TensorProto.BOOL, [])
    path = tmp_path / "outer.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "outer", [which], [])), path)
    assert external_files(path) == [tmp_path / "teacher.onnx.data"]

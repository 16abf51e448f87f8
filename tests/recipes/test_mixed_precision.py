"""Layers that stay in float in an int8 student: named for either method, chosen for static."""

import importlib.util
import json
import shutil

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper
from safetensors.numpy import load_file

from tiny_run import TINY_RECIPE, TinyRun

pytest.importorskip("torchao", reason="needs the extra compress")

LOOSE = {"accuracy_drop": 1.0, "worst_class_drop": 1.0, "agreement_drop": 1.0, "ece_rise": 1.0}
STRICT = dict.fromkeys(LOOSE, 0.0)
FURTHER = {"num_epochs": 1, "batch_size": 64, "optimizer": {"name": "adamw", "learning_rate": 0.01}}
AWARE = {"name": "quantize", "method": "aware", "training": FURTHER}
STATIC = {"name": "quantize", "method": "static"}
KIND = "compression-1-quantize"
LAYERS = (
    "network.stem.0",
    "network.blocks.0.depthwise",
    "network.blocks.0.pointwise",
    "network.linear",
)


@pytest.fixture(scope="module")
def distilled(warm, tmp_path_factory):
    """A trained student with four layers. Tests only read it."""
    values = yaml.safe_load(TINY_RECIPE)
    values["data"]["calibration_fraction"] = 0.1
    values["student"] = {"model": {"name": "separable", "arguments": {"stages": [[8, 1], [16, 2]]}}}
    values["control"] = False
    values["training"] |= {"num_epochs": 2}
    folder = tmp_path_factory.mktemp("distilled")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    run = TinyRun(folder / "run", folder / "home")
    finished = warm.run("distill", path, "--out", run.folder, home=run.home)
    assert finished.code == 0, finished.err
    return run


@pytest.fixture
def copied(distilled, tmp_path):
    run = TinyRun(tmp_path / "run", tmp_path / "home")
    shutil.copytree(distilled.folder, run.folder)
    shutil.copytree(distilled.home, run.home)
    return run


def changes(step, gates):
    return [
        *("--set", f"compression.steps={json.dumps([step])}"),
        *("--set", f"compression.gates={json.dumps(gates)}"),
    ]


def initializers(path):
    return [numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer]


def int8_weights(path):
    """The int8 tensors of a file with two axes or more: one for each layer that is in int8."""
    return [one for one in initializers(path) if one.dtype == np.int8 and one.ndim >= 2]


@pytest.mark.parametrize("named", [(), ("network.linear", "network.blocks.0")])
def test_aware_training_leaves_the_named_layers_in_float(copied, warm, named):
    step = {**AWARE, "float_layers": named}
    finished = warm.run(
        "release", copied.folder, *changes(step, LOOSE), "--target", "onnx/int8", home=copied.home
    )
    assert finished.code == 0, finished.err
    record = copied.record(KIND)
    assert record.payload["float_layers"] == list(named)
    assert record.payload["network"]["float_layers"] == list(named)
    num_float = sum(layer.startswith(named) for layer in LAYERS) if named else 0
    shipped = copied.folder / "artifact-onnx-int8" / "student.onnx"
    assert len(int8_weights(shipped)) == len(LAYERS) - num_float
    weights = load_file(copied.folder / KIND / "model.safetensors")
    last = weights["network.linear.weight"]
    is_float = any(
        one.dtype == np.float32
        and one.size == last.size
        and np.array_equal(one.ravel(), last.ravel())
        for one in initializers(shipped)
    )
    assert is_float == bool(named)
    # The network that was trained is the one that ships.
    assert copied.record("artifact-onnx-int8").payload["parity"]["top1_agreement"] > 0.9


def test_static_keeps_what_is_named_and_adds_the_worst_of_the_others(copied, warm):
    step = {**STATIC, "float_layers": ["network.stem"], "max_float_layers": 2}
    finished = warm.run("compress", copied.folder, *changes(step, STRICT), home=copied.home)
    assert finished.code == 0, finished.err
    payload = copied.record(KIND).payload
    first, *others = payload["float_layers"]
    assert first == "network.stem"
    ranked = [row["name"] for row in payload["details"]["sensitivity"]]
    assert sorted(ranked) == sorted(LAYERS)
    in_int8 = [name for name in ranked if name != "network.stem.0"]
    assert others == in_int8[: len(others)]
    assert len(int8_weights(copied.folder / KIND / "student.onnx")) == 3 - len(others)
    results = json.loads((copied.folder / "report" / "report.json").read_text())["results"]
    assert [row["name"] for row in results["sensitivity"]] == ranked
    in_float = {row["name"] for row in results["sensitivity"] if row["in_float"]}
    assert in_float == {"network.stem.0", *others}
    assert "| network.stem.0 |" in (copied.folder / "report" / "report.md").read_text()


def test_the_sensitivity_is_there_whenever_layers_may_stay_in_float(copied, warm):
    step = {**STATIC, "max_float_layers": 1}
    finished = warm.run("compress", copied.folder, *changes(step, LOOSE), home=copied.home)
    assert finished.code == 0, finished.err
    payload = copied.record(KIND).payload
    assert payload["float_layers"] == []
    assert sorted(row["name"] for row in payload["details"]["sensitivity"]) == sorted(LAYERS)


@pytest.mark.parametrize("step", [AWARE, STATIC])
def test_a_layer_that_is_not_there_is_named_before_anything_is_trained(copied, warm, step):
    step = {**step, "float_layers": ["network.nine"]}
    finished = warm.run("compress", copied.folder, *changes(step, LOOSE), home=copied.home)
    assert finished.code == 2
    assert "the float layer 'network.nine' is not in the model" in finished.err
    assert "expected one of network.stem.0, network.blocks.0.depthwise" in finished.err
    assert "Traceback" not in finished.err
    assert not (copied.folder / KIND / "training").exists()


def test_only_static_chooses_layers(copied, warm):
    step = {**AWARE, "max_float_layers": 1}
    finished = warm.run("compress", copied.folder, *changes(step, LOOSE), home=copied.home)
    assert finished.code == 2
    assert "name `float_layers` for `aware`" in finished.err


def test_every_runtime_gets_the_named_layers_in_float(copied, warm):
    modules = {
        "c": "emx_onnx_cgen",
        "executorch": "executorch",
        "openvino": "openvino",
        "tflite": "litert_torch",
    }
    targets = [name for name, module in modules.items() if importlib.util.find_spec(module)]
    if not targets:
        pytest.skip("no extra of a runtime is installed")
    step = {**AWARE, "float_layers": ["network.linear"]}
    asked = [text for name in targets for text in ("--target", f"{name}/int8")]
    finished = warm.run("release", copied.folder, *changes(step, LOOSE), *asked, home=copied.home)
    assert finished.code == 0, finished.err
    last = load_file(copied.folder / KIND / "model.safetensors")["network.linear.weight"]
    for name in targets:
        record = copied.record(f"artifact-{name}-int8")
        assert record.payload["parity"]["top1_agreement"] > 0.9
        if name in ("executorch", "tflite"):  # raw bytes of the weight, as they are in memory
            file = copied.folder / f"artifact-{name}-int8" / record.payload["files"][0]
            assert last.tobytes() in file.read_bytes()

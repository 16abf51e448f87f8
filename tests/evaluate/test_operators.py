import json

import pytest
import torch
from measure_model import write_linear
from torch import nn

from understudy.errors import InputError, UnderstudyError
from understudy.evaluate.operators import torch_operators
from understudy.evaluate.operators_onnx import onnx_operators
from understudy.models.build import build_network

IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
# Bytes of one float32 result of every convolution of the paper's networks on these images.
MAP_BYTES = 4 * 32 * 16 * 16 * 4


def rows_of(table):
    return {row.kind: row for row in table.rows}


@pytest.mark.parametrize("num_layers", [1, 2])
def test_calls_and_memory_of_the_papers_teacher(num_layers):
    model = build_network(
        "paper_teacher",
        num_classes=10,
        image_shape=(3, 16, 16),
        arguments={"num_layers": num_layers},
    )
    table = torch_operators(model, IMAGES, num_runs=2)
    rows = rows_of(table)
    calls = {kind: rows[kind].num_calls for kind in ("conv2d", "batch norm", "leaky relu")}
    assert calls == {
        "conv2d": num_layers + 1,
        "batch norm": num_layers,
        "leaky relu": num_layers + 2,  # one more in the classifier
    }
    assert rows["conv2d"].memory_bytes == (num_layers + 1) * MAP_BYTES
    assert rows["batch norm"].memory_bytes >= num_layers * MAP_BYTES
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    assert [row.time_ms for row in table.rows] == sorted(
        (row.time_ms for row in table.rows), reverse=True
    )
    assert table.loading.memory_bytes == IMAGES.numel() * 4
    assert table.created.num_calls > 0
    assert table.total_ms > 0
    json.dumps(table.to_json(), allow_nan=False)


def test_training_mode_has_dropout_and_leaves_the_network_alone():
    model = build_network("paper_student", num_classes=10, image_shape=(3, 16, 16)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = torch_operators(model, IMAGES, name="student", training=True, num_runs=1)
    rows = rows_of(training)
    assert rows["leaky relu and dropout"].num_calls == 3
    assert rows["leaky relu and dropout"].memory_bytes >= 2 * MAP_BYTES
    assert not model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    lines = training.to_text().splitlines()
    assert lines[0].startswith("student in eager PyTorch, one batch of 4, training mode")
    assert lines[2].startswith("model inference")
    assert lines[-2].startswith("create tensor (in the above)")
    assert lines[-1].startswith("data loading")


def test_work_in_no_operator_belongs_to_its_module():
    class Numpy(nn.Module):
        def forward(self, images_NCHW):
            return torch.from_numpy(images_NCHW.numpy().mean(axis=(2, 3)))

    table = torch_operators(nn.Sequential(Numpy(), nn.Linear(3, 2)), IMAGES, num_runs=1)
    rows = rows_of(table)
    assert rows["Numpy"].num_calls == 1
    assert rows["Numpy"].time_ms > 0
    assert rows["linear"].num_calls == 1


def test_operators_of_an_onnx_file(tmp_path):
    path = write_linear(tmp_path / "model.onnx", width=16, num_layers=3)
    table = onnx_operators(path, IMAGES[:, :1, :8, :8].contiguous(), num_runs=3)
    rows = rows_of(table)
    assert rows["MatMul"].num_calls == 3
    assert rows["MatMul"].memory_bytes == 3 * 4 * 16 * 4
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    assert table.total_ms > 0
    assert "model.onnx in ONNX Runtime" in table.to_text()
    assert not list(tmp_path.glob("*.json"))


def test_wrong_input_is_reported(tmp_path):
    with pytest.raises(InputError) as raised:
        torch_operators(nn.Flatten(), IMAGES.float(), num_runs=0, num_threads=0)
    assert len(raised.value.problems) == 3
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(UnderstudyError, match=r"profiling .*broken\.onnx failed"):
        onnx_operators(tmp_path / "broken.onnx", IMAGES)

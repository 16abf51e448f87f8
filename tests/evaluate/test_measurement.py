import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from understudy.errors import InputError, UnderstudyError
from understudy.evaluate import artifact_process
from understudy.evaluate.fresh_process import MIN_RUNS, run_fresh
from understudy.evaluate.latency import measure_latency, percentile_ms
from understudy.evaluate.memory import measure_memory
from understudy.evaluate.runtime_files import runtime_file
from understudy.runtime import num_usable_cores

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 1, 8, 8), dtype=np.uint8)


C_CODE = """\
#include <stddef.h>
const struct { size_t shape[5]; const char *texts[2]; size_t sizes[2]; } student_info = {
    {1, 8, 8, 64, 3}, {"float32", ""}, {0, 0}
};
int understudy_classify(const float *pixels, size_t num_pixels, float *logits, size_t num_classes)
{
    for (size_t k = 0; k < num_classes; k++) logits[k] = pixels[k];
    return num_pixels == 64 ? 0 : 1;
}
const char *understudy_error_text(int code) { return code ? "wrong" : ""; }
"""


def write_model(path: Path, *, num_loops: int = 0, weight_bytes: int = 0) -> Path:
    """A linear layer; with a loop it runs as long as wished, with weights it is as large."""
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [64, 3], [0.01] * 192)
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 64])
    nodes = [
        helper.make_node("Reshape", ["images", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
    ]
    initializers = [weight, shape]
    last = "product"
    if num_loops:
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["go_on"], ["still"]),
                helper.make_node("Cos", ["state"], ["next_state"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("turn", TensorProto.INT64, []),
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("state", TensorProto.FLOAT, [None, 3]),
            ],
            [
                helper.make_tensor_value_info("still", TensorProto.BOOL, []),
                helper.make_tensor_value_info("next_state", TensorProto.FLOAT, [None, 3]),
            ],
        )
        initializers += [
            helper.make_tensor("turns", TensorProto.INT64, [], [num_loops]),
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        ]
        nodes.append(helper.make_node("Loop", ["turns", "yes", last], ["looped"], body=body))
        last = "looped"
    if weight_bytes:
        table = np.random.default_rng(0).random((weight_bytes // 12, 3), dtype=np.float32)
        initializers.append(onnx.numpy_helper.from_array(table, "table"))
        initializers.append(helper.make_tensor("row", TensorProto.INT64, [1], [5]))
        nodes.append(helper.make_node("ReduceMax", ["images"], ["largest"], keepdims=0))
        nodes.append(helper.make_node("Mul", ["table", "largest"], ["scaled"]))
        nodes.append(helper.make_node("Gather", ["scaled", "row"], ["added"]))
        nodes.append(helper.make_node("Add", [last, "added"], ["sum"]))
        last = "sum"
    nodes.append(helper.make_node("Identity", [last], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("measure") / "model.onnx")


def test_latency_of_every_setting(model_path):
    told = []
    latency = measure_latency(
        model_path,
        IMAGES,
        batch_sizes=(3, 1),
        num_threads=(1, 2),
        min_seconds=0.1,
        progress=lambda done, total, note="": told.append((done, total)),
    )
    rows = latency.measurements
    assert [(row.num_threads, row.batch_size) for row in rows] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for row in rows:
        assert 0 < row.p50_ms <= row.p95_ms <= row.p99_ms
        assert row.num_runs > MIN_RUNS  # 0.1 s were asked for, some 10 us a run
        assert row.num_warmup > 0
        assert row.load_ms > 0
        assert row.images_per_second == pytest.approx(row.batch_size / row.mean_ms * 1000)
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert {"processor", "num_cores", "onnxruntime", "numpy"} <= set(latency.facts)
    json.dumps(latency.to_json(), allow_nan=False)


def test_all_threads_are_measured_once_where_that_is_the_same(model_path):
    cores = num_usable_cores()
    latency = measure_latency(
        model_path, IMAGES, batch_sizes=(1,), num_threads=("all", cores), min_seconds=0
    )
    assert [row.num_threads for row in latency.measurements] == [cores]


@pytest.mark.parametrize("num_runs", [1, 2, 50, 100, 101])
@pytest.mark.parametrize("percentile", [50, 95, 99])
def test_percentiles_are_nearest_rank(num_runs, percentile):
    times_ns = [random.Random(i).randrange(10**6) for i in range(num_runs)]
    expected = next(
        value
        for value in sorted(times_ns)
        if sum(other <= value for other in times_ns) * 100 >= percentile * num_runs
    )
    assert percentile_ms(times_ns, percentile) == expected / 1e6


def test_memory_is_that_of_the_measuring_process_and_holds_the_model(model_path, tmp_path):
    ballast = np.ones(300_000_000, dtype=np.uint8)  # this process is large; that must not show
    small = measure_memory(model_path, IMAGES)
    assert small.peak_memory_bytes is not None
    assert small.baseline_memory_bytes is not None
    assert 10e6 < small.baseline_memory_bytes <= small.peak_memory_bytes < len(ballast)
    large_path = write_model(tmp_path / "large.onnx", weight_bytes=24_000_000)
    large = measure_memory(large_path, IMAGES)
    assert large.peak_memory_bytes is not None
    assert large.peak_memory_bytes > small.peak_memory_bytes + 24_000_000


def test_the_measuring_process_imports_no_torch(model_path, tmp_path):
    images_path = tmp_path / "images.npy"
    np.save(images_path, IMAGES)
    request = {
        "mode": "measure",
        "runtime": str(runtime_file(model_path).script),
        "artifact": str(model_path),
        "images": str(images_path),
        "batch_size": 1,
        "num_threads": 1,
        "num_batches": 1,
        "num_warmup": 0,
        "min_runs": 1,
        "min_seconds": 0,
    }
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-P", artifact_process.__file__, json.dumps(request)],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert {"numpy", "onnxruntime"} <= imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "onnx", "understudy")}
    assert len(json.loads(done.stdout)["times_ns"]) == 1


def test_a_file_that_does_not_load_is_reported_with_its_reason(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"measuring .*broken\.onnx at batch 1 failed .*Proto"):
        measure_memory(path, IMAGES)


def test_images_of_another_size_are_reported(model_path):
    with pytest.raises(InputError, match="Got invalid dimensions for input: images"):
        measure_memory(model_path, IMAGES[..., :5])


def test_a_run_that_takes_too_long_is_stopped(tmp_path):
    path = write_model(tmp_path / "slow.onnx", num_loops=2**40)
    with pytest.raises(UnderstudyError, match=r"at batch 1 was not done after 1.5 s"):
        measure_memory(path, IMAGES, timeout_seconds=1.5)


def test_wrong_requests_are_listed_at_once(tmp_path):
    with pytest.raises(InputError) as raised:
        run_fresh(
            tmp_path / "absent.onnx",
            IMAGES.astype(np.float32),
            batch_size=0,
            num_threads=-1,
            num_batches=1,
        )
    assert [line.split(";")[0].replace(str(tmp_path), "") for line in raised.value.problems] == [
        "there is no file /absent.onnx",
        "the images to measure with are float32 of (7, 1, 8, 8)",
        "batch_size is 0",
        "num_threads is -1",
    ]


def test_bytes_that_are_no_text_do_not_hide_why_a_process_failed(model_path, tmp_path, monkeypatch):
    script = tmp_path / "says.py"
    lines = "import os, sys; os.write(2, b'caf\\xe9 is full'); sys.exit(1)"
    script.write_text(lines)
    monkeypatch.setattr(artifact_process, "__file__", str(script))
    with pytest.raises(UnderstudyError, match=r"failed \(caf\ufffd is full\)"):
        measure_memory(model_path, IMAGES)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_compilers_time_is_not_that_of_loading_c_code(tmp_path, monkeypatch):
    (tmp_path / "student.c").write_text(C_CODE)
    for name in ("student_network.c", "student.h", "student_network.h"):
        (tmp_path / name).write_text("")
    compiler = tmp_path / "slow-cc"
    compiler.write_text('#!/bin/sh\nsleep 2\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = measure_latency(
        tmp_path / "student.c", IMAGES, batch_sizes=(1,), num_threads=(1,), min_seconds=0
    )
    assert list((tmp_path / "cache").rglob("*.so"))
    assert 0 < found.measurements[0].load_ms < 1000
    assert "cc" in found.facts["compiler"]


def test_a_killed_process_is_told_from_a_failed_one(model_path, tmp_path, monkeypatch):
    script = tmp_path / "dies.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(artifact_process, "__file__", str(script))
    with pytest.raises(UnderstudyError, match=r"ended by signal 9, 9 is often a lack of memory"):
        measure_memory(model_path, IMAGES)

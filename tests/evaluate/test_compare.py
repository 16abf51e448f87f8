import json

import numpy as np
import pytest
import torch
from measure_model import write_linear

from understudy.errors import InputError, MissingExtraError
from understudy.evaluate.compare import compare_artifacts, ratio_of
from understudy.evaluate.eager import open_model, write_eager
from understudy.evaluate.fresh_process import describe_fresh
from understudy.evaluate.latency import measure_latency
from understudy.evaluate.profile import profile_command
from understudy.evaluate.runtime_files import RuntimeFile, runtime_file
from understudy.export.target import Artifact
from understudy.models.build import NormalizedModel, build_network

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), dtype=np.uint8)
MLP = {"num_classes": 3, "image_shape": (1, 8, 8), "arguments": {"hidden": (4,)}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_linear(tmp_path_factory.mktemp("small") / "small.onnx")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Some thousand times the work of the small one."""
    return write_linear(tmp_path_factory.mktemp("large") / "large.onnx", width=512, num_layers=12)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """A network with weights of its own, as a file, and what it answers."""
    torch.manual_seed(0)
    conversions = {"mean": [0.4], "std": [0.3]}
    model = NormalizedModel(build_network("mlp", **MLP), **conversions).eval()
    path = write_eager(
        tmp_path_factory.mktemp("eager"),
        "mlp",
        **MLP,
        conversions=conversions,
        weights=model.state_dict(),
    )
    with torch.no_grad():
        logits_NK = model(torch.from_numpy(IMAGES)).numpy()
    return path, logits_NK


def test_a_larger_file_is_slower_by_a_ratio_with_its_spread(small, large):
    comparison = compare_artifacts(
        [small, large], IMAGES, batch_sizes=(8,), num_rounds=3, min_seconds=0.01
    )
    (row,) = comparison.ratios
    assert (row.name, row.reference) == ("onnx large.onnx", "onnx small.onnx")
    assert (row.batch_size, row.num_threads, row.num_rounds) == (8, 1, 3)
    assert 3 < row.lower <= row.ratio <= row.upper
    assert row.verdict == "slower"
    assert "slower" in comparison.to_text()
    assert comparison.facts["files"]["onnx large.onnx"]["size_bytes"] == large.stat().st_size
    json.dumps(comparison.to_json(), allow_nan=False)


def test_eager_pytorch_is_a_runtime_like_any_other(small, eager):
    path, logits_NK = eager
    # Here in this process; that it runs in one of its own, the comparison shows.
    answers_NK = open_model(str(path), num_threads=torch.get_num_threads())(
        IMAGES.astype(np.float32) / np.float32(255)
    )
    np.testing.assert_allclose(answers_NK, logits_NK, atol=1e-6)
    told = []
    comparison = compare_artifacts(
        [path, small],
        IMAGES,
        batch_sizes=(1,),
        num_rounds=2,
        min_seconds=0.01,
        progress=lambda done, total, note="": told.append((done, total)),
    )
    (row,) = comparison.ratios
    assert row.reference == "eager mlp.eager.json"
    assert row.verdict == "faster"  # calling four modules alone takes longer
    facts = comparison.facts["files"]["eager mlp.eager.json"]
    assert facts["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["weights"] == "trained"
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_ratios_are_of_neighbours():
    # The machine got four times slower between the rounds; the ratio did not change.
    row = ratio_of("b", [2.0, 4.0, 8.0], "a", [1.0, 2.0, 4.0])
    assert (row["ratio"], row["lower"], row["upper"]) == (2, 2, 2)
    row = ratio_of("b", [1.0, 2.0, 3.0, 4.0, 5.0], "a", [1.0] * 5)
    assert (row["lower"], row["ratio"], row["upper"], row["num_rounds"]) == (2, 3, 4, 5)


def test_what_cannot_be_compared(small, tmp_path):
    with pytest.raises(InputError) as raised:
        compare_artifacts([small], IMAGES, num_rounds=1)
    assert [line.split(";")[0] for line in raised.value.problems] == [
        "1 file to compare",
        "1 round",
    ]
    (tmp_path / "file.bin").write_bytes(b"?")
    with pytest.raises(InputError, match=r"not known what runs .*file\.bin"):
        compare_artifacts([small, tmp_path / "file.bin"], IMAGES)


def test_the_runtime_is_told_by_the_file(tmp_path):
    for name in ("net.xml", "net.bin", "net.onnx", "other.bin"):
        (tmp_path / name).write_bytes(b"1234")
    file = runtime_file(tmp_path / "net.onnx")
    assert (file.runtime, file.files, file.size_bytes) == ("onnx", (tmp_path / "net.onnx",), 4)
    assert file.packages == ("onnxruntime", "numpy")
    with pytest.raises(InputError, match=r"holds net\.onnx, net\.xml"):
        runtime_file(tmp_path)
    (tmp_path / "net.xml").unlink()
    assert runtime_file(tmp_path) == file
    artifact = Artifact("onnx", "float32", tmp_path, ("net.onnx", "other.bin"))
    assert runtime_file(artifact).files == (tmp_path / "net.onnx", tmp_path / "other.bin")
    with pytest.raises(InputError, match="no runtime 'coreml' can run"):
        runtime_file(tmp_path / "net.onnx", "coreml")


def test_any_runtime_can_be_measured(tmp_path, monkeypatch):
    """A runtime is a script, and its noise on standard output is not taken for its answer."""
    script = tmp_path / "doubler.py"
    script.write_text(
        "import numpy as np\n"
        "PACKAGES = ('numpy', 'no-such-distribution')\n"
        "class Model:\n"
        "    def __init__(self):\n"
        "        self.facts = {'num_calls': np.int64(0)}\n"
        "    def __call__(self, images_NCHW):\n"
        "        print('{\"noise\": 1}', flush=True)\n"
        "        self.facts['num_calls'] += 1\n"
        "        return 2 * images_NCHW.mean(axis=(2, 3))\n"
        "def open_model(path, *, num_threads):\n"
        "    if num_threads == 3:\n"
        "        import no_such_runtime\n"
        "    return Model()\n"
    )
    monkeypatch.setattr(RuntimeFile, "script", script)
    model = tmp_path / "model.doubled"
    model.write_bytes(b"")
    file = RuntimeFile(model, "openvino", (model,))
    latency = measure_latency(file, IMAGES, batch_sizes=(1,), num_threads=(1,), min_seconds=0)
    assert latency.facts["num_calls"] > 0
    assert latency.facts["runtime"] == "openvino"
    told = describe_fresh(file)
    assert set(told["versions"]) == {"numpy"}
    assert {"processor", "num_cores", "python"} <= set(told["machine"])
    with pytest.raises(MissingExtraError, match=r"'no_such_runtime' .*understudy\[openvino\]"):
        measure_latency(file, IMAGES, num_threads=(3,))


def test_the_profile_command_of_a_file(small):
    text = profile_command(str(small), device="phone", batches=[2])
    assert "small.onnx in onnx on this machine" in text
    assert "MatMul" in text
    assert "not measured" in text
    assert "times, memory and energy are of this machine, not of: A phone" in text
    answer = json.loads(
        profile_command(str(small.parent), device="cortex-m7", batches=[1], as_json=True)
    )
    profile = answer["profile"]
    assert profile["size_bytes"] == small.stat().st_size
    assert profile["energy"]["method"] in ("counter", "not measured")
    assert {row["status"] for row in profile["budget"]} == {"not_measured"}
    assert profile["notes"][0].startswith("flash and RAM are known of C code only")
    assert answer["comparison"] is None


def test_the_server_is_this_machine_and_its_power_an_estimate(small):
    profile = json.loads(
        profile_command(str(small), device="server-cpu", batches=[1], as_json=True)
    )["profile"]
    statuses = {row["name"]: row["status"] for row in profile["budget"]}
    assert statuses == {"latency_ms": "passed", "peak_memory_bytes": "passed"}
    assert profile["notes"] == []
    energy = profile["energy"]
    if energy["method"] == "estimate":  # no counters here
        row = profile["latency"]["measurements"][0]
        assert energy["energy_mj"] == pytest.approx(15 * row["p50_ms"])
        assert energy["source"].startswith("15 W (assumed, ")


def test_the_profile_command_says_everything_that_is_wrong(small, tmp_path):
    with pytest.raises(InputError, match=r"no file 'paper_studnt' \(did you mean 'paper_student'"):
        profile_command("paper_studnt")
    with pytest.raises(InputError, match="--threads is 0, many"):
        profile_command(str(small), threads=["0", "many"])
    with pytest.raises(InputError) as raised:
        profile_command(str(small), batches=[0], against=str(small), host="user@device")
    assert len(raised.value.problems) == 2
    with pytest.raises(InputError, match="shape of the pictures is '3x0x3'"):
        profile_command("paper_student", shape="3x0x3")
    with pytest.raises(InputError, match="no device 'fone'"):
        profile_command(str(small), device="fone")
    with pytest.raises(InputError, match="is an export target and"):
        profile_command(str(small), against="onnx")
    (tmp_path / "student.eager.json").write_text("{}")
    with pytest.raises(InputError, match="does not describe a network"):
        open_model(str(tmp_path / "student.eager.json"), num_threads=torch.get_num_threads())

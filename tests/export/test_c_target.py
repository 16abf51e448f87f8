import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("emx_onnx_cgen", reason="needs the extra 'c'")

from understudy.errors import InputError, ModelError
from understudy.export.c_network import CNetwork, generate_network
from understudy.export.c_project import make_vector, write_project
from understudy.export.c_text import c_string
from understudy.export.target import Artifact, ExportSource, find_target, open_artifact
from understudy.models.separable import SeparableNet

IMAGE_SHAPE = (3, 16, 16)
# What would end a string, a comment or a line, or be read as another character.
CLASS_NAMES = ('a "quote" */', "größe\n", "back\\slash", "tri??/graph")
TIMEOUT_SECONDS = 120
MACHINES = {
    "native": ("make", "cc"),
    "aarch64": ("make", "aarch64-linux-gnu-gcc", "qemu-aarch64-static"),
    "cortex-m4": ("make", "arm-none-eabi-gcc", "qemu-system-arm"),
    "cortex-m7": ("make", "arm-none-eabi-gcc", "qemu-system-arm"),
}


class Normalized(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.1]).reshape(1, 3, 1, 1))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if not images_NCHW.is_floating_point():
            images_NCHW = images_NCHW.float() / 255
        return self.network((images_NCHW - self.mean) / self.std)


def make_images(num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (num_images, *IMAGE_SHAPE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def make_source(network: nn.Module) -> ExportSource:
    torch.manual_seed(0)
    model = Normalized(network)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model(make_images(32))  # running statistics that are not 0 and 1
    return ExportSource(
        model.eval(),
        IMAGE_SHAPE,
        CLASS_NAMES,
        calibration_NCHW=make_images(16),
        metadata={"recipe_hash": "c0ffee"},
    )


class Calibration:
    def __init__(self, images_NCHW: Tensor) -> None:
        pixels = images_NCHW.numpy().astype(np.float32) / np.float32(255)
        self.feeds = iter([{"images": pixels[i : i + 1]} for i in range(len(pixels))])

    def get_next(self) -> dict | None:
        return next(self.feeds, None)


def quantize(path: Path, target: Path, *, activation: str, weight: str, per_channel: bool) -> Path:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        path,
        target,
        Calibration(make_images(16)),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType[activation],
        weight_type=QuantType[weight],
        per_channel=per_channel,
    )
    return target


def onnx_logits(path: Path, images_NCHW: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pixels = images_NCHW.numpy().astype(np.float32) / np.float32(255)
    return np.concatenate([session.run(None, {"images": image[None]})[0] for image in pixels])


def project(folder: Path, path: Path, precision: str) -> Artifact:
    network = generate_network(path)
    vector = make_vector(path, IMAGE_SHAPE, make_images(3), precision=precision)
    files = write_project(
        folder,
        network,
        vector,
        class_names=CLASS_NAMES,
        precision=precision,
        metadata={"recipe_hash": "c0ffee"},
    )
    return Artifact("c", precision, folder, files, batch="one")


def run(*command: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)),
        input=stdin if stdin is not None else b"",
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("UNDERSTUDY_NATIVE", "0")
        yield


@pytest.fixture(scope="module")
def source() -> ExportSource:
    return make_source(SeparableNet(num_classes=4, stages=[[8, 1], [16, 2]]))


@pytest.fixture(scope="module")
def onnx_path(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    return find_target("onnx").export(source, folder, precision="float32").path


@pytest.fixture(scope="module")
def float32(source, tmp_path_factory) -> Artifact:
    folder = tmp_path_factory.mktemp("float32")
    return find_target("c").export(source, folder, precision="float32")


@pytest.fixture(scope="module")
def qdq_path(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("onnx-int8")
    return find_target("onnx").export(source, folder, precision="int8").path


@pytest.fixture(scope="module")
def int8(source, tmp_path_factory) -> Artifact:
    return find_target("c").export(source, tmp_path_factory.mktemp("int8"), precision="int8")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_every_machine_computes_what_onnx_runtime_computes(precision, machine, request):
    missing = [tool for tool in MACHINES[machine] if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    artifact = request.getfixturevalue(precision)
    done = run("make", "-s", "-C", artifact.folder, f"run-{machine}")
    output = done.stdout.decode()
    assert done.returncode == 0, output + done.stderr.decode()
    assert re.search(r"^PASS: 4 images", output, re.M)
    assert "wrong arguments: refused" in output
    if precision == "int8":  # the logits are the first floats after the pixels
        assert output.count("(0 ulp)") + output.count("(1 ulp)") == 4


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_runtime_answers_as_onnx_runtime_does(precision, request):
    path = request.getfixturevalue("qdq_path" if precision == "int8" else "onnx_path")
    images_NCHW = make_images(40)
    expected_NK = onnx_logits(path, images_NCHW)
    running = open_artifact(request.getfixturevalue(precision))
    logits_NK = running(images_NCHW.numpy().astype(np.float32) / np.float32(255))
    if precision == "int8":
        np.testing.assert_array_max_ulp(logits_NK, expected_NK, maxulp=1)
    else:
        np.testing.assert_allclose(logits_NK, expected_NK, atol=1e-5 * np.abs(expected_NK).max())
    assert (logits_NK.argmax(1) == expected_NK.argmax(1)).all()


@pytest.mark.parametrize(
    ("activation", "weight", "per_channel"),
    [("QUInt8", "QInt8", False), ("QUInt8", "QUInt8", False)],
)
def test_every_flavour_of_quantisation_is_computed_bit_for_bit(
    activation, weight, per_channel, onnx_path, tmp_path
):
    path = quantize(
        onnx_path,
        tmp_path / "int8.onnx",
        activation=activation,
        weight=weight,
        per_channel=per_channel,
    )
    images_NCHW = make_images(10)
    artifact = project(tmp_path, path, "int8")
    running = open_artifact(artifact)
    logits_NK = running(images_NCHW.numpy().astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(logits_NK, onnx_logits(path, images_NCHW))
    code = (artifact.folder / "student_network.c").read_text()
    # Zero points that are 0 are not taken off.
    assert ("- (int32_t)(weight_zero_point[" in code) == (weight == "QUInt8")


def test_int8_takes_less_flash_and_memory(float32, qdq_path):
    network = generate_network(qdq_path)
    assert network.joined
    assert set(network.operators) >= {"QLinearConv", "QGemm"}
    assert not set(network.operators) & {"Conv", "Gemm"}
    assert network.arena_bytes < 0.5 * float32.facts["static_buffer_bytes"]
    assert network.weight_bytes < float32.facts["weight_bytes"]


def test_the_artifact_says_what_it_is(float32, source):
    assert float32.files[0] == "student.c"
    assert float32.batch == "one"
    assert {path.name for path in float32.folder.iterdir()} - {"build"} == set(float32.files)
    num_weights = sum(p.numel() for p in source.model.parameters())
    assert float32.facts["weight_bytes"] == pytest.approx(4 * num_weights, rel=0.1)
    assert float32.facts["input_bytes"] == 4 * 3 * 16 * 16
    library = ctypes.CDLL(str(compile_library(float32.folder)))
    # After nine words: the class names, as the C compiler read them.
    words = (ctypes.c_char_p * 13).in_dll(library, "student_info")
    assert [words[9 + i].decode() for i in range(4)] == list(CLASS_NAMES)
    assert words[6] == b"c0ffee"


def compile_library(folder: Path) -> Path:
    library = folder.parent / f"{folder.name}.so"
    sources = [folder / "student.c", folder / "student_network.c"]
    done = run("cc", "-shared", "-fPIC", "-ffp-contract=off", "-o", library, *sources, "-lm")
    assert done.returncode == 0, done.stderr
    return library


def test_the_same_model_gives_the_same_code(float32, onnx_path):
    code = (float32.folder / "student_network.c").read_text()
    assert generate_network(onnx_path).code == code


def test_residual_additions_keep_what_they_add(tmp_path):
    network = SeparableNet(num_classes=4, stages=[[8, 2], [8, 1], [8, 1]], residual=True)
    source = make_source(network)
    path = find_target("onnx").export(source, tmp_path, precision="float32").path
    images_NCHW = make_images(10)
    expected_NK = onnx_logits(path, images_NCHW)
    running = open_artifact(project(tmp_path, path, "float32"))
    logits_NK = running(images_NCHW.numpy().astype(np.float32) / np.float32(255))
    np.testing.assert_allclose(logits_NK, expected_NK, atol=1e-5 * np.abs(expected_NK).max())


def test_a_missing_operator_is_named_with_its_layer(tmp_path):
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weights = {
        "body.conv.weight": np.ones((4, 3, 3, 3), np.float32),
        "rois": np.array([[0, 0, 0, 15, 15]], np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "body.conv.weight"], ["a"], "n0", pads=[1, 1, 1, 1]),
        helper.make_node("MaxRoiPool", ["a", "rois"], ["b"], "n1", pooled_shape=[1, 1]),
        helper.make_node("Flatten", ["b"], ["logits"], "n2"),
    ]
    shape = ["batch", *IMAGE_SHAPE]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "student.onnx")
    with pytest.raises(ModelError, match=r"MaxRoiPool after layer body\.conv cannot be translated"):
        generate_network(tmp_path / "student.onnx")


def test_names_that_would_end_a_comment_do_not(onnx_path, tmp_path):
    model = onnx.load(onnx_path)
    old, new = model.graph.node[0].output[0], "x */ int y; /*"
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    onnx.save(model, tmp_path / "student.onnx")
    network = generate_network(tmp_path / "student.onnx")
    assert isinstance(network, CNetwork)
    assert "int y" not in network.code


def test_the_self_test_fails_on_a_wrong_answer(float32, tmp_path):
    folder = shutil.copytree(float32.folder, tmp_path / "c", ignore=shutil.ignore_patterns("build"))
    header = (folder / "test_vector.h").read_text()
    start = header.index("test_logits")
    changed = re.sub(r"p([+-]\d+)f", lambda found: f"p{int(found[1]) + 1}f", header[start:])
    (folder / "test_vector.h").write_text(header[:start] + changed)
    done = run("make", "-s", "-C", folder, "run-native")
    assert done.returncode != 0
    assert b"FAIL: 4 images" in done.stdout


def test_the_program_reads_images_from_standard_input(float32):
    assert run("make", "-s", "-C", float32.folder, "native").returncode == 0
    program = float32.folder / "build" / "native" / "classify"
    pixels = make_images(7).numpy().astype("<f4") / np.float32(255)
    done = run(program, stdin=pixels.tobytes())
    assert done.returncode == 0
    logits_NK = np.frombuffer(done.stdout, "<f4").reshape(7, 4)
    np.testing.assert_array_equal(logits_NK, open_artifact(float32)(pixels))
    short = run(program, stdin=pixels.tobytes()[:-4])
    assert (short.returncode, short.stderr) == (1, b"image 6: 3068 bytes instead of 3072\n")
    pixels[2, 0, 0, 0] = np.nan
    bad = run(program, stdin=pixels.tobytes())
    assert (bad.returncode, bad.stderr) == (1, b"image 2: a pixel is NaN or outside [0, 1]\n")
    assert run(program, stdin=b"").returncode == 1


def test_the_runtime_refuses_what_the_code_refuses(float32):
    running = open_artifact(float32)
    pixels = np.zeros((2, *IMAGE_SHAPE), np.float32)
    for bad in (np.nan, np.inf, 1.5, -1e-6):
        pixels[1, 2, 3, 4] = bad
        with pytest.raises(ValueError, match=r"image 1: a pixel is NaN or outside \[0, 1\]"):
            running(pixels)
    with pytest.raises(ValueError, match=r"expected \[n, 3, 16, 16\]"):
        running(np.zeros((2, 3, 16, 15), np.float32))


def test_threads_and_copies_do_not_disturb_each_other(float32):
    pixels = make_images(16).numpy().astype(np.float32) / np.float32(255)
    runnings = [open_artifact(float32) for _ in range(4)]
    expected_NK = runnings[0](pixels)
    with ThreadPoolExecutor(4) as pool:
        for logits_NK in pool.map(lambda i: runnings[i % 4](pixels), range(40)):
            np.testing.assert_array_equal(logits_NK, expected_NK)


def test_weights_of_nan_come_back_as_an_error(float32, tmp_path):
    folder = shutil.copytree(float32.folder, tmp_path / "c", ignore=shutil.ignore_patterns("build"))
    code = (folder / "student_network.c").read_text()
    (folder / "student_network.c").write_text(
        re.sub(r"-?0x1\.\w+p[+-]\d+f", "(0.0f / 0.0f)", code, count=100000)
    )
    running = open_artifact(Artifact("c", "float32", folder, float32.files))
    with pytest.raises(ValueError, match="image 0: the network returned NaN or infinity"):
        running(np.zeros((1, *IMAGE_SHAPE), np.float32))


def test_a_damaged_project_or_a_missing_compiler_is_an_input_error(float32, tmp_path, monkeypatch):
    folder = shutil.copytree(float32.folder, tmp_path / "c", ignore=shutil.ignore_patterns("build"))
    code = (folder / "student_network.c").read_text()
    (folder / "student_network.c").write_text(code[: len(code) // 2])
    damaged = Artifact("c", "float32", folder, float32.files)
    with pytest.raises(InputError, match="cannot compile"):
        open_artifact(damaged)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(InputError, match="no C compiler 'no-such-compiler'"):
        open_artifact(float32)


def test_strings_are_escaped():
    assert c_string('a"b\\c\nd??/é') == '"a\\042b\\134c\\012d\\077\\077/\\303\\251"'

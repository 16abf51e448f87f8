"""`understudy profile` of what a suffix does not tell: microcontroller files, C code, pages."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from understudy.artifacts import Record
from understudy.errors import InputError
from understudy.evaluate.browser import BrowserRun
from understudy.evaluate.c_size import c_model_size, compiled_bytes
from understudy.evaluate.profile import profile_command
from understudy.evaluate.runtime_files import runtime_file
from understudy.evaluate.tflm_arena import arena_bytes
from understudy.evaluate.tflm_instructions import TOOL, TflmInstructions, count_instructions
from understudy.export.target import ExportSource, find_target

SHAPE = (1, 8, 8)


def source() -> ExportSource:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 3)
    ).eval()
    images_NCHW = torch.randint(0, 256, (20, *SHAPE), dtype=torch.uint8)
    return ExportSource(model, SHAPE, ("a", "b", "c"), images_NCHW)


def profiled(*arguments, **options):
    text = profile_command(*map(str, arguments), **{"batches": [1], **options}, as_json=True)
    return json.loads(text)["profile"]


@pytest.fixture(scope="module")
def tflm(tmp_path_factory):
    pytest.importorskip("tflite_micro", reason="needs the extra 'tflm'")
    pytest.importorskip("litert_torch", reason="needs the extra 'tflm'")
    return find_target("tflm").export(source(), tmp_path_factory.mktemp("tflm"), precision="int8")


@pytest.mark.slow
def test_a_file_for_microcontrollers_is_measured_in_their_interpreter(tflm, tmp_path, monkeypatch):
    assert runtime_file(tflm.path).runtime == "tflite"
    profile = profiled(tflm.path, runtime="tflm", shape="1,8,8")
    assert profile["runtime"] == "tflm"
    assert profile["arena_bytes"] == tflm.facts["arena_bytes"]
    if shutil.which(TOOL) is not None:
        assert profile["instructions"]["instructions_per_image"] > 8 * 8
    monkeypatch.setattr("understudy.evaluate.tflm_instructions.TOOL", "no-such-tool")
    told = profile_command(str(tflm.path), runtime="tflm", shape="1,8,8", device="cortex-m7")
    assert f"arena    {tflm.facts['arena_bytes'] / 1024:.4g} KiB" in told
    assert "the RAM is the arena" in told
    assert "work     instructions not measured: no-such-tool is not installed" in told
    # A limit below the arena is missed, one above it is kept.
    for limit, status in ((tflm.facts["arena_bytes"], "passed"), (1000, "failed")):
        path = tmp_path / "chip.yaml"
        limits = {"ram_bytes": limit}
        chip = {"title": "chip", "runtime": "tflm", "precision": "int8", "limits": limits}
        path.write_text(yaml.safe_dump(chip))
        (row,) = profiled(tflm.path, runtime="tflm", shape="1,8,8", device=str(path))["budget"]
        assert (row["status"], row["measured"]) == (status, tflm.facts["arena_bytes"])


@pytest.mark.slow
def test_a_releases_folder_runs_as_its_record_says(tflm, tmp_path):
    folder = tmp_path / "artifact-tflm-int8"
    shutil.copytree(tflm.folder, folder)
    assert runtime_file(folder).runtime == "tflite"  # no record: the suffix
    Record(kind="artifact-tflm-int8", key="key", seed=0, payload=tflm.to_json()).save(folder)
    assert runtime_file(folder).runtime == "tflm"
    assert runtime_file(folder, "tflite").runtime == "tflite"
    assert profiled(folder, shape="1,8,8")["runtime"] == "tflm"
    record = folder / "record.json"
    record.write_text(record.read_text().replace('"tflm"', '"onnx"'))
    with pytest.raises(InputError, match="was changed after it was written"):
        runtime_file(folder)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(TOOL) is None, reason=f"{TOOL} is not installed")
def test_instructions_are_those_of_one_picture_whatever_else_runs(tflm, tmp_path):
    image_1CHW = torch.randint(0, 256, (1, *SHAPE), dtype=torch.uint8)
    alone = count_instructions(tflm.path, image_1CHW)
    thrice = count_instructions(tflm.path, image_1CHW.expand(3, -1, -1, -1))
    assert isinstance(alone, TflmInstructions)
    assert isinstance(thrice, TflmInstructions)
    assert (alone.num_images, thrice.num_images) == (1, 3)
    # Neither Python nor opening the file is counted, and one picture does as much as the other.
    assert alone.instructions_per_image == thrice.instructions_per_image
    num_macs = 9 * 9 * 8 + 9 * 8 * 3
    assert num_macs < alone.instructions_per_image < 100 * num_macs
    (tmp_path / "broken.tflite").write_bytes(b"nothing")
    told = count_instructions(tmp_path / "broken.tflite", image_1CHW)
    assert str(told).startswith("valgrind failed (exit code 1): ")


def test_an_arena_that_is_not_found_is_none(tmp_path):
    (tmp_path / "broken.tflite").write_bytes(b"nothing")
    assert arena_bytes(tmp_path / "broken.tflite") is None


def test_a_runtime_that_there_is_none_of_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match=r"no runtime 'tfml' \(did you mean 'tflm'\?\)"):
        profile_command(str(tmp_path), runtime="tfml")
    with pytest.raises(InputError, match="--runtime onnx with the network 'resnet20'"):
        profile_command("resnet20", runtime="onnx")


@pytest.mark.parametrize(
    "name", ["student.tflite", "student.pte", "student.param", "student.c", "student.xml"]
)
def test_a_file_that_tells_no_shape_is_not_opened_for_it(name, tmp_path, monkeypatch):
    """This machine may lack its runtime, where another one is to measure it."""
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("opened"))
    with pytest.raises(InputError, match=r"does not say what pictures it takes.*--shape C,H,W"):
        profile_command(str(tmp_path / name), host="user@device")


# C code


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    pytest.importorskip("emx_onnx_cgen", reason="needs the extra 'c'")
    folder = tmp_path_factory.mktemp("c")
    return find_target("c").export(source(), folder, precision="float32")


def test_c_code_counts_as_compiled_and_not_as_text(code, tmp_path):
    if shutil.which("cc") is None or shutil.which("size") is None:
        pytest.skip("needs cc and size")
    found = compiled_bytes(code.folder)
    weights = code.facts["weight_bytes"]
    assert weights <= found < weights + 40_000
    assert found < code.size_bytes / 4
    path = tmp_path / "board.yaml"
    limits = {"model_size_bytes": found}
    board = {"title": "board", "runtime": "c", "precision": "float32", "limits": limits}
    path.write_text(yaml.safe_dump(board))
    (row,) = profiled(code.folder, shape="1,8,8", device=str(path))["budget"]
    assert (row["measured"], row["status"]) == (found, "passed")
    assert row["detail"].startswith("code and weights as compiled here: 100.0% of")


def test_where_code_cannot_be_compiled_its_weights_count(code, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiled_bytes(code.folder) is None
    size, counted = c_model_size({}, compiled=None, weight_bytes=5)
    assert (size, counted) == (5, "weights alone, the code was not compiled")
    chip = {"flash_bytes": 9, "cpu": "cortex-m4"}
    assert c_model_size(chip, compiled=7, weight_bytes=5) == (9, "flash of a cortex-m4")


# Pages


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page's folder, and a browser that answers at once."""
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "index.html").write_text("x" * 1000)
    (folder / "model.json").write_text(json.dumps({"image_shape": SHAPE}))
    (folder / "student.onnx").write_bytes(b"")
    seen = []

    def run(artifact, images):
        seen.append((artifact, images))
        logits_NK = np.zeros((len(images), 3), np.float32)
        return BrowserRun(logits_NK, 9.0, 1.5, 2.5, 3.5, 50, "a", 0.0, "Chromium 1", ())

    monkeypatch.setattr("understudy.evaluate.browser.run_in_browser", run)
    return folder, seen


def test_a_page_is_measured_in_the_browser(page):
    folder, seen = page
    for target in (folder, folder / "index.html"):
        profile = profiled(target, runtime="web", device="browser")
        assert (profile["runtime"], profile["memory"]) == ("web", None)
        (row,) = profile["latency"]["measurements"]
        assert (row["p50_ms"], row["p95_ms"], row["load_ms"]) == (1.5, 2.5, 9.0)
        artifact, images_NCHW = seen[-1]
        assert artifact.path == folder / "index.html"
        assert images_NCHW.shape[1:] == SHAPE
        assert profile["size_bytes"] == sum(p.stat().st_size for p in folder.iterdir())
        status = {limit["name"]: limit["status"] for limit in profile["budget"]}
        assert status == {"model_size_bytes": "passed", "latency_ms": "not_measured"}
    text = profile_command(str(folder), runtime="web", device="browser")
    assert "page in Chromium 1 on this machine" in text
    assert "page, network and runtime: " in text


@pytest.mark.parametrize(("at_most", "status"), [(3.5, "passed"), (3.4, "failed")])
@pytest.mark.parametrize("percentile", [50, 95, 99])
def test_a_limit_on_any_percentile_of_a_page_is_judged(page, tmp_path, percentile, at_most, status):
    folder, _ = page
    at_most -= {50: 2, 95: 1, 99: 0}[percentile]
    limits = {"latency_ms": {"percentile": percentile, "at_most": at_most}}
    here = {"title": "here", "runtime": "web", "precision": "float32", "is_this_machine": True}
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(here | {"limits": limits}))
    (row,) = profiled(folder, runtime="web", device=str(path))["budget"]
    assert (row["status"], row["measured"]) == (status, {50: 1.5, 95: 2.5, 99: 3.5}[percentile])


def test_a_released_page_goes_to_the_browser_by_its_record(page):
    folder, seen = page
    payload = {"target": "web", "precision": "int8", "files": ["index.html", "model.json"]}
    Record(kind="artifact-web-int8", key="key", seed=0, payload=payload).save(folder)
    assert profiled(folder)["runtime"] == "web"
    assert seen[0][0].files == ("index.html", "model.json")
    # As what such a page is refused tells: the network in it may be measured by itself.
    assert runtime_file(folder, "onnx").path == folder / "student.onnx"


def test_what_a_page_cannot_be_asked_is_one_clear_error(page, tmp_path):
    folder, seen = page
    with pytest.raises(InputError, match=r"--host, --batch, --threads with a page") as raised:
        profile_command(
            str(folder), runtime="web", batches=[1, 100], threads=["all"], host="user@device"
        )
    assert raised.value.exit_code == 2
    with pytest.raises(InputError, match="holds no page"):
        profile_command(str(tmp_path), runtime="web")
    assert not seen

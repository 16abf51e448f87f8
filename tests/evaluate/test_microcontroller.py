import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("emx_onnx_cgen", reason="needs the extra 'c'")

from understudy.errors import InputError, UnderstudyError
from understudy.evaluate.microcontroller import (
    TOOLS,
    build,
    measure_microcontroller,
    require_tools,
    run_emulated,
)
from understudy.export.target import Artifact, ExportSource, find_target, open_artifact
from understudy.models.separable import SeparableNet

IMAGE_SHAPE = (3, 16, 16)
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS),
    reason=f"needs the Debian packages {', '.join(TOOLS.values())}",
)


def make_images(num_images):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (num_images, *IMAGE_SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    torch.manual_seed(0)
    model = SeparableNet(num_classes=4, stages=[[8, 1], [16, 2]]).eval()
    source = ExportSource(model, IMAGE_SHAPE, ("a", "b", "c", "d"))
    return find_target("c").export(source, tmp_path_factory.mktemp("c"), precision="float32")


@pytest.fixture(scope="module")
def measured(artifact, tmp_path_factory):
    images = make_images(12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        expected = open_artifact(artifact)(images.astype(np.float32) / np.float32(255))
    return {
        cpu: measure_microcontroller(artifact, images, cpu=cpu, expected=expected)
        for cpu in ("cortex-m4", "cortex-m7")
    }


@needs_tools
@pytest.mark.parametrize("cpu", ["cortex-m4", "cortex-m7"])
def test_a_core_is_measured(cpu, artifact, measured):
    cost = measured[cpu]
    assert cost.cpu == cpu
    assert cost.num_images == 12
    assert cost.top1_agreement == 1.0
    # The same operations in the same order, each rounded alike.
    assert cost.max_abs_difference == 0.0
    weight_bytes, buffer_bytes = (
        artifact.facts[k] for k in ("weight_bytes", "static_buffer_bytes")
    )
    assert weight_bytes < cost.flash_bytes < weight_bytes + 16_000
    assert buffer_bytes <= cost.ram_bytes < buffer_bytes + 256
    assert 64 <= cost.peak_stack_bytes < 2048
    # 145,000 multiply-adds; from one to fifty instructions for each.
    assert 145_000 < cost.least_instructions <= cost.instructions_per_image
    assert cost.instructions_per_image <= cost.most_instructions < 50 * 145_000
    assert f"-mcpu={cpu}" in cost.flags
    assert "-ffp-contract=off" in cost.flags
    assert "arm-none-eabi-gcc" in cost.compiler
    assert "QEMU" in cost.emulator
    assert cost.to_json()["flash_bytes"] == cost.flash_bytes


@pytest.fixture(scope="module")
def built(artifact, tmp_path_factory):
    folder = shutil.copytree(artifact.folder, tmp_path_factory.mktemp("built") / "c")
    build(folder, "cortex-m4", optimization="-O3")
    return folder


@needs_tools
def test_counts_repeat_and_do_not_depend_on_the_number_of_images(built, measured):
    pixels = make_images(24).astype(np.float32) / np.float32(255)
    few, many, again = (
        run_emulated(built, pixels[:n], cpu="cortex-m4", timeout_seconds=60) for n in (12, 24, 12)
    )
    assert few.counts == again.counts
    assert many.counts["total_ticks"] == pytest.approx(2 * few.counts["total_ticks"], rel=1e-3)
    # A tick is 40 instructions.
    assert few.counts["total_ticks"] * 40 / 12 == measured["cortex-m4"].instructions_per_image
    np.testing.assert_array_equal(few.logits_NK, many.logits_NK[:12])


@needs_tools
def test_a_student_too_large_for_the_board_is_an_input_error(artifact, tmp_path):
    folder = shutil.copytree(artifact.folder, tmp_path / "c")
    code = (folder / "student_network.c").read_text()
    (folder / "student_network.c").write_text(re.sub(r"(arena_float)\[\d+\]", r"\1[2000000]", code))
    with pytest.raises(InputError, match=r"does not fit into the memory of mps2-an386"):
        measure_microcontroller(replace(artifact, folder=folder), make_images(1))


@needs_tools
def test_a_failure_on_the_board_says_why(built):
    pixels = make_images(2).astype(np.float32) / np.float32(255)
    with pytest.raises(UnderstudyError, match=r"2 images on cortex-m4 was not done after 0\.01 s"):
        run_emulated(built, pixels, cpu="cortex-m4", timeout_seconds=0.01)
    pixels[1, 0, 0, 0] = np.nan
    with pytest.raises(UnderstudyError, match=r"image 1: a pixel is NaN or outside \[0, 1\]"):
        run_emulated(built, pixels, cpu="cortex-m4", timeout_seconds=60)


@needs_tools
def test_a_fault_on_the_board_ends_the_run(artifact, tmp_path):
    folder = shutil.copytree(artifact.folder, tmp_path / "c")
    code = (folder / "student_network.c").read_text()
    fault = "void student_network_run(const float *pixels_chw, float *logits_k) {"
    assert fault in code
    crash = f"{fault}\n    *(volatile int *)0xf0000000u = 1;"
    (folder / "student_network.c").write_text(code.replace(fault, crash))
    with pytest.raises(UnderstudyError, match="exit code 99"):
        measure_microcontroller(replace(artifact, folder=folder), make_images(1))


def test_missing_tools_are_named_with_their_packages(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(InputError) as caught:
        require_tools("cortex-m7")
    for tool, package in TOOLS.items():
        assert tool in str(caught.value)
        assert package in str(caught.value)
    with pytest.raises(InputError, match="no emulated board with the core 'cortex-m0'"):
        require_tools("cortex-m0")


@needs_tools
def test_what_does_not_fit_is_an_input_error(artifact):
    with pytest.raises(InputError, match="768 pixels an image"):
        measure_microcontroller(artifact, make_images(2)[:, :, :8])
    with pytest.raises(InputError, match="expected an artifact of the target 'c'"):
        measure_microcontroller(replace(artifact, target="onnx"), make_images(1))

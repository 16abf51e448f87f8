"""Exported pages run in a real browser: the logits of ONNX Runtime, and clear failures."""

from __future__ import annotations

import base64
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from understudy.errors import InputError, MissingExtraError, UnderstudyError
from understudy.evaluate.browser import (
    BROWSER_NAMES,
    NUM_WARMUP,
    _classify,
    _percentiles,
    find_browser,
    run_in_browser,
)
from understudy.export.onnx_run import open_session, run_images
from understudy.export.target import Artifact, ExportSource, Precision
from understudy.export.targets import web

pytestmark = pytest.mark.browser

CLASS_NAMES = tuple("abcde")
needs_browser = pytest.mark.skipif(
    not any(shutil.which(name) for name in BROWSER_NAMES), reason="no Chromium is installed"
)


@pytest.fixture(scope="module")
def node_modules(pytestconfig: pytest.Config) -> Path:
    """The runtime's package, fetched by npm once and kept in pytest's cache."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDERSTUDY_HOME", str(pytestconfig.cache.mkdir("understudy-home")))
        patch.delenv(web.NODE_MODULES_VARIABLE, raising=False)
        try:
            return web.find_runtime().parent
        except InputError as error:
            if "npm cannot fetch" in str(error):
                pytest.skip(str(error))
            raise


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Grey [n, C, H, W]; enough that each is timed once."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (60, 1, 10, 14), generator=generator, dtype=torch.uint8)


def exported(precision: Precision, images: torch.Tensor, folder: Path, packages: Path) -> Artifact:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 6, 5)
    ).eval()
    source = ExportSource(model, (1, 10, 14), CLASS_NAMES, calibration_NCHW=images)
    return web.export(source, folder, precision=precision, node_modules=packages)


@pytest.fixture(scope="module")
def artifact(
    images: torch.Tensor, node_modules: Path, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    folder = tmp_path_factory.mktemp("float32")
    return exported("float32", images, folder, node_modules)


def checked_error(artifact: Artifact, images: torch.Tensor) -> float:
    """Check all that a run tells; return how far its logits are from those of ONNX Runtime."""
    run = run_in_browser(artifact, images.numpy())
    expected_NK = run_images(open_session(artifact.path.with_name("student.onnx")), images)
    assert run.shown_class == CLASS_NAMES[int(expected_NK[0].argmax())]
    assert run.picture_max_abs_difference == 0
    assert 0 < run.latency_p50_ms <= run.latency_p95_ms <= run.latency_p99_ms
    assert run.load_ms > 0
    assert run.num_runs == len(images)
    assert run.browser.startswith("Chromium ")
    assert "/student.onnx" in run.requests
    assert all(request.lstrip("/") in artifact.files for request in run.requests)
    assert "logits_NK" not in run.to_json()
    return float(np.abs(run.logits_NK - expected_NK.numpy()).max())


@needs_browser
def test_float32_logits_are_those_of_onnx_runtime(artifact: Artifact, images: torch.Tensor) -> None:
    assert checked_error(artifact, images) < 1e-4


@needs_browser
def test_int8_logits_are_those_of_onnx_runtime(
    images: torch.Tensor, node_modules: Path, tmp_path: Path
) -> None:
    assert checked_error(exported("int8", images, tmp_path, node_modules), images) < 1e-4


@needs_browser
def test_damage_and_requests_to_other_places_are_errors(
    artifact: Artifact, images: torch.Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "page"
    shutil.copytree(artifact.folder, folder)
    copy = replace(artifact, folder=folder)
    index = (folder / "index.html").read_text()
    # The policy would keep the request in; without it the record must show the request.
    policy_start = index.index("<meta http-equiv")
    policy_end = index.index(">", policy_start) + 1
    opened = index[:policy_start] + index[policy_end:]
    (folder / "index.html").write_text(
        opened.replace("</body>", '<img src="http://127.0.0.1:9/spy.png" alt=""></body>')
    )
    with pytest.raises(UnderstudyError, match=r"asked for http://127\.0\.0\.1:9/spy\.png"):
        run_in_browser(copy, images[:1].numpy())
    (folder / "index.html").write_text(index)
    (folder / "student.onnx").write_bytes(b"not a network")
    with pytest.raises(UnderstudyError, match=r"is not the network that model\.json describes"):
        run_in_browser(copy, images[:1].numpy())


def test_a_call_holds_a_hundred_small_pictures_at_most() -> None:
    """Each has a limit of time, and thousands of pictures of a slow network would not keep it."""
    calls: list[int] = []

    class Page:
        def evaluate(self, script: str, given: dict[str, Any]) -> list[dict[str, Any]]:
            pixels = base64.b64decode(given["encoded"])
            calls.append(len(pixels) // given["size"])
            starts = range(0, len(pixels), given["size"])
            return [{"logits": [pixels[start]], "ms": 1.0} for start in starts]

    images_NCHW = (np.arange(250 * 28 * 28) // (28 * 28)).astype(np.uint8)
    logits, times_ms = _classify(Page(), images_NCHW.reshape(250, 1, 28, 28), 120.0)
    assert calls == [NUM_WARMUP, 100, 100, 50]
    assert logits == [[number] for number in range(250)]
    assert len(times_ms) == 250


def test_percentiles_are_those_of_every_other_file() -> None:
    """Nearest rank: each is the time of a run that happened."""
    times_ms = [float(number) for number in range(50, 0, -1)]
    found = _percentiles(times_ms)
    assert found == {"latency_p50_ms": 25.0, "latency_p95_ms": 48.0, "latency_p99_ms": 50.0}


def test_images_and_folder_must_fit(
    artifact: Artifact, images: torch.Tensor, tmp_path: Path
) -> None:
    for wrong in (images.float(), images[:0], images[:, :, :5]):
        with pytest.raises(InputError, match=r"expected uint8 \[n, 1, 10, 14\]"):
            run_in_browser(artifact, wrong.numpy())
    with pytest.raises(InputError, match="holds no page"):
        run_in_browser(replace(artifact, folder=tmp_path), images.numpy())


def test_missing_browser_and_missing_package(
    artifact: Artifact, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no browser is installed") as caught:
        find_browser()
    assert caught.value.exit_code == 2
    assert "apt-get install chromium" in str(caught.value)
    # None in sys.modules is Python's own way to say that an import fails.
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(MissingExtraError, match=r'pip install "understudy\[web\]"'):
        run_in_browser(artifact, images.numpy())

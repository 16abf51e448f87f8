"""The page in headless Chromium: pixels as in Python, clear words for bad files, no requests."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import stat
import struct
import zlib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

from understudy.artifacts import canonical_json
from understudy.data.decode import MAX_PIXELS, decode_into, read_header
from understudy.errors import DataError, InputError, ModelError
from understudy.evaluate.browser import BROWSER_FLAGS, find_browser, serve_folder
from understudy.export.target import Artifact, ExportSource
from understudy.export.targets import web
from understudy.export.web_page import (
    DEFAULT_RESIZE,
    MAX_FILE_BYTES,
    PAGE_FILES,
    ResizeRule,
    describe_model,
    picture_pixels,
)
from understudy.package.manifest import Preprocessing
from understudy.package.manifest import ResizeRule as ManifestRule
from understudy.package.picture import fitted

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=window.hacked=1>"
CLASS_NAMES = ("cat", HOSTILE, "a class with a name that no telephone could show on one line " * 2)
IMAGE_SHAPE = (3, 12, 16)  # wider than high, so that a mix-up of the two shows
PAGE_PIXELS = """async ([encoded, imageShape, resize]) => {
    const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
    const { pictureOf } = await import('./picture.js');
    const { limits } = (await window.understudy.ready).description;
    const description = { image_shape: imageShape, limits, preprocessing: { resize } };
    return Array.from((await pictureOf(new Blob([bytes]), description)).pixels);
}"""


class QuietHandler(SimpleHTTPRequestHandler):
    """What `python -m http.server` serves with, less its log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 7, 3)
    ).eval()


@pytest.fixture(scope="module")
def node_modules(pytestconfig: pytest.Config) -> Path:
    """The runtime's package, fetched by npm once and kept in pytest's cache."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    home = pytestconfig.cache.mkdir("understudy-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDERSTUDY_HOME", str(home))
        patch.delenv(web.NODE_MODULES_VARIABLE, raising=False)
        try:
            return web.find_runtime().parent
        except InputError as error:
            if "npm cannot fetch" in str(error):
                pytest.skip(str(error))
            raise


@pytest.fixture(scope="module")
def artifact(
    model: nn.Module, node_modules: Path, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    source = ExportSource(model, IMAGE_SHAPE, CLASS_NAMES)
    folder = tmp_path_factory.mktemp("web")
    return web.export(source, folder, precision="float32", node_modules=node_modules)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    try:
        executable = find_browser()
    except InputError as error:
        pytest.skip(str(error))
    flags = [flag for flag in BROWSER_FLAGS if not flag.startswith("--host-resolver")]
    # A name that is not loopback's own: plain http from it is no secure context.
    flags.append(
        "--host-resolver-rules=MAP phone.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=flags)
        yield browser
        browser.close()


def watched(browser: Any, *, width: int = 1280) -> Any:
    """Return a page whose ``complaints`` and ``urls`` list what it said and asked for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
    page.complaints, page.urls = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.urls.append(request.url))
    return page


def settled(page: Any, url: str) -> str:
    """Open the page and return its error text once it is ready or has failed."""
    page.goto(url)
    page.wait_for_selector("html[data-state=ready], html[data-state=failed]", state="attached")
    return str(page.inner_text("#error"))


def give(page: Any, data: bytes | Path) -> str:
    """Choose a file in the page and return its error text once it has answered."""
    file = {"name": "picture", "mimeType": "application/octet-stream", "buffer": data}
    page.set_input_files("#file", data if isinstance(data, Path) else file)
    page.wait_for_selector("html[data-state=done], html[data-state=failed]", state="attached")
    return str(page.inner_text("#error"))


@pytest.fixture(scope="module")
def page(browser: Any, artifact: Artifact) -> Iterator[Any]:
    with serve_folder(artifact.folder, QuietHandler) as origin:
        page = watched(browser)
        page.origin = origin
        assert settled(page, f"{origin}/index.html") == ""
        yield page
        page.close()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return values[:, :, 0] if channels == 1 else values


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, kind, **options)
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """Pictures that a decoder gives exact pixels for."""
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.fromarray(noise(30, 20, seed=seed)).quantize(64) for seed in (1, 2)]
    halves = Image.new("RGB", (48, 24), (200, 30, 90))
    halves.paste((10, 160, 40), (0, 0, 24, 24))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    return {
        "of the network's size": encoded(noise(12, 16)),
        "with a colour profile": encoded(noise(12, 16), icc_profile=profile),
        "with a gamma": png_with(encoded(noise(12, 16)), b"gAMA", struct.pack(">I", 100_000)),
        "wide": encoded(noise(50, 301)),
        "high": encoded(noise(301, 50)),
        "higher than a strip": encoded(noise(200, 210)),
        "small": encoded(noise(5, 4)),
        "one pixel": encoded(noise(1, 1)),
        "grey": encoded(noise(40, 40, 1)),
        "palette": encoded(Image.fromarray(noise(33, 47)).quantize(32)),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated WebP": encoded(
            Image.fromarray(noise(30, 20)),
            "WEBP",
            lossless=True,
            save_all=True,
            append_images=[Image.fromarray(noise(30, 20, seed=1))],
        ),
        "WebP": encoded(noise(31, 23), "WEBP", lossless=True),
        "BMP": encoded(noise(31, 23), "BMP"),
        "turned": encoded(halves, "JPEG", exif=turned, subsampling=0),
    }


def png_with(data: bytes, kind: bytes, content: bytes) -> bytes:
    """Return a PNG with one more chunk after its header."""
    chunk = struct.pack(">I", len(content)) + kind + content
    chunk += struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


def page_pixels(
    page: Any,
    data: bytes,
    image_shape: tuple[int, int, int] = IMAGE_SHAPE,
    resize: ResizeRule = DEFAULT_RESIZE,
) -> np.ndarray:
    values = page.evaluate(
        PAGE_PIXELS, [base64.b64encode(data).decode(), list(image_shape), resize]
    )
    channels, height, width = image_shape
    return np.array(values, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)


@pytest.mark.parametrize("name", pictures())
def test_pixels_are_those_of_python(page: Any, name: str) -> None:
    data = pictures()[name]
    expected_CHW = picture_pixels(data, IMAGE_SHAPE)
    np.testing.assert_array_equal(page_pixels(page, data), expected_CHW)


@pytest.mark.parametrize("name", pictures())
def test_stretched_pixels_are_those_of_training_and_of_the_package(page: Any, name: str) -> None:
    data = pictures()[name]
    pixels_CHW = page_pixels(page, data, resize="stretch")
    np.testing.assert_array_equal(pixels_CHW, picture_pixels(data, IMAGE_SHAPE, resize="stretch"))
    trained_on_CHW = np.empty(IMAGE_SHAPE, np.uint8)
    decode_into(trained_on_CHW, data, resize=True)
    preprocessing = Preprocessing(image_shape=IMAGE_SHAPE, color_order="RGB", resize="stretch")
    header = read_header(data)
    decoded_CHW = np.empty((3, header.height, header.width), np.uint8)
    decode_into(decoded_CHW, data, resize=False)
    # Pillow goes over rows or columns first, as it likes: rounding may differ by one level.
    for other_CHW in (trained_on_CHW, fitted(decoded_CHW, preprocessing)):
        assert np.abs(pixels_CHW.astype(int) - other_CHW).max() <= 1
    if name in ("wide", "high"):  # and it is not the centre of the picture
        assert np.abs(pixels_CHW.astype(int) - page_pixels(page, data)).max() > 30


def test_a_page_of_resized_training_pictures_stretches(
    browser: Any, model: nn.Module, node_modules: Path, tmp_path: Path
) -> None:
    source = ExportSource(model, IMAGE_SHAPE, CLASS_NAMES, metadata={"resize": "stretch"})
    web.export(source, tmp_path, precision="float32", node_modules=node_modules)
    described = json.loads((tmp_path / "model.json").read_text())
    assert described["preprocessing"]["resize"] == "stretch"
    # A mark at the left edge, which the centre of the picture does not hold.
    pixels_HWC = np.zeros((30, 200, 3), np.uint8)
    pixels_HWC[:, :40] = 255
    data = encoded(pixels_HWC)
    trained_on_CHW = np.empty(IMAGE_SHAPE, np.uint8)
    decode_into(trained_on_CHW, data, resize=True)
    with torch.inference_mode():
        logits_K = model(torch.from_numpy(trained_on_CHW)[None] / 255)[0]
    with serve_folder(tmp_path, QuietHandler) as origin:
        page = watched(browser)
        assert settled(page, f"{origin}/index.html") == ""
        assert give(page, data) == ""
        assert page.inner_text("#seen-note") == "16 × 12 pixels, stretched from 200 × 30"
        shown = page.evaluate("window.understudy.shown.logits")
        page.close()
    np.testing.assert_allclose(shown, logits_K, atol=1e-2)


def test_rules_for_other_sizes_are_those_of_the_manifest(tmp_path: Path) -> None:
    assert get_args(ResizeRule) == get_args(ManifestRule)
    path = tmp_path / "student.onnx"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="brought to size by 'squeeze'"):
        describe_model(
            path,
            image_shape=IMAGE_SHAPE,
            class_names=CLASS_NAMES,
            precision="float32",
            tensor_names=("images", "logits"),
            resize="squeeze",
            runtime=web.RUNTIME,
        )


def test_a_picture_of_the_networks_size_is_unchanged(page: Any) -> None:
    pixels_HWC = noise(12, 16)
    unchanged_CHW = pixels_HWC.transpose(2, 0, 1)
    np.testing.assert_array_equal(picture_pixels(encoded(pixels_HWC), IMAGE_SHAPE), unchanged_CHW)
    assert give(page, encoded(pixels_HWC)) == ""
    assert page.inner_text("#seen-note") == "16 × 12 pixels, unchanged"


@pytest.mark.parametrize("size", [(12, 16), (90, 70)])
def test_transparent_and_lossy_pictures_differ_by_rounding_alone(
    page: Any, size: tuple[int, int]
) -> None:
    smooth = Image.fromarray(noise(6, 8)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    for data in (encoded(noise(*size, 4)), encoded(smooth, "JPEG", quality=90)):
        expected_CHW = picture_pixels(data, IMAGE_SHAPE).astype(int)
        assert np.abs(page_pixels(page, data) - expected_CHW).max() <= 2


@pytest.mark.parametrize("name", ["of the network's size", "grey", "wide", "turned"])
def test_a_grey_network_gets_the_grey_of_python(page: Any, name: str) -> None:
    data = pictures()[name]
    for image_shape in ((1, 12, 16), (1, 40, 40)):
        expected_CHW = picture_pixels(data, image_shape)
        np.testing.assert_array_equal(page_pixels(page, data, image_shape), expected_CHW)


def test_answer_is_that_of_the_trained_model(page: Any, model: nn.Module) -> None:
    data = encoded(noise(60, 90, seed=5))
    assert give(page, data) == ""
    pixels_CHW = torch.from_numpy(picture_pixels(data, IMAGE_SHAPE))
    with torch.inference_mode():
        logits_K = model(pixels_CHW[None] / 255)[0]
    shown = page.evaluate("window.understudy.shown")
    np.testing.assert_allclose(shown["logits"], logits_K, atol=1e-5)
    np.testing.assert_allclose(shown["probabilities"], logits_K.softmax(0), atol=1e-6)
    names = page.evaluate("[...document.querySelectorAll('.bars .name')].map((n) => n.textContent)")
    assert names == [CLASS_NAMES[k] for k in logits_K.argsort(descending=True)]
    assert page.text_content("#top strong") == names[0]
    assert "on this device" in page.inner_text("#time")


def bmp_header(height: int, width: int) -> bytes:
    return b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, width, -height, 1, 24, 0) + bytes(99)


def png_header(height: int, width: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + bytes(99)


def gif_header(height: int, width: int) -> bytes:
    """A small screen and a first frame that is not, after an extension."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
    return screen + b"!\xfe\x03abc\x00," + struct.pack("<HHHHB", 0, 0, width, height, 0) + bytes(9)


def jpeg_header(height: int, width: int) -> bytes:
    comment = b"\xff\xfe\x00\x06\xff\xc0\xff\xc0"
    return b"\xff\xd8" + comment + b"\xff\xc2\x00\x0b\x08" + struct.pack(">HH", height, width)


def webp_header(height: int, width: int, kind: bytes) -> bytes:
    start = b"RIFF\xff\x00\x00\x00WEBP" + kind + b"\x00\x01\x00\x00"
    if kind == b"VP8X":
        return (
            start
            + bytes(4)
            + (width - 1).to_bytes(3, "little")
            + (height - 1).to_bytes(3, "little")
        )
    if kind == b"VP8L":
        return start + b"\x2f" + struct.pack("<I", (height - 1) << 14 | (width - 1)) + bytes(9)
    return start + b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(9)


BOMBS = {
    "PNG": png_header(50_000, 60_000),
    "JPEG": jpeg_header(50_000, 60_000) + bytes(99),
    "GIF": gif_header(50_000, 60_000),
    "BMP": bmp_header(50_000, 60_000),
    "WebP extended": webp_header(50_000, 60_000, b"VP8X"),
    "WebP lossless": webp_header(15_000, 16_000, b"VP8L"),
    "WebP lossy": webp_header(15_000, 16_000, b"VP8 "),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_huge_picture_is_refused_by_its_header(page: Any, name: str) -> None:
    height, width = (15_000, 16_000) if "loss" in name else (50_000, 60_000)
    assert give(page, BOMBS[name]) == (
        f"This picture is too large: {width:,} × {height:,} pixels, more than the "
        f"{MAX_PIXELS // 1_000_000} million allowed. Choose a smaller one."
    )
    assert not page.is_visible("#result")


def test_bad_files_are_named_and_the_page_goes_on(page: Any, tmp_path: Path) -> None:
    whole = {kind: encoded(noise(40, 40), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")}
    assert give(page, b"just some words") == (
        "This is not a picture that the page knows. Choose a PNG, JPEG, GIF, WebP or BMP file."
    )
    assert give(page, b"") == "This file is empty. Choose another one."
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert give(page, large) == (
        "This file is too large: 67.1 MB, more than the 67.1 MB allowed. Choose a smaller picture."
    )
    for kind, data in whole.items():
        shown = {"WEBP": "WebP"}.get(kind, kind)
        expected = f"This {shown} picture is broken and cannot be decoded. Choose another one."
        for part in (data[:20], data[: len(data) // 2]):
            assert give(page, part) == expected, (kind, len(part))
            with pytest.raises(DataError, match="the picture cannot be used"):
                picture_pixels(part, IMAGE_SHAPE)
    assert give(page, whole["PNG"]) == ""
    assert page.is_visible("#result")


def test_drop_paste_and_keyboard(page: Any) -> None:
    # The browser reports file choosers while someone listens; it is told so without being waited
    # for, and a key pressed at once may come before.
    page.on("filechooser", lambda chooser: None)

    def send(kind: str, field: str, data: bytes | None) -> str:
        page.evaluate(
            """([kind, field, encoded]) => {
                const carried = new DataTransfer();
                if (encoded) {
                    const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
                    carried.items.add(new File([bytes], 'x.png', { type: 'image/png' }));
                } else {
                    carried.setData('text/plain', 'https://example.org/cat.png');
                }
                const Kind = kind === 'drop' ? DragEvent : ClipboardEvent;
                document.getElementById('drop').dispatchEvent(
                    new Kind(kind, { [field]: carried, bubbles: true, cancelable: true }));
            }""",
            [kind, field, None if data is None else base64.b64encode(data).decode()],
        )
        done = "html[data-state=done], html[data-state=failed]"
        page.wait_for_selector(done, state="attached")
        return str(page.inner_text("#error"))

    for kind, field in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        assert send(kind, field, encoded(noise(20, 30))) == ""
        assert "from the middle of 30 × 20" in page.inner_text("#seen-note")
        assert send(kind, field, None) != ""
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    with page.expect_file_chooser():
        page.keyboard.press("Enter")


def test_page_is_quiet_fits_and_asks_no_other_place(page: Any, artifact: Artifact) -> None:
    assert give(page, encoded(noise(20, 30))) == ""
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 27)"
    assert page.evaluate("window.hacked === undefined")
    assert page.complaints == []
    asked = {url.removeprefix(page.origin).lstrip("/") for url in page.urls}
    assert asked == set(artifact.files) - {"licenses.txt"}


def test_policy_keeps_the_picture_on_the_device(
    browser: Any, artifact: Artifact, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Listening(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    with (
        serve_folder(artifact.folder, QuietHandler) as origin,
        serve_folder(tmp_path, Listening) as other,
    ):
        page = watched(browser)
        page.goto(f"{origin}/index.html")
        send = "(url) => fetch(url).then(() => 'sent', () => 'refused')"
        assert page.evaluate(send, f"{other}/steal") == "refused"
        page.evaluate("(url) => { new Image().src = url; }", f"{other}/image")
        page.evaluate("(url) => navigator.sendBeacon(url, 'x')", f"{other}/beacon")
        page.wait_for_timeout(200)
        assert asked == []
        assert page.complaints
        page.close()


def copied(artifact: Artifact, folder: Path) -> Path:
    shutil.copytree(artifact.folder, folder, copy_function=os.link)
    return folder


def replaced(path: Path, data: bytes) -> None:
    """Write a file anew: the copy shares its content with the original."""
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("host", ["127.0.0.1", "phone.test"])
def test_a_changed_byte_in_the_network_is_refused(
    browser: Any, artifact: Artifact, tmp_path: Path, host: str
) -> None:
    folder = copied(artifact, tmp_path / "page")
    data = bytearray((folder / "student.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    replaced(folder / "student.onnx", bytes(data))
    with serve_folder(folder, QuietHandler) as origin:
        page = watched(browser)
        error = settled(page, f"{origin.replace('127.0.0.1', host)}/index.html")
        assert page.evaluate("window.isSecureContext") == (host == "127.0.0.1")
        digest = hashlib.sha256(data).hexdigest()
        assert error.startswith("student.onnx is not the network that model.json describes")
        assert f"starts with {digest[:12]}, expected" in error
        assert not any(url.endswith(".wasm") for url in page.urls)
        assert give(page, encoded(noise(12, 16))) == error
        page.close()


@pytest.mark.parametrize(
    ("before", "after"), [("shorter_side_center_crop", "stretch"), (CLASS_NAMES[0], "another")]
)
def test_a_changed_description_is_refused(
    browser: Any, artifact: Artifact, tmp_path: Path, before: str, after: str
) -> None:
    folder = copied(artifact, tmp_path / "page")
    text = json.dumps(json.loads((folder / "model.json").read_text()), ensure_ascii=False)
    assert before in text
    for changed in (text, text.replace(before, after)):
        replaced(folder / "model.json", changed.encode())
        with serve_folder(folder, QuietHandler) as origin:
            page = watched(browser)
            error = settled(page, f"{origin}/index.html")
            page.close()
        expected = "" if changed == text else "model.json was changed after it was written."
        assert error.startswith(expected)
        assert bool(error) == bool(expected)


def test_the_page_hashes_the_text_that_python_does(page: Any) -> None:
    value = {
        "b": ["größer", '"\\\n\t\x01\x7f', "\u2028 \U0001f600"],
        "a": {"z": None, "y": [1, True]},
    }
    found = page.evaluate(
        "async (value) => (await import('./model.js')).canonicalJson(value)", value
    )
    assert found == canonical_json(value)


def test_own_hash_is_sha256(page: Any) -> None:
    for size in (0, 1, 55, 56, 63, 64, 65, 1000):
        data = bytes(range(256)) * 4
        own = page.evaluate(
            "async (n) => (await import('./sha256.js')).ownSha256("
            "Uint8Array.from({ length: n }, (_, i) => i % 256))",
            size,
        )
        assert own == hashlib.sha256(data[:size]).hexdigest()


def test_plain_http_from_another_machine_works(browser: Any, artifact: Artifact) -> None:
    with serve_folder(artifact.folder, QuietHandler) as origin:
        page = watched(browser)
        assert settled(page, f"{origin.replace('127.0.0.1', 'phone.test')}/index.html") == ""
        assert give(page, encoded(noise(12, 16))) == ""
        assert page.complaints == []
        page.close()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("model.json", None, r"model\.json cannot be fetched \(HTTP 404\)"),
        ("model.json", b"{", r"model\.json is damaged"),
        ("model.json", b'{"format": 99}', r"model\.json is of another version of this page"),
        ("model.json", b'{"format": 3}', r"model\.json was changed after it was written"),
        ("student.onnx", None, r"student\.onnx cannot be fetched \(HTTP 404\)"),
        ("picture.js", None, r"A part of this page cannot be loaded"),
        (web.SCRIPT_NAME, None, r"The runtime cannot be loaded"),
        (web.WASM_NAME, b"\0asm", r"ONNX Runtime cannot open student\.onnx"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(
    browser: Any,
    artifact: Artifact,
    tmp_path: Path,
    name: str,
    data: bytes | None,
    message: str,
) -> None:
    folder = copied(artifact, tmp_path / "page")
    if data is None:
        (folder / name).unlink()
    else:
        replaced(folder / name, data)
    with serve_folder(folder, QuietHandler) as origin:
        page = watched(browser)
        error = settled(page, f"{origin}/index.html")
        page.close()
    assert re.match(message, error), error
    assert "Export the page again" in error or "Copy the whole folder again" in error


def test_opened_from_a_file_it_says_how_to_serve_it(browser: Any, artifact: Artifact) -> None:
    page = watched(browser)
    error = settled(page, (artifact.folder / "index.html").as_uri())
    assert "This page was opened as a file" in error
    assert "python -m http.server" in error
    assert page.complaints == []
    page.close()


def test_a_browser_that_disturbs_pixels_is_warned_of(browser: Any, artifact: Artifact) -> None:
    with serve_folder(artifact.folder, QuietHandler) as origin:
        page = watched(browser)
        page.add_init_script(
            "const read = CanvasRenderingContext2D.prototype.getImageData;"
            "CanvasRenderingContext2D.prototype.getImageData = function (...area) {"
            "  const image = read.apply(this, area); image.data[0] ^= 1; return image; };"
        )
        page.goto(f"{origin}/index.html")
        page.wait_for_selector("#warning:not([hidden])")
        assert "answers can be wrong" in page.inner_text("#warning")
        page.close()


def test_folder_holds_all_it_needs_and_says_what(artifact: Artifact, node_modules: Path) -> None:
    assert artifact.files[:2] == ("index.html", "student.onnx")
    assert sorted(artifact.files) == sorted(path.name for path in artifact.folder.iterdir())
    assert set(PAGE_FILES) < set(artifact.files)
    described = json.loads((artifact.folder / "model.json").read_text())
    model = (artifact.folder / "student.onnx").read_bytes()
    assert described["model"]["sha256"] == hashlib.sha256(model).hexdigest()
    assert described["model"]["size_bytes"] == len(model) == artifact.facts["model_bytes"]
    assert described["class_names"] == list(CLASS_NAMES)
    assert described["image_shape"] == [3, 12, 16]
    assert described["preprocessing"]["resize"] == "shorter_side_center_crop"
    assert artifact.size_bytes == sum(artifact.facts["file_bytes"].values())
    assert artifact.facts["runtime_bytes"] < 14_400_000
    for name in PAGE_FILES:
        assert b"//cdn" not in (artifact.folder / name).read_bytes()


def test_a_failed_export_leaves_no_page_of_an_earlier_one(
    artifact: Artifact, model: nn.Module, node_modules: Path, tmp_path: Path
) -> None:
    folder = copied(artifact, tmp_path / "page")
    source = ExportSource(model, IMAGE_SHAPE, (*CLASS_NAMES, "one too many"))
    with pytest.raises(ModelError, match="one for each class name"):
        web.export(source, folder, precision="float32", node_modules=node_modules)
    assert not (folder / "index.html").exists()


@pytest.fixture
def no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs that is the whole PATH, and an empty home."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(web.NODE_MODULES_VARIABLE, raising=False)
    return programs


def put_npm(programs: Path, script: str) -> None:
    (programs / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "npm").chmod(stat.S_IRWXU)


def test_without_npm_the_command_is_named(no_npm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        web.find_runtime()
    assert caught.value.exit_code == 2
    assert "npm is not installed" in str(caught.value)
    prefix = tmp_path / "home" / "web" / web.PACKAGE_VERSION
    command = f'npm install --ignore-scripts --prefix "{prefix}" onnxruntime-web@1.30.0'
    assert command in str(caught.value)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'npm error network is down' >&2; exit 1", "npm error network is down"),
        ("exit 0", "it made no archive"),
        # Its last argument is where the archive goes.
        ('for at; do :; done; echo x > "$at/package.tgz"', "that npm fetched has integrity sha512"),
    ],
)
def test_npm_that_fails_leaves_nothing(
    no_npm: Path, tmp_path: Path, script: str, message: str
) -> None:
    put_npm(no_npm, script)
    with pytest.raises(InputError, match=message):
        web.find_runtime()
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_named_folder_must_hold_that_version_unchanged(
    node_modules: Path, no_npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "node_modules" / "onnxruntime-web"
    shutil.copytree(node_modules / "onnxruntime-web", package)
    monkeypatch.setenv(web.NODE_MODULES_VARIABLE, str(package.parent))
    assert web.find_runtime() == package
    assert web.find_runtime(package) == package
    wasm = package / "dist" / web.WASM_NAME
    with wasm.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    with pytest.raises(InputError, match=r"\.wasm was changed or is damaged"):
        web.find_runtime()
    (package / "package.json").write_text('{"version": "1.20.0"}')
    with pytest.raises(InputError, match=r"is of version 1\.20\.0; expected onnxruntime-web"):
        web.find_runtime()
    with pytest.raises(InputError, match=r"there is no .*nowhere"):
        web.find_runtime(tmp_path / "nowhere")


def test_a_damaged_cache_is_fetched_again(
    node_modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_HOME", str(tmp_path))
    monkeypatch.delenv(web.NODE_MODULES_VARIABLE, raising=False)
    package = tmp_path / "web" / web.PACKAGE_VERSION / "node_modules" / web.PACKAGE
    shutil.copytree(node_modules / "onnxruntime-web", package)
    (package / "dist" / web.SCRIPT_NAME).write_text("half a")
    try:
        assert web.find_runtime() == package
    except InputError as error:
        pytest.skip(str(error))
    assert sorted(path.name for path in package.parent.parent.iterdir()) == ["node_modules"]
    monkeypatch.setenv("PATH", "")
    assert web.find_runtime() == package

"""Runs an exported page in headless Chromium, as its reader's browser will.

The page is served on the loopback address alone. What counts as measured: the network's own run in
WebAssembly, one image at a time, one thread.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from understudy.errors import InputError, UnderstudyError, problem
from understudy.evaluate.latency import percentile_ms
from understudy.export.target import Artifact, require_package

NUM_WARMUP = 10
MIN_RUNS = 50
# Of one call, which has a limit of time: of small pictures the bytes alone would be thousands.
CHUNK_IMAGES = 100
CHUNK_BYTES = 4 * 2**20
BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # The browser's own services too find no place but this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
RUN_CHUNK = """async ({ encoded, size, seconds }) => {
    const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
    const runs = [];
    const end = performance.now() + 1000 * seconds;
    for (let at = 0; at < bytes.length; at += size) {
        const answer = await window.understudy.classifyPixels(bytes.subarray(at, at + size));
        runs.push({ logits: answer.logits, ms: answer.ms });
        // Playwright's own limits do not hold for what a page computes.
        if (performance.now() > end) throw new Error(`not done after ${seconds} s`);
    }
    return runs;
}"""
# Selectors, because the page's policy forbids the functions that Playwright would poll with.
OPENED = "html[data-state=ready], html[data-state=failed]"
ANSWERED = "html[data-state=done], html[data-state=failed]"


@dataclass(frozen=True)
class BrowserRun:
    """What the page answered and how long it took.

    Attributes:
        logits_NK: float32, of all images, from pixels handed to the page's own function.
        load_ms: from the page's first request for the network to a session that can run: network
            and runtime fetched from this machine, checked, compiled.
        latency_p50_ms, latency_p95_ms, latency_p99_ms: of one run of the network on one image, by
            nearest rank as of every file.
        num_runs: runs that were timed, after ``NUM_WARMUP`` that were not.
        shown_class: what the page shows for the first image, dropped into it as a PNG file.
        picture_max_abs_difference: largest |difference| between the logits of that file and those
            of its pixels; 0 where the browser decodes it without touching a pixel.
        browser: name and version.
        requests: the paths that the browser asked for, in order; all of this page's own origin.
    """

    logits_NK: np.ndarray
    load_ms: float
    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    num_runs: int
    shown_class: str
    picture_max_abs_difference: float
    browser: str
    requests: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the logits as a plain dict."""
        return {name: value for name, value in asdict(self).items() if name != "logits_NK"}


def find_browser() -> str:
    """Return the path of an installed Chromium or Chrome.

    Raises:
        InputError: there is none.
    """
    for name in BROWSER_NAMES:
        if path := shutil.which(name):
            return path
    raise InputError(
        problem(
            "no browser is installed that the page can be run in",
            expected=f"one of {', '.join(BROWSER_NAMES)} on the PATH",
            mend="Install Chromium (Debian: apt-get install chromium).",
        )
    )


def run_in_browser(
    artifact: Artifact, images: ArrayLike, *, timeout_seconds: float = 120.0
) -> BrowserRun:
    """Open a ``web`` artifact's page in headless Chromium and classify images there.

    Args:
        images: uint8 [n, C, H, W], of the network's size, at least one.
        timeout_seconds: for the page to load, and for each 100 images, or 4 MiB of larger ones.

    Raises:
        MissingExtraError: playwright is not installed.
        InputError: no browser is installed, or the images or the artifact do not fit.
        UnderstudyError: the page fails, shows another answer for a file than for its pixels, or
            asked for something from another place.
    """
    images_NCHW = np.asarray(images)
    description = _check_request(artifact, images_NCHW)
    sync_api = require_package("playwright.sync_api", target="web", package="playwright")
    executable = find_browser()
    run = functools.partial(
        _run, sync_api, executable, artifact, images_NCHW, description, timeout_seconds
    )
    # Playwright refuses a thread that has an event loop, as a notebook's has.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def page_description(folder: Path) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Return what model.json of a page says, and the (C, H, W) of its pictures.

    Raises:
        InputError: there is no page in the folder.
    """
    try:
        description: dict[str, Any] = json.loads((folder / "model.json").read_text())
        channels, height, width = map(int, description["image_shape"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            problem(
                f"{folder} holds no page ({type(error).__name__}: {error})",
                expected="the folder that the export target 'web' made",
                mend="Name that folder, or export the student again.",
            )
        ) from error
    return description, (channels, height, width)


def _check_request(artifact: Artifact, images_NCHW: np.ndarray) -> dict[str, Any]:
    description, image_shape = page_description(artifact.folder)
    if (
        images_NCHW.dtype != np.uint8
        or images_NCHW.shape[1:] != image_shape
        or len(images_NCHW) == 0
    ):
        raise InputError(
            problem(
                f"the images to run are {images_NCHW.dtype} of {images_NCHW.shape}",
                expected=f"uint8 [n, {', '.join(map(str, image_shape))}], n at least 1",
                mend="Give images of the test split.",
            )
        )
    return description


class _IsolatedHandler(SimpleHTTPRequestHandler):
    """Files of one folder, with the headers that let a page read a clock finer than 0.1 ms."""

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are in the record."""


@contextlib.contextmanager
def serve_folder(
    folder: Path, handler: type[SimpleHTTPRequestHandler] = _IsolatedHandler
) -> Iterator[str]:
    """Serve a folder on the loopback address for the while; yields the address, without a slash."""
    bound = functools.partial(handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _run(
    sync_api: Any,
    executable: str,
    artifact: Artifact,
    images_NCHW: np.ndarray,
    description: dict[str, Any],
    timeout_seconds: float,
) -> BrowserRun:
    urls: list[str] = []
    try:
        with serve_folder(artifact.folder) as origin, sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=executable, args=list(BROWSER_FLAGS)
            )
            name = f"Chromium {browser.version}"
            page = browser.new_page()
            page.set_default_timeout(timeout_seconds * 1000)
            page.on("request", lambda request: urls.append(request.url))
            page.goto(f"{origin}/{artifact.files[0]}")
            _wait(page, artifact, OPENED)
            load_ms = page.evaluate("window.understudy.ready.then((model) => model.loadMs)")
            runs, times_ms = _classify(page, images_NCHW, timeout_seconds)
            shown, picture_K = _drop_picture(page, artifact, images_NCHW[0])
            browser.close()
    except sync_api.Error as error:
        raise _failure(artifact, str(error).strip().splitlines()[0]) from error
    _check_requests(artifact, urls, origin)
    logits_NK = np.asarray(runs, np.float32)
    names = description["class_names"]
    if shown != names[int(np.argmax(picture_K))]:
        raise _failure(artifact, f"it shows '{shown}' where its logits say otherwise")
    return BrowserRun(
        logits_NK=logits_NK,
        load_ms=load_ms,
        **_percentiles(times_ms),
        num_runs=len(times_ms),
        shown_class=shown,
        picture_max_abs_difference=float(np.abs(picture_K - logits_NK[0]).max()),
        browser=name,
        requests=tuple(url.removeprefix(origin) for url in urls),
    )


def _classify(
    page: Any, images_NCHW: np.ndarray, timeout_seconds: float
) -> tuple[list[list[float]], list[float]]:
    """Return logits of all images, and the milliseconds of runs on them in turn."""
    images_NHWC = np.ascontiguousarray(images_NCHW.transpose(0, 2, 3, 1))
    image_bytes = images_NHWC[0].nbytes

    def run(some_NHWC: np.ndarray) -> list[dict[str, Any]]:
        encoded = base64.b64encode(some_NHWC.tobytes()).decode()
        answers: list[dict[str, Any]] = page.evaluate(
            RUN_CHUNK, {"encoded": encoded, "size": image_bytes, "seconds": timeout_seconds}
        )
        return answers

    num_images = len(images_NHWC)
    per_chunk = min(CHUNK_IMAGES, max(1, CHUNK_BYTES // image_bytes))
    run(images_NHWC[np.arange(NUM_WARMUP) % num_images])
    answers = []
    for start in range(0, max(num_images, MIN_RUNS), per_chunk):
        rows = np.arange(start, min(start + per_chunk, max(num_images, MIN_RUNS)))
        answers += run(images_NHWC[rows % num_images])
    return [answer["logits"] for answer in answers[:num_images]], [a["ms"] for a in answers]


def _percentiles(times_ms: list[float]) -> dict[str, float]:
    times_ns = [round(1e6 * ms) for ms in times_ms]
    return {f"latency_p{share}_ms": percentile_ms(times_ns, share) for share in (50, 95, 99)}


def _drop_picture(page: Any, artifact: Artifact, image_CHW: np.ndarray) -> tuple[str, np.ndarray]:
    """Give the page a PNG file as a reader would; return the class shown, and the file's logits."""
    pixels_HWC = image_CHW.transpose(1, 2, 0)
    encoded = io.BytesIO()
    gray = pixels_HWC.shape[2] == 1
    Image.fromarray(pixels_HWC[:, :, 0] if gray else pixels_HWC).save(encoded, "PNG")
    file = {"name": "picture.png", "mimeType": "image/png", "buffer": encoded.getvalue()}
    page.set_input_files("#file", file)
    _wait(page, artifact, ANSWERED)
    logits_K = page.evaluate("window.understudy.shown.logits")
    return page.inner_text("#top strong"), np.asarray(logits_K, np.float32)


def _wait(page: Any, artifact: Artifact, selector: str) -> None:
    page.wait_for_selector(selector, state="attached")
    if error := page.inner_text("#error"):
        raise _failure(artifact, error)


def _check_requests(artifact: Artifact, urls: list[str], origin: str) -> None:
    foreign = sorted({url for url in urls if not url.startswith(f"{origin}/")})
    if foreign:
        raise UnderstudyError(
            problem(
                f"the page in {artifact.folder} asked for {', '.join(foreign)}",
                expected="no request to any place but its own folder",
                mend="Export the page again; do not serve this one.",
            )
        )


def _failure(artifact: Artifact, reason: str) -> UnderstudyError:
    return UnderstudyError(
        problem(
            f"the page in {artifact.folder} failed in the browser ({reason})",
            expected="a page that loads its network and classifies pictures",
            mend="Export the student again.",
        )
    )

"""A folder for any static web server: a page that runs the student in the reader's browser.

The network is the ONNX file of the target ``onnx``; ONNX Runtime Web runs it in WebAssembly (SIMD,
one thread: no special headers are needed). All files come from the folder itself: nothing is
loaded from, or sent to, any other place, and the page's Content-Security-Policy sees to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from understudy.artifacts import file_hash, write_bytes, write_json
from understudy.errors import InputError, problem
from understudy.export.onnx_file import read_onnx_facts
from understudy.export.target import Artifact, ExportSource, Precision, find_target
from understudy.export.web_page import (
    ASSETS,
    DEFAULT_RESIZE,
    DESCRIPTION_NAME,
    INDEX_NAME,
    PAGE_FILES,
    describe_model,
)

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
# Not in this process: ``evaluate.browser.run_in_browser`` runs it in a real browser.
RUNS_HERE = False

PACKAGE = "onnxruntime-web"
PACKAGE_VERSION = "1.30.0"
# Subresource integrity of the package's archive, as its registry states it.
PACKAGE_INTEGRITY = (
    "sha512-"
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
SCRIPT_NAME = "ort.wasm.bundle.min.mjs"
WASM_NAME = "ort-wasm-simd-threaded.wasm"
# The least that runs: the build without WebGPU and WebNN (half the bytes of the one with them),
# and the script that has the WebAssembly's own loader in it.
RUNTIME_SHA256 = {
    SCRIPT_NAME: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM_NAME: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
RUNTIME = {
    "package": PACKAGE,
    "version": PACKAGE_VERSION,
    "script": SCRIPT_NAME,
    "wasm": WASM_NAME,
}
NODE_MODULES_VARIABLE = "UNDERSTUDY_NODE_MODULES"
NPM_SECONDS = 600.0


def export(
    source: ExportSource,
    folder: Path,
    *,
    precision: Precision,
    node_modules: Path | None = None,
) -> Artifact:
    """Write the page, the network and the runtime into ``folder``; the page itself comes last.

    The page brings pictures to size by the rule that the source's metadata names as "resize" (see
    ``web_page.ResizeRule``).

    Args:
        node_modules: a folder that holds the package onnxruntime-web; None: see ``find_runtime``.

    Raises:
        InputError: the runtime is nowhere to be had, or is not the one it should be; there is no
            such rule.
        MissingExtraError, ModelError: as the target ``onnx``.
    """
    runtime = find_runtime(node_modules)
    # A page of an earlier export must not be left beside new files, should this one be broken off.
    (folder / INDEX_NAME).unlink(missing_ok=True)
    exported = find_target("onnx").export(source, folder, precision=precision)
    for name in RUNTIME_SHA256:
        write_bytes(folder / name, (runtime / "dist" / name).read_bytes())
    description = describe_model(
        exported.path,
        image_shape=source.image_shape,
        class_names=source.class_names,
        precision=precision,
        tensor_names=_tensor_names(exported.path),
        resize=source.metadata.get("resize", DEFAULT_RESIZE),
        runtime=RUNTIME,
    )
    write_json(folder / DESCRIPTION_NAME, description)
    for name in PAGE_FILES:
        write_bytes(folder / name, (ASSETS / name).read_bytes())
    others = [name for name in PAGE_FILES if name != INDEX_NAME]
    files = (INDEX_NAME, *exported.files, DESCRIPTION_NAME, *RUNTIME_SHA256, *others)
    return Artifact(
        "web",
        precision,
        folder,
        files,
        batch="one",
        facts=_facts(folder, files, exported),
        notes=(
            *exported.notes,
            "Serve the folder with any static web server, such as `python -m http.server`; "
            "browsers do not run it from a file.",
        ),
    )


def _facts(folder: Path, files: tuple[str, ...], exported: Artifact) -> dict[str, Any]:
    file_bytes = {name: (folder / name).stat().st_size for name in files}
    return {
        **exported.facts,
        "model_bytes": file_bytes[exported.files[0]],
        "runtime_bytes": sum(file_bytes[name] for name in RUNTIME_SHA256),
        "runtime": f"{PACKAGE} {PACKAGE_VERSION}",
        "file_bytes": file_bytes,
    }


def _tensor_names(path: Path) -> tuple[str, str]:
    facts = read_onnx_facts(path)
    return facts.input_name, facts.output_name


def find_runtime(node_modules: Path | None = None) -> Path:
    """Return the folder of the package onnxruntime-web, its version and files checked.

    Looked for in ``node_modules``, else in the folder that UNDERSTUDY_NODE_MODULES names; else in
    the cache folder (below UNDERSTUDY_HOME), where npm fetches it to once.

    Raises:
        InputError: it is not there and npm cannot fetch it; it is of another version; its files
            are not those of that version.
    """
    named = node_modules or os.environ.get(NODE_MODULES_VARIABLE)
    if named:
        return _named_package(Path(named))
    prefix = _cache_prefix()
    package = prefix / "node_modules" / PACKAGE
    if _fault(package):
        _fetch(package, prefix)
    return package


def check_runtime() -> None:
    """Raise InputError where ``find_runtime`` is sure to; nothing is fetched."""
    prefix = _cache_prefix()
    if named := os.environ.get(NODE_MODULES_VARIABLE):
        _named_package(Path(named))
    elif _fault(prefix / "node_modules" / PACKAGE):
        _find_npm(prefix)


def _named_package(package: Path) -> Path:
    """Return the package in a folder that the user names, or the folder if it is that."""
    if package.name != PACKAGE:
        package = package / PACKAGE
    if fault := _fault(package):
        raise InputError(
            problem(
                fault,
                expected=f"{PACKAGE} {PACKAGE_VERSION}, unchanged",
                mend=f"Run: {_install_command(package.parent.parent)}",
            )
        )
    return package


def _cache_prefix() -> Path:
    """Return where npm puts the package that no one named."""
    home = os.environ.get("UNDERSTUDY_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "understudy"
    return (Path(home) if home else cache) / "web" / PACKAGE_VERSION


def _install_command(prefix: Path) -> str:
    return f'npm install --ignore-scripts --prefix "{prefix}" {PACKAGE}@{PACKAGE_VERSION}'


def _fault(package: Path) -> str:
    """Return what is wrong with a package folder, or "" where it is as it should be."""
    try:
        version = json.loads((package / "package.json").read_text())["version"]
        if version != PACKAGE_VERSION:
            return f"{package} is of version {version}"
        for name, digest in RUNTIME_SHA256.items():
            if file_hash(package / "dist" / name) != digest:
                return f"{package / 'dist' / name} was changed or is damaged"
    except FileNotFoundError as error:
        return f"there is no {error.filename}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{package} cannot be read ({type(error).__name__}: {error})"
    return ""


def _fetch(package: Path, prefix: Path) -> None:
    """Fetch the archive with npm and put what is needed of it in place, as one folder."""
    npm = _find_npm(prefix)
    package.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prefix, prefix=".fetch-") as folder:
        archive = _pack(npm, Path(folder), prefix)
        placed = Path(folder) / PACKAGE
        with tarfile.open(archive) as opened:
            for name in ("package.json", *(f"dist/{name}" for name in RUNTIME_SHA256)):
                member = opened.extractfile(f"package/{name}")
                assert member is not None  # the archive's hash is known, so its files are
                write_bytes(placed / name, member.read())
        if package.exists():
            package.rename(Path(folder) / "damaged")
        try:
            placed.rename(package)
        except OSError:
            # Another process was faster; what it put there must be right all the same.
            if _fault(package):
                raise


def _find_npm(prefix: Path) -> str:
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            problem(
                f"the web target needs {PACKAGE} {PACKAGE_VERSION}, and npm is not installed",
                expected=f"npm, or {NODE_MODULES_VARIABLE} naming a node_modules folder with it",
                mend=f"Install Node.js, then export again or run: {_install_command(prefix)}",
            )
        )
    return npm


def _pack(npm: str, folder: Path, prefix: Path) -> Path:
    command = [npm, "pack", f"{PACKAGE}@{PACKAGE_VERSION}", "--loglevel=error", "--no-fund"]
    command += ["--no-update-notifier", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NPM_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        said = done.stderr.strip().splitlines()
        reason = "" if done.returncode == 0 else " ".join(said[:2]) or f"exit {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"not done after {NPM_SECONDS:g} s"
    except OSError as error:
        reason = str(error)
    archives = sorted(folder.glob("*.tgz"))
    if reason or not archives:
        raise InputError(
            problem(
                f"npm cannot fetch {PACKAGE} {PACKAGE_VERSION} ({reason or 'it made no archive'})",
                expected=f"a registry that npm reaches, or {NODE_MODULES_VARIABLE} naming a "
                "node_modules folder with it",
                mend=f"Run where there is a network: {_install_command(prefix)}",
            )
        )
    digest = hashlib.sha512(archives[0].read_bytes()).digest()
    integrity = f"sha512-{base64.b64encode(digest).decode()}"
    if integrity != PACKAGE_INTEGRITY:
        raise InputError(
            problem(
                f"the {PACKAGE} {PACKAGE_VERSION} that npm fetched has integrity {integrity}",
                expected=PACKAGE_INTEGRITY,
                mend="Use a registry that serves the published package.",
            )
        )
    return archives[0]

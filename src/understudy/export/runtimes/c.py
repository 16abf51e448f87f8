"""Opens exported C code: compiles it for this machine and calls it. It needs NumPy alone.

The compiler is ``cc``, or what the environment variable CC names; compiled libraries are kept in
the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("numpy",)
SOURCES = ("student.c", "student_network.c")
HEADERS = ("student.h", "student_network.h")
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
COMPILE_SECONDS = 300


class StudentInfo(ctypes.Structure):
    """The beginning of ``struct student_info`` in ``student.h``."""

    _fields_ = (
        ("channels", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("num_pixels", ctypes.c_size_t),
        ("num_classes", ctypes.c_size_t),
        ("precision", ctypes.c_char_p),
        ("recipe_hash", ctypes.c_char_p),
        ("arena_bytes", ctypes.c_size_t),
        ("weight_bytes", ctypes.c_size_t),
    )


class CModel:
    """Compiled C code: float32 images [n, C, H, W] in [0, 1] to logits [n, K], one by one."""

    def __init__(self, compiled: Path, version: str) -> None:
        # The code's memory is static and shared by all who load this library: PyDLL keeps the
        # interpreter's lock during a call, so that threads wait for each other.
        library = ctypes.PyDLL(str(compiled))
        self.info = StudentInfo.in_dll(library, "student_info")
        self.classify = library.understudy_classify
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self.classify.argtypes = (pointer, size, pointer, size)
        self.classify.restype = ctypes.c_int
        self.error_text = library.understudy_error_text
        self.error_text.argtypes = (ctypes.c_int,)
        self.error_text.restype = ctypes.c_char_p
        self.facts: dict[str, Any] = {
            "compiler": version,
            "flags": " ".join(FLAGS),
            "num_threads": 1,
            "static_buffer_bytes": int(self.info.arena_bytes),
            "weight_bytes": int(self.info.weight_bytes),
        }

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        images_NCHW = np.ascontiguousarray(images_NCHW, dtype=np.float32)
        info = self.info
        image_shape = (info.channels, info.height, info.width)
        if images_NCHW.ndim != 4 or images_NCHW.shape[1:] != image_shape:
            raise ValueError(
                f"images of shape {images_NCHW.shape}; expected [n, {image_shape[0]}, "
                f"{image_shape[1]}, {image_shape[2]}]"
            )
        logits_NK = np.empty((len(images_NCHW), info.num_classes), dtype=np.float32)
        for index, image_CHW in enumerate(images_NCHW):
            code = self.classify(
                image_CHW.ctypes.data,
                image_CHW.size,
                logits_NK[index].ctypes.data,
                logits_NK.shape[1],
            )
            if code != 0:
                raise ValueError(f"image {index}: {self.error_text(code).decode()}")
        return logits_NK


def prepare(path: str) -> tuple[Path, str]:
    """Compile the code, and return the library and the compiler's version.

    Whoever times ``open_model`` calls this before, and hands over what it returned.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise OSError(
            f"there is no C compiler '{compiler[0]}'; install one (Debian: gcc), or name it in CC"
        )
    version = compiler_version(compiler)
    return compiled_library(Path(path).parent, compiler, version), version


def compiled_library(folder: Path, compiler: list[str], version: str) -> Path:
    """Return the shared library, compiled unless this code was on this machine before."""
    key = hashlib.sha256()
    for name in SOURCES + HEADERS:
        key.update((folder / name).read_bytes() + b"\0")
    for part in (*compiler, *FLAGS, version):
        key.update(part.encode() + b"\0")
    for cache in cache_folders():
        path = cache / f"student-{key.hexdigest()[:32]}.so"
        if path.is_file():
            return path
        try:
            cache.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=cache, suffix=".part")
            os.close(handle)
        except OSError:
            continue  # not writable
        try:
            compile_library(folder, compiler, Path(temporary))
            os.replace(temporary, path)  # noqa: PTH105 (a name, not a Path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return path
    raise OSError("no folder to keep the compiled code in can be written to")


def compile_library(folder: Path, compiler: list[str], library: Path) -> None:
    """Compile the student's sources into a shared library."""
    sources = [str(folder / name) for name in SOURCES]
    command = [*compiler, *FLAGS, *sources, "-lm", "-o", str(library)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=COMPILE_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        reason = (lines or done.stderr.splitlines() or ["it said nothing"])[0]
        raise OSError(f"{compiler[0]} cannot compile {sources[0]}: {reason}")


def compiler_version(compiler: list[str]) -> str:
    """Return the first line of what the compiler says of itself."""
    done = subprocess.run(
        [*compiler, "--version"],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=30,
        check=False,
    )
    return (done.stdout or done.stderr).splitlines()[0] if done.returncode == 0 else "unknown"


def cache_folders() -> list[Path]:
    """Return folders for compiled libraries, the user's cache first."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    folders = [Path(home) / "understudy" / "c"]
    # The fallback is this user's own: a library that others could replace must not be loaded.
    private = Path(tempfile.gettempdir()) / f"understudy-{os.getuid()}"
    try:
        private.mkdir(mode=0o700, exist_ok=True)
        status = private.lstat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o077 and not private.is_symlink():
            folders.append(private)
    except OSError:
        pass
    return folders


def open_model(path: str, *, num_threads: int, prepared: tuple[Path, str] | None = None) -> CModel:
    """Load the code, compiled unless that is done; it runs on one thread whatever is asked for."""
    return CModel(*(prepared or prepare(path)))

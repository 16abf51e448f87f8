"""Which runtime runs a file, which files belong to it, and the script that opens it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from understudy.artifacts import RECORD_NAME, Record
from understudy.errors import InputError, problem
from understudy.export.target_names import TARGETS

# The longest that fits counts. A TensorFlow Lite file runs on microcontrollers as well: where no
# record says which runtime is meant, the caller does.
SUFFIXES = {
    ".onnx": "onnx",
    ".tflite": "tflite",
    ".pte": "executorch",
    ".xml": "openvino",
    ".param": "ncnn",
    ".mlpackage": "coreml",
    ".c": "c",
    ".eager.json": "eager",
}
# Extensions of what lies beside a file with the same stem and belongs to it.
_COMPANIONS = {
    "onnx": (".onnx.data",),
    "openvino": (".bin",),
    "ncnn": (".bin",),
    "eager": (".safetensors",),
}
_C_PROJECT = ("*.c", "*.h", "*.ld", "Makefile")
_RUNTIMES = Path(__file__).parents[1] / "export" / "runtimes"


class HasTarget(Protocol):
    """What an ``export.target.Artifact`` has, so that importing this does not import torch."""

    @property
    def target(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def files(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class RuntimeFile:
    """A file and the runtime that opens it.

    Attributes:
        path: what the runtime opens.
        runtime: a name of ``export/runtimes``, or "eager".
        files: all files that belong to it, ``path`` first.
    """

    path: Path
    runtime: str
    files: tuple[Path, ...]

    @property
    def script(self) -> Path:
        """The script that opens it."""
        if self.runtime == "eager":
            return Path(__file__).with_name("eager.py")
        return _RUNTIMES / f"{self.runtime}.py"

    @property
    def label(self) -> str:
        """Runtime and file name, for tables."""
        return f"{self.runtime} {self.path.name}"

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file_bytes(path) for path in self.files)

    @property
    def packages(self) -> tuple[str, ...]:
        """The distributions that a machine needs to run it, read from the script's ``PACKAGES``."""
        for node in ast.parse(self.script.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES":
                return tuple(ast.literal_eval(node.value))
        return ("numpy",)


Source = Path | RuntimeFile | HasTarget


def file_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    return path.stat().st_size


def runtime_file(source: Source, runtime: str | None = None) -> RuntimeFile:
    """Return a file with its runtime: the one given, else that of its record or of its suffix.

    Args:
        source: a file, a folder that holds one such file, the folder of a release's artifact, an
            exported ``Artifact``, or what this function returned.
        runtime: None: the one that a folder's record names; without a record, by the suffix.

    Raises:
        InputError: no runtime is known for it, it does not run here, a folder holds no such file
            or several, or its record is damaged.
    """
    if isinstance(source, RuntimeFile):
        return source
    if not isinstance(source, Path):
        paths = tuple(source.folder / name for name in source.files)
        return _runnable(RuntimeFile(paths[0], runtime or source.target, paths))
    recorded = recorded_artifact(source)
    if recorded is not None and runtime in (None, recorded["target"]):
        paths = tuple(source / name for name in recorded["files"])
        return _runnable(RuntimeFile(paths[0], recorded["target"], paths))
    path = _only_file(source) if source.is_dir() and not _suffix(source) else source
    name = runtime or SUFFIXES.get(_suffix(path), "")
    if not name:
        raise InputError(
            problem(
                f"it is not known what runs {path}",
                expected=f"a file ending in {', '.join(SUFFIXES)}",
                mend="Name the exported file itself.",
            )
        )
    companions = [_beside(path, ending) for ending in _COMPANIONS.get(name, ())]
    if name == "c":
        found = (p for kind in _C_PROJECT for p in path.parent.glob(kind))
        companions = sorted(set(found) - {path})
    return _runnable(RuntimeFile(path, name, (path, *(p for p in companions if p.is_file()))))


def recorded_artifact(folder: Path) -> dict[str, Any] | None:
    """Return what the record of a release's artifact says of it; None where there is none.

    Raises:
        InputError: the record is damaged.
    """
    if not (folder / RECORD_NAME).is_file():
        return None
    payload = Record.load(folder).payload
    return payload if {"target", "files"} <= payload.keys() else None


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name.removesuffix(_suffix(path)) + ending)


def _suffix(path: Path) -> str:
    return max((s for s in SUFFIXES if path.name.endswith(s)), key=len, default="")


def _only_file(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if _suffix(path))
    if len(found) > 1 and all(_suffix(path) == ".c" for path in found):
        found = [path for path in found if path.stem == "student"] or found
    if len(found) == 1:
        return found[0]
    raise InputError(
        problem(
            f"the folder {folder} holds {', '.join(p.name for p in found) or 'no such file'}",
            expected=f"exactly one file ending in {', '.join(SUFFIXES)}",
            mend="Name the file itself.",
        )
    )


def _runnable(file: RuntimeFile) -> RuntimeFile:
    if file.script.is_file():
        return file
    known = [name for name in (*TARGETS, "eager") if (_RUNTIMES / f"{name}.py").is_file()]
    raise InputError(
        problem(
            f"no runtime '{file.runtime}' can run {file.path} here",
            expected=f"one of {', '.join(known)}, eager",
            mend="Measure it with that runtime's own tools on its device.",
        )
    )

"""TensorFlow Lite Micro for microcontrollers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from understudy.artifacts import write_bytes
from understudy.errors import ModelError
from understudy.export import tflite_file, tflite_int8
from understudy.export.runtimes.tflm import (
    ARENA_STEP_BYTES,
    MAX_ARENA_BYTES,
    smallest_arena,
)
from understudy.export.target import Artifact, ExportSource, Precision, require_package
from understudy.export.tracing import cannot_export, quiet

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
RUNS_HERE = True
FILE_NAME = "student.tflite"
NOTES = (
    "arena_bytes was counted by the interpreter on this machine, whose pointers have 64 bits; a "
    "32-bit microcontroller needs less.",
)

_NO_OPERATOR = re.compile(r"Didn't find op for builtin opcode '(\w+)'")
_REFUSED = re.compile(r"Node \S+ \(number (\d+)\) failed to (?:prepare|invoke)")
_ARENA = re.compile(r"Arena allocation (total|head|tail) (\d+) bytes")


def export(source: ExportSource, folder: Path, *, precision: Precision) -> Artifact:
    """Write ``student.tflite`` after it has run once in the interpreter.

    float32 takes and returns float32; int8 is int8 from end to end, as kernels and sensors of
    microcontrollers want it.

    Raises:
        MissingExtraError, ModelError: as ``Target.export``.
        InputError: int8 without calibration images, or an unknown float layer.
    """
    if precision == "int8":
        source.calibration("tflm")
    with quiet():
        # Asked for first: it is missing more often than the converter, which takes its time.
        micro = require_package(
            "tflite_micro.python.tflite_micro.runtime", target="tflm", package="tflite-micro"
        )
    content = tflite_file.convert(source, target="tflm", for_int8=precision == "int8")
    if precision == "int8":
        content = tflite_int8.quantize(content, source, target="tflm", float_ends=False)
    content = tflite_file.finish(content)
    facts = {**_try_out(micro, content), **tflite_file.operator_facts(content)}
    write_bytes(folder / FILE_NAME, content)
    return Artifact("tflm", precision, folder, (FILE_NAME,), batch="one", facts=facts, notes=NOTES)


def _try_out(micro: Any, content: bytes) -> dict[str, Any]:
    """Run the file once; return the bytes of static memory (arena) and flash that it takes."""
    with quiet() as printed:
        try:
            model = micro.Interpreter.from_bytes(content, arena_size=MAX_ARENA_BYTES)
            image = model.get_input_details(0)
            model.set_input(np.zeros(image["shape"], image["dtype"]), 0)
            model.invoke()
            model.print_allocations()
        # TFLM prints what is the matter and raises "failed to allocate tensors" for all of it.
        except RuntimeError as error:
            raise _failure(content, printed(), str(error)) from error
        found = {name: int(size) for name, size in _ARENA.findall(printed())}
        used = found["total"]
        bounds = {"too_few": used - ARENA_STEP_BYTES, "enough": 2 * used + 4096}
        arena_bytes = smallest_arena(micro, content, **bounds)
    return {
        "arena_bytes": arena_bytes,
        "arena_used_bytes": found["total"],
        "arena_activation_bytes": found["head"],
        "arena_persistent_bytes": found["tail"],
        "flash_bytes": len(content),
    }


def _failure(content: bytes, printed: str, reason: str) -> ModelError:
    steps = tflite_file.operators(content)
    missing, refused = _NO_OPERATOR.search(printed), _REFUSED.search(printed)
    if missing:
        layer = next((step.layer for step in steps if step.name == missing[1]), "")
        return cannot_export("tflm", reason="", layer=layer, operator=missing[1])
    first_line = next((line for line in printed.splitlines() if line.strip()), reason)
    if refused:
        step = steps[int(refused[1])]
        return cannot_export("tflm", reason=f"{step.name}: {first_line}", layer=step.layer)
    return cannot_export("tflm", reason=first_line)

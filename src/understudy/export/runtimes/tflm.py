"""Opens a ``.tflite`` in TensorFlow Lite Micro. NumPy and tflite-micro are all it needs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("tflite-micro", "numpy")
MIN_ARENA_BYTES = 1 << 16
MAX_ARENA_BYTES = 1 << 28
ARENA_STEP_BYTES = 16


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the interpreter's C++ prints of arenas that were too small off the screen."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file, contextlib.redirect_stderr(io.StringIO()):
            os.dup2(file.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def smallest_arena(
    runtime: Any, content: bytes, *, too_few: int = 0, enough: int = MAX_ARENA_BYTES
) -> int:
    """Return the bytes that an arena must have: laying it out takes more than is used then.

    Args:
        runtime: tflite-micro's module of that name.
        too_few, enough: what is known to be so, bytes.
    """
    too_few, enough = too_few // ARENA_STEP_BYTES, enough // ARENA_STEP_BYTES
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        try:
            runtime.Interpreter.from_bytes(content, arena_size=middle * ARENA_STEP_BYTES)
        except RuntimeError:
            too_few = middle
        else:
            enough = middle
    return enough * ARENA_STEP_BYTES


class TflmModel:
    """A loaded file: float32 images [n, C, H, W] in [0, 1] to logits [n, K], one by one.

    An int8 file gets int8 images with its own scale and zero point, as firmware would give them.
    """

    def __init__(self, path: str) -> None:
        content = Path(path).read_bytes()
        self.interpreter, arena_bytes = _open(content)
        self.image = self.interpreter.get_input_details(0)
        self.logits = self.interpreter.get_output_details(0)
        self.facts: dict[str, Any] = {"num_threads": 1, "given_arena_bytes": arena_bytes}

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        logits = []
        images_NHWC = np.moveaxis(np.asarray(images_NCHW, dtype=np.float32), 1, -1)
        for image_HWC in np.ascontiguousarray(images_NHWC):
            self.interpreter.set_input(_quantized(image_HWC[None], self.image), 0)
            self.interpreter.invoke()
            logits.append(_dequantized(self.interpreter.get_output(0), self.logits))
        return np.concatenate(logits)


def _open(content: bytes) -> tuple[Any, int]:
    """Return the interpreter with an arena that is large enough, and the arena's bytes."""
    from tflite_micro.python.tflite_micro import runtime

    arena_bytes = MIN_ARENA_BYTES
    while True:
        try:
            return runtime.Interpreter.from_bytes(content, arena_size=arena_bytes), arena_bytes
        except RuntimeError:
            if arena_bytes >= MAX_ARENA_BYTES:
                raise
            arena_bytes *= 2


def _scale(tensor: dict[str, Any]) -> tuple[np.float32, int]:
    parameters = tensor["quantization_parameters"]
    return np.float32(parameters["scales"][0]), int(parameters["zero_points"][0])


def _quantized(values: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    if tensor["dtype"] == np.float32:
        return values
    scale, zero_point = _scale(tensor)
    limits = np.iinfo(tensor["dtype"])
    steps = np.rint(values / scale) + zero_point
    clipped: np.ndarray = np.clip(steps, limits.min, limits.max).astype(tensor["dtype"])
    return clipped


def _dequantized(steps: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    if tensor["dtype"] == np.float32:
        return steps
    scale, zero_point = _scale(tensor)
    return (steps.astype(np.float32) - zero_point) * scale


def open_model(path: str, *, num_threads: int) -> TflmModel:
    """Load the file; the interpreter has one thread, whatever is asked for."""
    with _quiet():
        return TflmModel(path)

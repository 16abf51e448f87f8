"""Opens a ``.tflite`` in LiteRT. NumPy and ai-edge-litert are all it needs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

PACKAGES = ("ai-edge-litert", "numpy")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the runtime's C++ prints as it starts off the screen."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file, contextlib.redirect_stderr(io.StringIO()):
            os.dup2(file.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class TfliteModel:
    """A loaded file: float32 images [n, C, H, W] in [0, 1] to logits [n, K], one by one."""

    def __init__(self, path: str, *, num_threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_path=path, num_threads=num_threads)
        self.interpreter.allocate_tensors()
        self.input_index = self.interpreter.get_input_details()[0]["index"]
        self.output_index = self.interpreter.get_output_details()[0]["index"]
        self.facts: dict[str, Any] = {"num_threads": num_threads}

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        logits = []
        images_NHWC = np.moveaxis(np.asarray(images_NCHW, dtype=np.float32), 1, -1)
        for image_HWC in np.ascontiguousarray(images_NHWC):
            self.interpreter.set_tensor(self.input_index, image_HWC[None])
            self.interpreter.invoke()
            logits.append(self.interpreter.get_tensor(self.output_index))
        return np.concatenate(logits)


def open_model(path: str, *, num_threads: int) -> TfliteModel:
    """Load the file with this many threads."""
    with _quiet():
        return TfliteModel(path, num_threads=num_threads)

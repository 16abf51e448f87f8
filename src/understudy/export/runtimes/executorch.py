"""Opens a ``.pte`` in ExecuTorch. NumPy, torch and executorch are all it needs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

PACKAGES = ("executorch", "torch", "numpy")


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


class ExecutorchModel:
    """A loaded file: float32 images [n, C, H, W] in [0, 1] to logits [n, K], one by one."""

    def __init__(self, path: str, *, num_threads: int) -> None:
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        # The pool belongs to the process, not to the file.
        portable_lib._unsafe_reset_threadpool(num_threads)
        self.torch = torch
        self.program = Runtime.get().load_program(path)
        self.method = self.program.load_method("forward")
        self.facts: dict[str, Any] = {
            "num_threads": portable_lib._threadpool_get_thread_count(),
            "backend": "XNNPACK",
        }

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        logits = []
        for image_CHW in np.ascontiguousarray(images_NCHW, dtype=np.float32):
            (logits_1K,) = self.method.execute([self.torch.from_numpy(image_CHW[None])])
            logits.append(logits_1K.numpy())
        return np.concatenate(logits)


def open_model(path: str, *, num_threads: int) -> ExecutorchModel:
    """Load the file with this many threads, for every file of the process."""
    with _quiet():
        return ExecutorchModel(path, num_threads=num_threads)

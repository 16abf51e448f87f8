"""Opens an ONNX file in ONNX Runtime. NumPy and onnxruntime are all it needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

PACKAGES = ("onnxruntime", "numpy")


class OnnxModel:
    """A loaded file: float32 images [n, C, H, W] in [0, 1] to logits [n, K]."""

    def __init__(self, path: str, *, num_threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            path, sess_options=options, providers=["CPUExecutionProvider"]
        )
        self.input_name = self.session.get_inputs()[0].name
        self.output_name = self.session.get_outputs()[0].name
        self.facts: dict[str, Any] = {"providers": self.session.get_providers()}

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        # A file of early exits has further outputs; the first is that of the last exit.
        (logits_NK,) = self.session.run([self.output_name], {self.input_name: images_NCHW})
        return np.asarray(logits_NK)


def open_model(path: str, *, num_threads: int) -> OnnxModel:
    """Load the file with this many threads."""
    return OnnxModel(path, num_threads=num_threads)

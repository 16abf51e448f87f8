"""Opens an OpenVINO model on the CPU. NumPy and openvino are all it needs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

PACKAGES = ("openvino", "numpy")
# The layers that do the work, by the names that OpenVINO's CPU plug-in gives them.
COMPUTING = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


def import_openvino() -> Any:
    """Import openvino without the report of it that its telemetry sends over the network."""
    blocked = "openvino_telemetry" not in sys.modules
    if blocked:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if blocked:
            del sys.modules["openvino_telemetry"]
    return openvino


class OpenvinoModel:
    """A compiled model: float32 images [n, C, H, W] in [0, 1] to logits [n, K].

    ``facts["computing_layers"]`` counts the layers that do the work by the precision in which they
    are really executed, such as {"u8": 20}.
    """

    def __init__(self, path: str, *, num_threads: int) -> None:
        core = import_openvino().Core()
        # f32: by default the plug-in takes bfloat16 where the processor has it.
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": num_threads,
            "NUM_STREAMS": 1,
        }
        compiled = core.compile_model(path, "CPU", options)
        self.request = compiled.create_infer_request()
        self.facts: dict[str, Any] = {
            "device": core.get_property("CPU", "FULL_DEVICE_NAME"),
            "num_threads": compiled.get_property("INFERENCE_NUM_THREADS"),
            "computing_layers": _executed_precisions(compiled),
        }

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        results = self.request.infer({0: np.ascontiguousarray(images_NCHW)})
        # A copy: the next run writes into the same memory.
        return np.array(results[0])


def _executed_precisions(compiled: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for operation in compiled.get_runtime_model().get_ops():
        facts = operation.get_rt_info()
        if facts["layerType"].astype(str) in COMPUTING:
            precision = facts["runtimePrecision"].astype(str)
            counts[precision] = counts.get(precision, 0) + 1
    return counts


def open_model(path: str, *, num_threads: int) -> OpenvinoModel:
    """Compile the model ``path`` (.xml, its .bin beside it) for this many threads."""
    return OpenvinoModel(path, num_threads=num_threads)

"""The export targets by name, for what is checked before anything heavy is imported."""

from __future__ import annotations

# name -> extra that brings what it needs
TARGETS: dict[str, str] = {
    "onnx": "train",
    "openvino": "openvino",
    "executorch": "executorch",
    "tflite": "tflite",
    "tflm": "tflm",
    "ncnn": "ncnn",
    "coreml": "coreml",
    "c": "c",
    "web": "web",
}

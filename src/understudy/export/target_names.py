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
# name -> modules without which none of its files is made and run, each with its package
TARGET_MODULES: dict[str, dict[str, str]] = {
    "openvino": {"openvino": "openvino"},
    "executorch": {"executorch": "executorch"},
    "tflite": {"litert_torch": "litert-torch", "ai_edge_litert": "ai-edge-litert"},
    "tflm": {"litert_torch": "litert-torch", "tflite_micro": "tflite-micro"},
    "ncnn": {"ncnn": "ncnn", "pnnx": "pnnx"},
    "coreml": {"coremltools": "coremltools"},
    "c": {"emx_onnx_cgen": "emx-onnx-cgen"},
    "web": {"playwright": "playwright"},
}
# Formats whose tools here make no int8.
FLOAT_TARGETS = frozenset({"ncnn"})
# Of ONNX files: the set that the exporter's own operators are written in, and the one that most
# runtimes read (ONNX Runtime since 1.14, February 2023).
DEFAULT_OPSET = 18

"""ONNX for ONNX Runtime: float32, or int8 with quantise and dequantise nodes (QDQ)."""

from __future__ import annotations

from pathlib import Path

from understudy.export.onnx_file import export_onnx, read_onnx_facts
from understudy.export.target import Artifact, ExportSource, Precision

PRECISIONS: tuple[Precision, ...] = ("float32",)
RUNS_HERE = True
FILE_NAME = "student.onnx"


def export(source: ExportSource, folder: Path, *, precision: Precision) -> Artifact:
    """Write ``student.onnx``; see ``export_onnx`` for what the file holds."""
    path = folder / FILE_NAME
    export_onnx(
        source.model,
        path,
        image_shape=source.image_shape,
        class_names=source.class_names,
        metadata=source.metadata,
    )
    facts = read_onnx_facts(path)
    return Artifact("onnx", precision, folder, (FILE_NAME,), facts={"num_nodes": facts.num_nodes})

"""ONNX for ONNX Runtime: float32, or int8 with quantise and dequantise nodes (QDQ)."""

from __future__ import annotations

from pathlib import Path

from understudy.export.onnx_file import (
    export_onnx,
    file_entries,
    read_onnx_facts,
    write_proto,
)
from understudy.export.onnx_quantize import (
    CalibrationMethod,
    aware_int8_proto,
    static_int8_proto,
)
from understudy.export.target import Artifact, ExportSource, Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
RUNS_HERE = True
FILE_NAME = "student.onnx"


def export(
    source: ExportSource,
    folder: Path,
    *,
    precision: Precision,
    calibration: CalibrationMethod = "minmax",
) -> Artifact:
    """Write ``student.onnx``; see ``export_onnx`` and ``onnx_quantize`` for what the file holds.

    Args:
        calibration: for int8 without quantisation-aware training.
    """
    path = folder / FILE_NAME
    if precision == "float32":
        export_onnx(
            source.model,
            path,
            image_shape=source.image_shape,
            class_names=source.class_names,
            opset=source.opset,
            metadata=source.metadata,
        )
    else:
        _export_int8(source, path, calibration)
    facts = read_onnx_facts(path)
    return Artifact("onnx", precision, folder, (FILE_NAME,), facts={"num_nodes": facts.num_nodes})


def _export_int8(source: ExportSource, path: Path, calibration: CalibrationMethod) -> None:
    if source.quantized is not None:
        proto = aware_int8_proto(source.quantized, source.image_shape, opset=source.opset)
    else:
        proto = static_int8_proto(
            source.model,
            source.calibration("onnx"),
            image_shape=source.image_shape,
            float_layers=source.float_layers,
            method=calibration,
            opset=source.opset,
        )
    entries = file_entries(source.image_shape, source.class_names)
    write_proto(proto, path, entries=entries | dict(source.metadata))

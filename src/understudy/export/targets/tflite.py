"""LiteRT (TensorFlow Lite) for phones and embedded Linux."""

from __future__ import annotations

from pathlib import Path

from understudy.artifacts import write_bytes
from understudy.export import tflite_file, tflite_int8
from understudy.export.target import Artifact, ExportSource, Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
RUNS_HERE = True
FILE_NAME = "student.tflite"


def export(source: ExportSource, folder: Path, *, precision: Precision) -> Artifact:
    """Write ``student.tflite``: one float32 image NHWC to float32 logits, in int8 inside or not.

    Raises:
        MissingExtraError, ModelError: as ``Target.export``.
        InputError: int8 without calibration images, or an unknown float layer.
    """
    if precision == "int8":
        source.calibration("tflite")
    in_int8 = precision == "int8"
    content = tflite_file.convert(
        source, target="tflite", for_int8=in_int8, split_hard_swish=in_int8
    )
    if in_int8:
        content = tflite_int8.quantize(content, source, target="tflite", float_ends=True)
    content = tflite_file.finish(content, tflite_file.metadata_entries(source))
    write_bytes(folder / FILE_NAME, content)
    facts = tflite_file.operator_facts(content)
    return Artifact("tflite", precision, folder, (FILE_NAME,), batch="one", facts=facts)

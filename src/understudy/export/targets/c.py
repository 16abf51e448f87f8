"""Plain C for microcontrollers and everything else with a C compiler."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

from understudy.export.c_network import generate_network
from understudy.export.c_project import make_vector, write_project
from understudy.export.target import Artifact, ExportSource, Precision, find_target
from understudy.export.target_names import DEFAULT_OPSET

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
RUNS_HERE = True


def export(source: ExportSource, folder: Path, *, precision: Precision) -> Artifact:
    """Write a C project: ``student.c`` with its API, the network, a self-test and a Makefile.

    The network comes from the ONNX file of the same precision by emx-onnx-cgen. Int8 is computed
    with integers, as ONNX Runtime does.

    Raises:
        MissingExtraError, ModelError: as ``generate_network`` and the ONNX target.
    """
    with tempfile.TemporaryDirectory(prefix="understudy-") as onnx_folder:
        artifact = find_target("onnx").export(
            replace(source, opset=DEFAULT_OPSET), Path(onnx_folder), precision=precision
        )
        network = generate_network(artifact.path)
        vector = make_vector(
            artifact.path, source.image_shape, source.calibration_NCHW, precision=precision
        )
    files = write_project(
        folder,
        network,
        vector,
        class_names=source.class_names,
        precision=precision,
        metadata=source.metadata,
    )
    facts = {
        "weight_bytes": network.weight_bytes,
        "static_buffer_bytes": network.arena_bytes,
        "input_bytes": 4 * math.prod(source.image_shape),
        "num_nodes": network.num_nodes,
        "operators": list(network.operators),
        "test_tolerance": vector.tolerance,
    }
    notes = _notes(source, computes_in_float=precision == "int8" and not network.joined)
    return Artifact("c", precision, folder, files, batch="one", facts=facts, notes=notes)


def _notes(source: ExportSource, *, computes_in_float: bool) -> tuple[str, ...]:
    notes = ["The size is that of the source files; flash and RAM of a device are measured apart."]
    if source.calibration_NCHW is None or len(source.calibration_NCHW) == 0:
        notes.append("The self-test's images are noise, because there are no calibration images.")
    if computes_in_float:
        notes.append("An operator has no integer form in C: weights are int8, sums are float32.")
    return tuple(notes)

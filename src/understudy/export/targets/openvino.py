"""OpenVINO IR for Intel processors: float32, or int8 as the ONNX file's QDQ nodes say.

The network comes from the ONNX file, so weights of quantisation-aware training are carried over and
the metadata too (``rt_info/framework`` in the .xml). OpenVINO makes layers that run in int8 of the
QDQ nodes; in which precision they are really executed on this machine is in the artifact's facts.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from understudy.artifacts import write_bytes
from understudy.errors import ModelError
from understudy.export.divergence import unsupported_operator
from understudy.export.onnx_file import build_proto
from understudy.export.runtimes.openvino import import_openvino
from understudy.export.target import (
    Artifact,
    ExportSource,
    Precision,
    find_target,
    open_artifact,
    require_package,
)
from understudy.export.target_names import DEFAULT_OPSET

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
RUNS_HERE = True
# The runtime opens the first and finds the second by its name.
FILE_NAMES = ("student.xml", "student.bin")


def export(source: ExportSource, folder: Path, *, precision: Precision) -> Artifact:
    """Write ``student.xml`` and ``student.bin``: images [batch, C, H, W] to logits, any batch.

    Raises:
        MissingExtraError, ModelError, InputError: see ``Target`` and the target ``onnx``.
    """
    openvino = _import()
    with tempfile.TemporaryDirectory(prefix="understudy-") as temporary:
        exported = find_target("onnx").export(source, Path(temporary), precision=precision)
        network = _read(openvino, source, exported.path)
        saved = Path(temporary) / FILE_NAMES[0]
        openvino.save_model(network, saved, compress_to_fp16=False)
        # The weights first: a .xml has its weights beside it at any moment.
        for name in reversed(FILE_NAMES):
            write_bytes(folder / name, (saved.parent / name).read_bytes())
    artifact = Artifact("openvino", precision, folder, FILE_NAMES)
    layers = open_artifact(artifact).facts["computing_layers"]
    num_nodes = len(network.get_ops())
    notes = exported.notes
    if precision == "int8" and not any(name in layers for name in ("i8", "u8")):
        notes += ("OpenVINO executes none of its layers in int8 on this processor.",)
    return Artifact(
        "openvino",
        precision,
        folder,
        FILE_NAMES,
        facts={"num_nodes": num_nodes, "computing_layers": layers},
        notes=notes,
    )


def _import() -> Any:
    try:
        return import_openvino()
    except ModuleNotFoundError:
        return require_package("openvino", target="openvino")


def _read(openvino: Any, source: ExportSource, path: Path) -> Any:
    core = openvino.Core()

    def converts(part: nn.Module) -> bool:
        example_NCHW = torch.full((2, *source.image_shape), 0.5)
        proto = build_proto(part, example=example_NCHW, opset=DEFAULT_OPSET)
        try:
            core.compile_model(core.read_model(proto.SerializeToString()), "CPU")
        except RuntimeError:
            return False
        return True

    try:
        network = core.read_model(path)
        core.compile_model(network, "CPU")
    except RuntimeError as error:
        raise _unsupported(source, converts, str(error)) from error
    return network


def _unsupported(
    source: ExportSource, converts: Callable[[nn.Module], bool], said: str
) -> ModelError:
    # The operators come as "Det-18": the name and the operator set in which ONNX last changed it.
    found = re.search(r"No conversion rule found for operations: (.+)", said)
    lines = [line for line in said.splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else "it said nothing"
    if found:
        reason = f"OpenVINO has no operator for ONNX's {re.sub(r'-[0-9]+', '', found.group(1))}"
    return unsupported_operator(
        source.model, source.image_shape, converts, target="OpenVINO", reason=reason
    )

"""A trained model as one ONNX file that says what it takes, what it returns and where it came from.

Format of the file:
    input ``images``: float32 [batch, C, H, W], RGB (or gray), values in [0, 1]; batch is dynamic
    output ``logits``: float32 [batch, K], in the order of ``understudy.class_names``
    metadata (strings): the keys in ``METADATA_KEYS``, and ``understudy.<key>`` for what is given
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from understudy.artifacts import write_bytes
from understudy.errors import InputError, ModelError, problem
from understudy.export.target_names import DEFAULT_OPSET
from understudy.export.tracing import cannot_export, trace

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
OPSETS = range(18, 24)
MAX_FILE_BYTES = 2**31 - 1

METADATA_PREFIX = "understudy."
METADATA_KEYS = {
    "understudy.class_names": "JSON list of K strings, in the order of the logits",
    "understudy.input": "JSON: name, dtype, layout, range, image_shape [C, H, W]",
    "understudy.output": "JSON: name, dtype, layout",
    "understudy.version": "version of understudy that wrote the file",
    "understudy.recipe_hash": "SHA-256 of what made the network (when given): its part of the "
    "recipe, and the records that it was made from",
}


@dataclass(frozen=True)
class OnnxFacts:
    """What an ONNX file says about itself.

    Attributes:
        class_names: None for a file that was not written by ``export_onnx``.
        input_shape: None where a size is dynamic, as the batch is.
        metadata: every metadata entry as it is in the file.
    """

    class_names: tuple[str, ...] | None
    input_name: str
    input_shape: tuple[int | None, ...]
    output_name: str
    output_shape: tuple[int | None, ...]
    opset: int
    ir_version: int
    num_nodes: int
    size_bytes: int
    metadata: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the facts as a plain dict."""
        return asdict(self)


def portable_copy(model: nn.Module) -> nn.Module:
    """Return a float32 copy on the CPU in evaluation mode; the model itself is left alone."""
    return copy.deepcopy(model).cpu().float().eval()


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> OnnxFacts:
    """Write ``model`` (normalisation included) to ``path``, atomically, and return its facts.

    The same model gives the same bytes. The file is checked by ``onnx.checker`` before it gets its
    name; whether it computes the same is for ``check_parity`` to say.

    Args:
        model: takes float images NCHW in [0, 1] and returns logits, such as a ``NormalizedModel``.
        image_shape: (C, H, W).
        metadata: more entries, such as {"recipe_hash": ...}, stored as ``understudy.<key>``.

    Raises:
        ModelError: the model's outputs do not fit the class names, it uses an operator that ONNX
            cannot express (the layer is named), it fixes the batch size, or it is over 2 GB.
        InputError: the opset is out of range.
    """
    portable = portable_copy(model)
    # Two images: a batch of one would be taken for a constant.
    example_NCHW = torch.full((2, *image_shape), 0.5)
    _check_outputs(portable, example_NCHW, num_classes=len(class_names))
    entries = file_entries(image_shape, class_names) | dict(metadata or {})
    write_onnx(portable, path, example=example_NCHW, opset=opset, entries=entries)
    return read_onnx_facts(path)


def write_onnx(
    model: nn.Module,
    path: Path,
    *,
    example: Tensor,
    opset: int,
    entries: Mapping[str, str],
    input_name: str = INPUT_NAME,
    output_name: str = OUTPUT_NAME,
) -> None:
    """Write a portable model of one input, shaped as the example but for its batch.

    Args:
        example: two samples at least.
        entries: the metadata, without the keys' prefix.

    Raises:
        ModelError, InputError: as ``export_onnx``.
    """
    proto = build_proto(
        model, example=example, opset=opset, input_name=input_name, output_names=[output_name]
    )
    write_proto(proto, path, entries=entries)


def build_proto(
    model: nn.Module,
    *,
    example: Tensor,
    opset: int,
    input_name: str = INPUT_NAME,
    output_names: Sequence[str] = (OUTPUT_NAME,),
) -> onnx.ModelProto:
    """Return the graph of a portable model that returns a tensor, or a list of several.

    Raises:
        ModelError, InputError: as ``export_onnx``.
    """
    if opset not in OPSETS:
        raise InputError(
            problem(
                f"the ONNX opset is {opset}",
                expected=f"{OPSETS.start} to {OPSETS.stop - 1}",
                mend=f"Leave it out for {DEFAULT_OPSET}.",
            )
        )
    with _quiet_exporter():
        captured = trace(model, example, target="ONNX", any_batch=True)
        proto = _translate(captured, opset, input_name, output_names)
    strip(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto


def write_proto(proto: onnx.ModelProto, path: Path, *, entries: Mapping[str, str]) -> None:
    """Check a graph and write it with its metadata, atomically."""
    onnx.helper.set_model_props(
        proto, {METADATA_PREFIX + key: entries[key] for key in sorted(entries)}
    )
    onnx.checker.check_model(proto, full_check=True)
    write_bytes(path, proto.SerializeToString(deterministic=True))


def file_entries(image_shape: tuple[int, int, int], class_names: Sequence[str]) -> dict[str, str]:
    """Return the metadata of every file, without the keys' prefix."""
    images = {"name": INPUT_NAME, "dtype": "float32", "layout": "NCHW", "range": [0, 1]}
    logits = {"name": OUTPUT_NAME, "dtype": "float32", "layout": "NK"}
    return {
        "class_names": json.dumps(list(class_names)),
        "input": json.dumps({**images, "image_shape": list(image_shape)}),
        "output": json.dumps(logits),
        "version": version("understudy"),
    }


def read_onnx_facts(path: Path) -> OnnxFacts:
    """Read back what an ONNX file says about itself.

    Raises:
        InputError: the file is missing or is not an ONNX model with an image input.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
        inputs = [
            value
            for value in proto.graph.input
            if value.name not in {tensor.name for tensor in proto.graph.initializer}
        ]
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        names = metadata.get(METADATA_PREFIX + "class_names")
        return OnnxFacts(
            class_names=None if names is None else tuple(json.loads(names)),
            input_name=inputs[0].name,
            input_shape=_shape(inputs[0]),
            output_name=proto.graph.output[0].name,
            output_shape=_shape(proto.graph.output[0]),
            opset=next(entry.version for entry in proto.opset_import if entry.domain == ""),
            ir_version=proto.ir_version,
            num_nodes=len(proto.graph.node),
            size_bytes=path.stat().st_size,
            metadata=metadata,
        )
    # onnx reports damage with protobuf's own exception, which has no common base but Exception.
    except Exception as error:
        raise InputError(
            problem(
                f"{path} cannot be read as an ONNX model ({type(error).__name__}: {error})",
                expected="an ONNX file with an image input and an output of logits",
                mend="Export the model again with `understudy export`.",
            )
        ) from error


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def _check_outputs(model: nn.Module, example_NCHW: Tensor, *, num_classes: int) -> None:
    with torch.inference_mode():
        logits_NK = model(example_NCHW)
    expected_shape = (len(example_NCHW), num_classes)
    given = tuple(logits_NK.shape) if isinstance(logits_NK, Tensor) else type(logits_NK).__name__
    if given != expected_shape:
        raise ModelError(
            problem(
                f"for {len(example_NCHW)} images the model returns {given}",
                expected=f"logits of shape {expected_shape}, one for each class name",
                mend="Give the class names of the data that the model was made for.",
            )
        )


def _translate(
    captured: torch.export.ExportedProgram,
    opset: int,
    input_name: str,
    output_names: Sequence[str],
) -> onnx.ModelProto:
    num_bytes = sum(tensor.nbytes for tensor in captured.state_dict.values())
    if num_bytes > MAX_FILE_BYTES:
        raise ModelError(
            problem(
                f"the model's weights take {num_bytes / 2**30:.1f} GB",
                expected="less than 2 GB, the most that one ONNX file can hold",
                mend="Choose a smaller model.",
            )
        )
    try:
        program = torch.onnx.export(
            captured,
            (),
            dynamo=True,
            verbose=False,
            input_names=[input_name],
            output_names=list(output_names),
            opset_version=opset,
            optimize=True,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason, layer = _untranslated(captured, error)
        raise cannot_export("ONNX", reason=reason, layer=layer) from error
    assert program is not None  # the exporter returns None only for its old TorchScript path
    return program.model_proto


def _untranslated(captured: torch.export.ExportedProgram, error: BaseException) -> tuple[str, str]:
    """Return (reason, layer) of a failed translation; the layer is "" where it is not known."""
    reason, node_name = str(error), None
    cause: BaseException | None = error
    while cause is not None:
        reason = str(cause)
        found = re.search(r"Error when translating node %(\w+)", reason)
        node_name = found.group(1) if found else node_name
        cause = cause.__cause__
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", reason)
    if operator:
        reason = f"ONNX has no operator for {operator.group(1)}"
    # The failing node is one of the program after decomposition, which the exporter keeps to
    # itself: look in the program as captured, then in the decomposed one.
    for program in (captured, captured.run_decompositions()):
        for node in program.graph.nodes:
            if node.name == node_name and node.meta.get("nn_module_stack"):
                name, kind = list(node.meta["nn_module_stack"].values())[-1]
                return reason, f"{name} ({str(kind).rsplit('.', 1)[-1]})"
    return reason, ""


def strip(proto: onnx.ModelProto) -> None:
    """Remove what the exporter leaves for its own debugging: often more bytes than the weights."""
    graph = proto.graph
    graph.name = "understudy"
    graph.ClearField("value_info")
    owners = (graph, *graph.node, *graph.input, *graph.output, *graph.initializer)
    for function in proto.functions:
        function.ClearField("value_info")
        owners += (function, *function.node)
    for owner in owners:
        owner.ClearField("metadata_props")
        owner.ClearField("doc_string")
    proto.ClearField("doc_string")


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes to its developers off the user's screen.

    They are: torchvision's operators are not registered (it is not used), a deprecated call inside
    torch itself, and on failure a print of the graph so far.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

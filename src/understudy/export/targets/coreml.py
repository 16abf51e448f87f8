"""Core ML, for Apple's devices: an ML program in float32, or with int8 weights.

Converting works on any system, predicting on macOS alone. ``int8`` is the weights' precision here:
they are stored as int8 with one scale a channel and the sums are made in floating point, so it
saves bytes, needs no calibration images, and takes nothing from ``ExportSource.quantized`` but the
weights that its training left in ``ExportSource.model``.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
import tempfile
import traceback
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from understudy.artifacts import write_bytes
from understudy.errors import ModelError
from understudy.export.divergence import unsupported_operator
from understudy.export.onnx_file import (
    INPUT_NAME,
    METADATA_PREFIX,
    OUTPUT_NAME,
    file_entries,
    portable_copy,
)
from understudy.export.target import Artifact, ExportSource, Precision, require_package

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
RUNS_HERE = False
PACKAGE_NAME = "student.mlpackage"
MANIFEST_NAME = "Manifest.json"
# An ML program wants a largest batch.
MAX_BATCH = 128
# Tensors of fewer weights, such as biases, cost more in scales than they save.
MIN_QUANTIZED_WEIGHTS = 128
NOT_RUN = "not run: Core ML predicts on macOS only"
# coremltools imports what it finds of these, to convert from them or to call their tools, and warns
# of each version that it does not know: none is needed here, and together they take seconds.
_UNNEEDED = ("executorch", "sklearn", "tensorflow", "torchao", "xgboost")


def export(source: ExportSource, folder: Path, *, precision: Precision) -> Artifact:
    """Write the package ``student.mlpackage``, a folder: images [batch, C, H, W] to logits.

    Raises:
        MissingExtraError, ModelError: see ``Target``.
    """
    tools = _import()
    portable = portable_copy(source.model)
    program = None
    try:
        with _quiet(), _released():
            program = _capture(portable, source.image_shape)
            network = _convert(tools, program, source.image_shape)
    # Tracing runs the user's code, and the converter raises anything.
    except Exception as error:
        raise _unsupported(tools, portable, source, _reason(error, program)) from error
    facts: dict[str, Any] = {"max_batch": MAX_BATCH}
    if precision == "int8":
        with _quiet():
            network, num_quantized = _with_int8_weights(tools, network, program, source)
        facts["num_int8_weights"] = num_quantized
    entries = file_entries(source.image_shape, source.class_names) | dict(source.metadata)
    _describe(network, entries)
    with tempfile.TemporaryDirectory(prefix="understudy-") as temporary:
        saved = Path(temporary) / PACKAGE_NAME
        with _quiet():
            network.save(str(saved))
        _write_package(saved, folder / PACKAGE_NAME)
    facts["num_operations"] = len(_operations(network))
    return Artifact("coreml", precision, folder, (PACKAGE_NAME,), facts=facts, notes=(NOT_RUN,))


def _import() -> Any:
    hidden = [name for name in _UNNEEDED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        with _quiet():
            require_package("coremltools.optimize.coreml", target="coreml", package="coremltools")
            return require_package("coremltools", target="coreml")
    finally:
        for name in hidden:
            del sys.modules[name]


def _capture(model: nn.Module, image_shape: tuple[int, int, int]) -> Any:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    program = torch.export.export(
        model,
        # Two images: a batch of one would be taken for a constant.
        (torch.full((2, *image_shape), 0.5),),
        dynamic_shapes=({0: batch},),
        strict=False,
    )
    return program.run_decompositions()


def _convert(tools: Any, program: Any, image_shape: tuple[int, int, int]) -> Any:
    shape = (tools.RangeDim(1, MAX_BATCH), *image_shape)
    return tools.convert(
        program,
        inputs=[tools.TensorType(name=INPUT_NAME, shape=shape)],
        outputs=[tools.TensorType(name=OUTPUT_NAME)],
        convert_to="mlprogram",
        compute_precision=tools.precision.FLOAT32,
        # The first whose programs hold int8 weights (2022).
        minimum_deployment_target=tools.target.iOS16,
        skip_model_load=True,
    )


def _with_int8_weights(
    tools: Any, network: Any, program: Any, source: ExportSource
) -> tuple[Any, int]:
    """Return the network with int8 weights, and the number of weights that have become int8."""
    optimize = tools.optimize.coreml
    config = optimize.OptimizationConfig(
        global_config=optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric", weight_threshold=MIN_QUANTIZED_WEIGHTS - 1
        ),
        op_name_configs=dict.fromkeys(_operation_names(program, source.float_layers)),
    )
    quantized = optimize.linear_quantize_weights(network, config=config)
    stored = [op for op in _operations(quantized) if op.type == "constexpr_affine_dequantize"]
    sizes = [torch.Size(_shape(op.outputs[0])).numel() for op in stored]
    return quantized, sum(sizes)


def _operation_names(program: Any, layers: Sequence[str]) -> list[str]:
    """Return the names that the converter may give to the operations of these layers.

    It names an operation after its node; a batch norm that is merged into a convolution leaves its
    own name there.
    """
    names: list[str] = []
    for node in program.graph.nodes:
        paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        if any(layer in paths for layer in layers):
            names += [node.name, *(user.name for user in node.users)]
            names += [user.name for first in node.users for user in first.users]
    return list(dict.fromkeys(names))


def _operations(network: Any) -> list[Any]:
    functions = network.get_spec().mlProgram.functions
    return [
        operation
        for function in functions.values()
        for block in function.block_specializations.values()
        for operation in block.operations
    ]


def _shape(value: Any) -> list[int]:
    return [dimension.constant.size for dimension in value.type.tensorType.dimensions]


def _describe(network: Any, entries: dict[str, str]) -> None:
    metadata = network.user_defined_metadata
    for key in sorted(entries):
        metadata[METADATA_PREFIX + key] = entries[key]
    # The same network gives the same bytes on any day.
    del metadata["com.github.apple.coremltools.conversion_date"]


def _write_package(saved: Path, package: Path) -> None:
    """Write the package's files, each atomically, the manifest that names them last."""
    manifest = json.loads((saved / MANIFEST_NAME).read_text())
    # Identifiers drawn at random; by the path that they stand for, they do as well.
    names = {
        old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"]))
        for old, entry in manifest["itemInfoEntries"].items()
    }
    manifest["itemInfoEntries"] = {
        names[old]: entry for old, entry in manifest["itemInfoEntries"].items()
    }
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    paths = sorted(path for path in (saved / "Data").rglob("*") if path.is_file())
    shutil.rmtree(package, ignore_errors=True)  # what a killed export left is no part of it
    for path in paths:
        write_bytes(package / path.relative_to(saved), path.read_bytes())
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    write_bytes(package / MANIFEST_NAME, text.encode())


def _reason(error: Exception, program: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    if program is not None and reason.startswith("torch."):
        # The converter names the type of number that it lacks; an operator is first to return it.
        for node in program.graph.nodes:
            if str(getattr(node.meta.get("val"), "dtype", None)) == reason:
                return f"it has no {reason}, which {node.target} returns"
    return reason


def _unsupported(tools: Any, model: nn.Module, source: ExportSource, reason: str) -> ModelError:
    def converts(part: nn.Module) -> bool:
        try:
            with _quiet(), _released():
                _convert(tools, _capture(part, source.image_shape), source.image_shape)
        except Exception:
            return False
        return True

    return unsupported_operator(
        model, source.image_shape, converts, target="Core ML", reason=reason
    )


@contextlib.contextmanager
def _released() -> Iterator[None]:
    """Let go of the temporary folder that a failed conversion leaves in its frames.

    Else it warns of that whenever the exception itself is let go.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars, and warnings about versions and coremltools' own code, off the screen."""
    loggers = [logging.getLogger(name) for name in ("coremltools", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

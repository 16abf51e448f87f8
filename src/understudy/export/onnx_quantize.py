"""An int8 ONNX file: float32 graph with quantise and dequantise nodes (QDQ), for ONNX Runtime.

Weights are int8 with a scale for each output channel, activations uint8 with one range each.
Pictures are normalised in float32 and rounded once after that; logits are not rounded.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from understudy.errors import InputError, problem
from understudy.export.onnx_file import build_proto, portable_copy, strip
from understudy.export.onnx_int8 import Int8Graph
from understudy.export.target_names import DEFAULT_OPSET

CalibrationMethod = Literal["minmax", "percentile", "entropy"]
CALIBRATION_METHODS = ("minmax", "percentile", "entropy")
DEFAULT_PERCENTILE = 99.99
_BATCH_SIZE = 32
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_OPS = (
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Flatten",
    "Gather",
    "GlobalAveragePool",
    "LeakyRelu",
    "MaxPool",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    *_WEIGHTED,
)


def static_int8_proto(
    model: nn.Module,
    calibration_NCHW: Tensor,
    *,
    image_shape: tuple[int, int, int],
    float_layers: Sequence[str] = (),
    method: CalibrationMethod = "minmax",
    percentile: float = DEFAULT_PERCENTILE,
    opset: int = DEFAULT_OPSET,
) -> onnx.ModelProto:
    """Return the int8 graph of a trained float model, calibrated on images after training.

    Args:
        model: as for ``export_onnx``.
        calibration_NCHW: uint8 or float images of the calibration split; a few hundred are enough.
        float_layers: names of modules of ``model`` that stay in float32.
        method: how an activation's range is found: its extremes, extremes without the tails, or
            the range whose rounding keeps the distribution nearest (Migacz 2017).
        percentile: for "percentile": share of values kept, in percent.
        opset: of ONNX.

    Raises:
        InputError: no images, an unknown method or layer.
        ModelError: as for ``export_onnx``.
    """
    _check_request(model, calibration_NCHW, image_shape, float_layers, method)
    example_NCHW = torch.full((2, *image_shape), 0.5)
    proto = build_proto(portable_copy(model), example=example_NCHW, opset=opset)
    excluded = float_nodes(proto, float_layers)
    _require_int8_layers(proto, excluded, float_layers)
    quantized = _quantize(proto, calibration_NCHW, excluded, method=method, percentile=percentile)
    return finish_int8(quantized)


def aware_int8_proto(
    quantized: nn.Module, image_shape: tuple[int, int, int], *, opset: int = DEFAULT_OPSET
) -> onnx.ModelProto:
    """Return the int8 graph of a network that torchao's ``convert_pt2e`` made.

    Raises:
        ModelError: an operator that ONNX cannot express.
    """
    example_NCHW = torch.full((2, *image_shape), 0.5)
    return finish_int8(build_proto(quantized, example=example_NCHW, opset=opset))


def finish_int8(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Strip an int8 graph and make explicit what ONNX Runtime would otherwise guess."""
    strip(proto)
    graph = Int8Graph(proto)
    for node in list(proto.graph.node):
        if node.op_type in ("Conv", "Gemm"):
            graph.quantize_bias(node)
            graph.keep_float(node)
        elif node.op_type in ("HardSwish", "HardSigmoid"):
            graph.narrow_input(node)
    graph.sort()
    return proto


def float_nodes(proto: onnx.ModelProto, float_layers: Sequence[str]) -> list[str]:
    """Return the names of the nodes that stay in float32.

    They are the weighted nodes of these modules, everything before the first weighted node that is
    quantised and everything after the last one. A node belongs to the module whose parameters it
    reads: the exporter gives those the names that they have in the model.
    """
    nodes = list(proto.graph.node)
    weights = {tensor.name for tensor in proto.graph.initializer}
    prefixes = tuple(f"{name}." for name in float_layers)
    weighted = [
        node
        for node in nodes
        if node.op_type in _WEIGHTED
        and any(name in weights for name in node.input)
        and not (prefixes and any(name.startswith(prefixes) for name in node.input))
    ]
    after, leading = set(), set()
    produced = {name for node in weighted for name in node.output}
    wanted = {name for node in weighted for name in node.input}
    for node in nodes:  # in topological order
        if produced.intersection(node.input):
            produced.update(node.output)
            after.add(node.name)
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            leading.add(node.name)
    kept = {node.name for node in weighted}
    for node in nodes:
        if node.op_type not in _WEIGHTED and node.name in after & leading:
            kept.add(node.name)
    return [node.name for node in nodes if node.name not in kept]


class CalibrationImages:
    """Feeds batches to ONNX Runtime's calibration, as many at a time as it asks for."""

    def __init__(self, images_NCHW: Tensor, input_name: str) -> None:
        pixels_NCHW = images_NCHW.cpu().numpy()
        if pixels_NCHW.dtype == np.uint8:
            pixels_NCHW = pixels_NCHW.astype(np.float32) / np.float32(255)
        starts = range(0, len(pixels_NCHW), _BATCH_SIZE)
        self.batches = [pixels_NCHW[start : start + _BATCH_SIZE] for start in starts]
        self.input_name = input_name
        self.set_range(0, len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Choose the batches that ``get_next`` gives."""
        self.waiting = list(range(start_index, end_index))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None after the last one."""
        if not self.waiting:
            return None
        return {self.input_name: self.batches[self.waiting.pop(0)]}


def _quantize(
    proto: onnx.ModelProto,
    images_NCHW: Tensor,
    excluded: Sequence[str],
    *,
    method: CalibrationMethod,
    percentile: float,
) -> onnx.ModelProto:
    from onnxruntime import quantization

    methods = {
        "minmax": quantization.CalibrationMethod.MinMax,
        "percentile": quantization.CalibrationMethod.Percentile,
        "entropy": quantization.CalibrationMethod.Entropy,
    }
    reader = CalibrationImages(images_NCHW, proto.graph.input[0].name)
    # Says that the graph needs no preparation (batch norm is folded in already), which ONNX Runtime
    # would otherwise advise on the user's screen.
    onnx.helper.set_model_props(proto, {"onnx.quant.pre_process": "onnxruntime.quant"})
    # ONNX Runtime prints how far it is with percentile and entropy.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder, quiet:
        path = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            proto,
            path,
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=sorted(_OPS),
            nodes_to_exclude=list(excluded),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=True,  # as in ``quant_affine``
            calibrate_method=methods[method],
            extra_options={
                # Logits are not rounded; between layers the next one's input is.
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                "CalibPercentile": percentile,
                # One batch's activations in memory at a time, not those of all images.
                "CalibStridedMinMax": 1,
                "TensorQuantOverrides": {
                    name: [{"axis": 0, "reduce_range": False}] for name in _depthwise_weights(proto)
                },
            },
        )
        return onnx.load(path)


def _depthwise_weights(proto: onnx.ModelProto) -> list[str]:
    """Return the weights that take all eight bits, as in ``quant_affine.largest_weight``."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    names = []
    for node in proto.graph.node:
        shape = shapes.get(node.input[1], ()) if node.op_type == "Conv" else ()
        num_groups = {a.name: a.i for a in node.attribute}.get("group", 1)
        if len(shape) > 2 and shape[1] == 1 and num_groups == shape[0] > 1:
            names.append(node.input[1])
    return names


def _require_int8_layers(
    proto: onnx.ModelProto, excluded: Sequence[str], float_layers: Sequence[str]
) -> None:
    left = [n for n in proto.graph.node if n.op_type in _WEIGHTED and n.name not in set(excluded)]
    if not left:
        raise InputError(
            problem(
                f"no layer is left to quantise (float_layers: {list(float_layers)})",
                expected="at least one convolution or linear layer in int8",
                mend="Name fewer float layers, or export in float32.",
            )
        )


def _check_request(
    model: nn.Module,
    images_NCHW: Tensor,
    image_shape: tuple[int, int, int],
    float_layers: Sequence[str],
    method: str,
) -> None:
    problems = []
    if images_NCHW.ndim != 4 or len(images_NCHW) == 0 or images_NCHW.shape[1:] != image_shape:
        problems.append(
            problem(
                f"calibration images have shape {tuple(images_NCHW.shape)}",
                expected=f"at least one image, [n, {', '.join(map(str, image_shape))}]",
                mend="Set data.calibration_fraction above 0.",
            )
        )
    if method not in CALIBRATION_METHODS:
        problems.append(
            problem(
                f"the calibration method is '{method}'",
                expected=f"one of {', '.join(CALIBRATION_METHODS)}",
                mend="Correct the name.",
            )
        )
    known: Mapping[str, nn.Module] = dict(model.named_modules())
    leaves = [name for name, module in known.items() if isinstance(module, nn.Conv2d | nn.Linear)]
    problems += [
        problem(
            f"the float layer '{name}' is not in the model",
            expected=f"one of {', '.join(leaves)}, or a module that holds some",
            mend="Correct the name.",
        )
        for name in float_layers
        if name not in known or name == ""
    ]
    if problems:
        raise InputError(*problems)

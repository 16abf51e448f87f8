"""A trained model as a ``.tflite`` flatbuffer, for LiteRT and for TensorFlow Lite Micro.

Format of the file:
    input: [1, H, W, C], float32 with values in [0, 1], or int8 with the scale and zero point that
        the file names (channels last is what kernels for phones and microcontrollers read)
    output: [1, K] logits, float32 or int8 likewise
    names: an operator's output is named after the layer it comes from
    metadata ``understudy`` (when asked for): JSON, what it takes and returns and where it is from
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from understudy.export.onnx_file import file_entries, portable_copy
from understudy.export.target import ExportSource, require_package
from understudy.export.tracing import (
    cannot_export,
    check_float_layers,
    layer_of,
    quiet,
    trace,
)
from understudy.models.build import NormalizedModel

METADATA_NAME = "understudy"
# What the converter calls the only input and signature of a model.
INPUT_NAME = "args_0"
SIGNATURE_NAME = "serving_default"
_NO_OPERATOR = re.compile(r"Lowering not found: ([\w.]+)")
# Classes of ``_named_after_layers``, as they stand in the converter's locations.
_LAYER = re.compile(r"layer\.([^$/;]*)\$")
# The layer that normalises pixels in an int8 file; a network of the user's has none of that name.
NORMALIZATION = "pixel_normalization"
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
# The one entry of the converter's metadata that runtimes read.
_KEPT_METADATA = b"min_runtime_version"


@dataclass(frozen=True)
class Operator:
    """One operator of a file.

    Attributes:
        layer: the module it comes from, "" where that is not known.
        is_float: it computes in float32.
    """

    name: str
    layer: str
    is_float: bool


class ChannelsLast(nn.Module):
    """The model for images NHWC."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_NHWC: Tensor) -> Tensor:
        logits_NK: Tensor = self.model(images_NHWC.permute(0, 3, 1, 2))
        return logits_NK


class _NormalizedByConvolution(NormalizedModel):
    """A model that normalises pixels by a depthwise convolution of one pixel."""

    def normalize(self, images_NCHW: Tensor) -> Tensor:
        pixels_NCHW: Tensor = self.get_submodule(NORMALIZATION)(images_NCHW)
        return pixels_NCHW


def convert(
    source: ExportSource, *, target: str, for_int8: bool = False, split_hard_swish: bool = False
) -> bytes:
    """Return the float32 file of one image.

    Args:
        for_int8: pixels are normalised by a convolution, whose sum is rounded once. Of a product
            and a sum both would be, with coarse constants.
        split_hard_swish: as products and sums. LiteRT's fast kernels have no hard swish in int8.

    Raises:
        MissingExtraError: litert-torch is not installed.
        ModelError: an operator that LiteRT lacks, named with its layer.
    """
    model = portable_copy(source.model)
    check_float_layers(model, source.float_layers)
    if for_int8:
        _normalize_by_convolution(model)
    if split_hard_swish:
        _split_hard_swish(model)
    channels, height, width = source.image_shape
    named = ChannelsLast(_named_after_layers(model)).eval()
    with quiet():
        converter = require_package("litert_torch", target=target, package="litert-torch")
        try:
            example_NHWC = torch.full((1, height, width, channels), 0.5)
            content: bytes = converter.convert(named, (example_NHWC,)).model_content()
        # The converter traces user code and lowers it in C++: any exception can come out of it.
        except Exception as error:
            example_NCHW = torch.full((1, *source.image_shape), 0.5)
            program = trace(model, example_NCHW, target=target)
            found = _NO_OPERATOR.search(str(error))
            operator = "" if found is None else found[1]
            layer = layer_of(program, operator) if operator else ""
            raise cannot_export(
                target, reason=str(error), layer=layer, operator=operator
            ) from error
        return _with_short_names(content, weighted=_weighted_layers(model))


def finish(content: bytes, entries: Mapping[str, str] | None = None) -> bytes:
    """Return the file without what only the converters use, and with the metadata given."""
    tools = flatbuffer_tools()
    file = tools.read_model_from_bytearray(content)
    for graph in file.subgraphs:
        used = {index for node in graph.operators for index in node.outputs}
        ends = {*graph.inputs, *graph.outputs}
        for index, tensor in enumerate(graph.tensors):
            if index not in used | ends:
                tensor.name = b""
    file.description = b""
    file.metadata = [entry for entry in file.metadata or [] if entry.name == _KEPT_METADATA]
    if entries:
        schema = tools.schema_fb
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data = list(json.dumps(dict(entries), sort_keys=True).encode())
        file.buffers.append(buffer)
        entry.name, entry.buffer = METADATA_NAME.encode(), len(file.buffers) - 1
        file.metadata.append(entry)
    return bytes(tools.convert_object_to_bytearray(file))


def metadata_entries(source: ExportSource) -> dict[str, str]:
    """Return the entries that a file carries: those of an ONNX file, for its own layout."""
    entries = file_entries(source.image_shape, source.class_names)
    images = json.loads(entries["input"])
    channels, height, width = source.image_shape
    images |= {"name": INPUT_NAME, "layout": "NHWC", "image_shape": [height, width, channels]}
    return {**entries, "input": json.dumps(images), **source.metadata}


def read_metadata(content: bytes) -> dict[str, str]:
    """Return the entries of ``finish``, empty for a file without them."""
    file = flatbuffer_tools().read_model_from_bytearray(content)
    for entry in file.metadata or []:
        if entry.name == METADATA_NAME.encode():
            entries: dict[str, str] = json.loads(bytes(file.buffers[entry.buffer].data))
            return entries
    return {}


def operators(content: bytes) -> list[Operator]:
    """Return the operators of the main graph in the order of execution."""
    tools = flatbuffer_tools()
    file = tools.read_model_from_bytearray(content)
    found = []
    for node in file.subgraphs[0].operators:
        name, output = operator_name(tools, file, node), file.subgraphs[0].tensors[node.outputs[0]]
        is_float = output.type == tools.TensorType.FLOAT32 and name != "DEQUANTIZE"
        found.append(Operator(name, output.name.decode().partition(":")[0], is_float))
    return found


def operator_facts(content: bytes) -> dict[str, Any]:
    """Return how often each operator occurs, most frequent first, and those in float32."""
    steps = operators(content)
    names = Counter(step.name for step in steps)
    in_float = Counter(step.name for step in steps if step.is_float)
    return {
        "num_operators": len(steps),
        "operators": dict(names.most_common()),
        "float_operators": dict(in_float.most_common()),
    }


class _HardSwish(nn.Module):
    """Hard swish as the converter does not know it; it would make one operator of it again."""

    def forward(self, features: Tensor) -> Tensor:
        return (features * (1 / 6)) * nn.functional.relu6(features + 3)


def _normalize_by_convolution(model: nn.Module) -> None:
    for module in list(model.modules()):
        if type(module) is NormalizedModel and module.color_order == "rgb":
            channels = module.scale.numel()
            layer = nn.Conv2d(channels, channels, kernel_size=1, groups=channels)
            layer.weight = nn.Parameter(module.scale.view(-1, 1, 1, 1))
            layer.bias = nn.Parameter(module.shift.flatten())
            module.add_module(NORMALIZATION, layer)
            module.__class__ = _NormalizedByConvolution


def _split_hard_swish(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Hardswish):
                setattr(module, name, _HardSwish())


def _named_after_layers(model: nn.Module) -> nn.Module:
    """Return a copy in which each module has a class of its own, called as the module is.

    The converter names an operator after the classes of the modules around it, from which a layer
    could not always be told.
    """
    named = copy.deepcopy(model)
    for name, module in named.named_modules():
        kind = type(module)
        module.__class__ = type(
            kind.__name__, (kind,), {"__module__": "layer", "__qualname__": f"{name}$"}
        )
    return named


def _weighted_layers(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if any(weight.ndim > 1 for weight in module.parameters(recurse=False))
    }


def _with_short_names(content: bytes, *, weighted: set[str]) -> bytes:
    """Name tensors ``layer:number`` instead of by the whole way to them.

    The ways take more bytes than the weights of a small network.
    """
    tools = flatbuffer_tools()
    file = tools.read_model_from_bytearray(content)
    for graph in file.subgraphs:
        layers = {
            index: _layer_in(tensor.name, weighted) for index, tensor in enumerate(graph.tensors)
        }
        for node in graph.operators:
            # The output of the last operator is called after the signature; its weights are not.
            if operator_name(tools, file, node) in WEIGHTED:
                layers[node.outputs[0]] = layers[node.inputs[1]]
        for index, tensor in enumerate(graph.tensors):
            if index in graph.outputs:
                tensor.name = f"{layers[index]}:logits".encode()
            elif index not in graph.inputs:
                tensor.name = f"{layers[index]}:{index}".encode()
    return bytes(tools.convert_object_to_bytearray(file))


def _layer_in(location: bytes, weighted: set[str]) -> str:
    """Return the layer of a location, of one with fused layers that with the weights."""
    layers = [names[-1] for way in location.decode().split(";;") if (names := _LAYER.findall(way))]
    return next((name for name in layers if name in weighted), layers[0] if layers else "")


def operator_name(tools: Any, file: Any, node: Any) -> str:
    code = file.operatorCodes[node.opcodeIndex]
    if code.customCode:
        return str(code.customCode.decode())
    number = tools.get_builtin_code_from_operator_code(code)
    names = {value: name for name, value in vars(tools.BuiltinOperator).items()}
    return str(names.get(number, number))


def flatbuffer_tools() -> Any:
    return require_package(
        "ai_edge_litert.tools.flatbuffer_utils", target="tflite", package="ai-edge-litert"
    )

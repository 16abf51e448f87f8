"""The int8 version of a ``.tflite`` file: ranges of values, then ai-edge-quantizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from understudy.export.learned_ranges import Bounds, LayerRanges, learned_ranges
from understudy.export.target import ExportSource, require_package
from understudy.export.tflite_file import (
    INPUT_NAME,
    NORMALIZATION,
    SIGNATURE_NAME,
    WEIGHTED,
    flatbuffer_tools,
    operator_name,
)
from understudy.export.tracing import calibration_batches, quiet

MAX_CALIBRATION_IMAGES = 500
_MIN_RANGE = 2.0**-10
_LARGEST = 127
# What comes out of them has the scale of what goes in, here by the places of those inputs. All but
# the first three mirror pictures.
_MOVING = {
    "PAD": slice(1),
    "TRANSPOSE": slice(1),
    "RESHAPE": slice(1),
    "CONCATENATION": slice(None),
    "GATHER_ND": slice(1),
    "SELECT_V2": slice(1, None),
}

Ranges = Mapping[str, Mapping[str, Any]]


def quantize(content: bytes, source: ExportSource, *, target: str, float_ends: bool) -> bytes:
    """Return the int8 file of a float32 one: weights by channel, activations by tensor.

    What a convolution or linear layer reads and gives has the range that quantisation-aware
    training left, and its weights the steps, where there were any; everything else has the range of
    the calibration images and steps of its own.

    Args:
        content: as ``tflite_file.convert`` returns it.
        float_ends: keep float32 images and logits, with a conversion inside the file.

    Raises:
        MissingExtraError: ai-edge-quantizer is not installed.
        InputError: there are no calibration images.
    """
    calibration_NCHW = source.calibration(target)
    with quiet():
        quantizing, calibrating, recipes, ranges = (
            require_package(f"ai_edge_quantizer.{name}", target=target, package="ai-edge-quantizer")
            for name in ("quantizer", "calibrator", "recipe_manager", "utils.qsv_utils")
        )
        quantizer = quantizing.Quantizer(content)
        not_quantized = quantizing.AlgorithmName.NO_QUANTIZE
        names = quantizing.qtyping.TFLOperationName
        quantizer.add_static_config(
            ".*", names.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8
        )
        if float_ends:
            for end in (names.INPUT, names.OUTPUT):
                quantizer.update_quantization_recipe(".*", end, algorithm_key=not_quantized)
        for layer in source.float_layers:
            quantizer.update_quantization_recipe(
                rf"(^|;){re.escape(layer)}[.:;]", names.ALL_SUPPORTED, algorithm_key=not_quantized
            )
        images = (
            {INPUT_NAME: images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()}
            for images_NCHW in calibration_batches(
                calibration_NCHW, max_images=MAX_CALIBRATION_IMAGES, size=1
            )
        )
        # Not ``quantizer.calibrate``: it averages the images' ranges, which clips large logits.
        calibrator = calibrating.Calibrator(
            content,
            num_threads=1,
            mode=calibrating.CalibrationMode.CALIBRATION_PROFILER_BASED,
            qsv_update_func=ranges.min_max_update,
        )
        calibrator.calibrate({SIGNATURE_NAME: list(images)}, recipes.RecipeManager())
        found: Ranges = calibrator.get_model_qsvs()
        if source.quantized is not None:
            found = _with_learned(found, content, learned_ranges(source.quantized))
        return bytes(quantizer.quantize(_widened(found)).quantized_model)


def _with_learned(found: Ranges, content: bytes, learned: Sequence[LayerRanges]) -> Ranges:
    """Return the tensors' ranges, with those learned where the file runs the same layers.

    Weights have a range only if theirs were learned; the quantizer finds those of the others.
    """
    file = _File(content)
    named = [
        (node, file.tensor_name(node.outputs[0]).partition(":")[0])
        for node in file.graph.operators
        if file.operator(node) in WEIGHTED
    ]
    nodes = [node for node, layer in named if layer.rpartition(".")[2] != NORMALIZATION]
    layers = [layer for _, layer in named if layer.rpartition(".")[2] != NORMALIZATION]
    if layers != [row.layer for row in learned]:
        return found  # The converter split or merged layers.
    changed = dict(found)
    for node, row in zip(nodes, learned, strict=True):
        places = [(place, row.inputs) for place in file.moved_from(node.inputs[0])]
        if row.outputs is not None:
            places.append((node.outputs[0], row.outputs))
            places += file.scaled(node.outputs[0], row.outputs)
        for place, bounds in places:
            name = file.tensor_name(place)
            if bounds is not None and name in changed:
                shape = np.shape(changed[name]["min"])
                low, high = (np.full(shape, bound, np.float32) for bound in sorted(bounds))
                changed[name] = {**changed[name], "min": low, "max": high}
        if row.weight_scales is not None:
            changed[file.tensor_name(node.inputs[1])] = _weight_range(file, node, row.weight_scales)
    return changed


def _weight_range(file: _File, node: Any, scales: Tensor) -> dict[str, Any]:
    """Return the range for which the quantizer rounds a layer's weights in steps of ``scales``.

    By a finer grid of its own they would be other weights than those that training ended with.
    """
    shape = [1] * len(file.graph.tensors[node.inputs[1]].shape)
    shape[-1 if file.operator(node) == "DEPTHWISE_CONV_2D" else 0] = len(scales)
    largest = (scales * _LARGEST).reshape(shape).numpy()
    return {"min": -largest, "max": largest}


class _File:
    """The main graph of a file: which operator gives and reads a tensor."""

    def __init__(self, content: bytes) -> None:
        self.tools = flatbuffer_tools()
        self.file = self.tools.read_model_from_bytearray(content)
        self.graph = self.file.subgraphs[0]
        self.producers = {place: node for node in self.graph.operators for place in node.outputs}

    def operator(self, node: Any) -> str:
        return operator_name(self.tools, self.file, node)

    def tensor_name(self, place: int) -> str:
        return str(self.graph.tensors[place].name.decode())

    def moved_from(self, place: int) -> list[int]:
        """Return this tensor and those that it holds the values of, in other places."""
        node = self.producers.get(place)
        moved = [] if node is None else node.inputs[_MOVING.get(self.operator(node), slice(0))]
        return [place, *(origin for other in moved for origin in self.moved_from(other))]

    def scaled(self, place: int, bounds: Bounds) -> list[tuple[int, Bounds]]:
        """Return the products of this tensor and one constant number, with their ranges.

        With a range of their own they would be rounded once more.
        """
        products = []
        for node in self.graph.operators:
            if self.operator(node) == "MUL" and place in node.inputs:
                other = node.inputs[0] if node.inputs[1] == place else node.inputs[1]
                values = self.file.buffers[self.graph.tensors[other].buffer].data
                if values is not None and len(values) == np.float32().nbytes:
                    factor = float(np.frombuffer(bytes(values), np.float32)[0])
                    products.append((node.outputs[0], (bounds[0] * factor, bounds[1] * factor)))
        return products


def _widened(ranges: Ranges) -> dict[str, Any]:
    """Return the tensors' ranges, those of (nearly) nothing as wide as ``_MIN_RANGE``.

    Behind channels that are 0 for every calibration image the scale would be so small that the next
    bias, in units of input scale times weight scale, leaves int32: LiteRT cannot load such a file,
    and TensorFlow Lite Micro computes nonsense from it.
    """
    widened = {}
    for name, found in ranges.items():
        changed = dict(found)
        if {"min", "max"} <= changed.keys():
            changed["max"] = np.maximum(changed["max"], changed["min"] + _MIN_RANGE)
        widened[name] = changed
    return widened

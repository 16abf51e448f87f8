"""int8 for ExecuTorch: XNNPACK's scheme, with the ranges and steps that training learned."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from understudy.export.learned_ranges import FUSED, WEIGHTED, Bounds, LayerRanges, learned_ranges
from understudy.export.target import ExportSource, require_package
from understudy.export.tracing import calibration_batches, inside, module_name

MAX_CALIBRATION_IMAGES = 500
CALIBRATION_BATCH_SIZE = 50
_SMALLEST, _LARGEST = -128, 127
_ATEN = torch.ops.aten
# They move values: the numbers in and out have the same scale.
_MOVING = (
    _ATEN.cat.default,
    _ATEN.flatten.using_ints,
    _ATEN.view.default,
    _ATEN.slice.Tensor,
    _ATEN.constant_pad_nd.default,
    _ATEN.pad.default,
    _ATEN.permute.default,
)


def quantize(graph: GraphModule, source: ExportSource) -> GraphModule:
    """Return a traced network with int8 weights and quantise and dequantise nodes.

    Activations by tensor, weights symmetric by channel. What a convolution or linear layer reads
    and gives has the range that quantisation-aware training left, and its weights the steps, where
    there were any; everything else has the range of the calibration images and steps of its own.

    Raises:
        MissingExtraError: executorch or torchao is not installed.
        InputError: there are no calibration images.
    """
    calibration_NCHW = source.calibration("executorch")
    quantizing = require_package(
        "executorch.backends.xnnpack.quantizer.xnnpack_quantizer",
        target="executorch",
        package="executorch",
    )
    pt2e = require_package("torchao.quantization.pt2e.quantize_pt2e", target="executorch")
    quantizer = quantizing.XNNPACKQuantizer()
    # Preparing folds batch norm; looking for it after that takes longer than all the rest.
    quantizer.SUPPORTED_PATTERNS = [
        pattern for pattern in quantizer.SUPPORTED_PATTERNS if not pattern.is_qat
    ]
    quantizer.set_global(quantizing.get_symmetric_quantization_config(is_per_channel=True))
    # Its ``set_module_name`` refuses None, which would have meant "leave it in float32".
    quantizer.set_filter_function(lambda node: not inside(module_name(node), source.float_layers))
    prepared = pt2e.prepare_pt2e(graph, quantizer)
    _part_means(prepared)
    with torch.no_grad():
        for images_NCHW in calibration_batches(
            calibration_NCHW, max_images=MAX_CALIBRATION_IMAGES, size=CALIBRATION_BATCH_SIZE
        ):
            prepared(images_NCHW)
    if source.quantized is not None:
        _use_learned(prepared, learned_ranges(source.quantized))
    quantized: GraphModule = pt2e.convert_pt2e(prepared)
    return quantized


def _part_means(prepared: GraphModule) -> None:
    """Give what comes out of a global mean a range of its own.

    XNNPACK's quantizer gives it that of what goes in, which is many times as wide.
    """
    for node in prepared.graph.find_nodes(op="call_function", target=_ATEN.mean.dim):
        for user in node.users:
            if user.op == "call_module":
                own = copy.deepcopy(prepared.get_submodule(str(user.target)))
                _put(prepared, user, own)


def _put(prepared: GraphModule, place: Node, observer: nn.Module) -> None:
    """Put an observer in the place of another, and of those behind it that see the same values."""
    setattr(prepared, str(place.target), observer)
    for user in place.users:
        if user.target in _MOVING:
            for following in user.users:
                if following.op == "call_module":
                    _put(prepared, following, observer)


def _use_learned(prepared: GraphModule, learned: Sequence[LayerRanges]) -> None:
    """Put learned ranges in the place of observed ones where the graph runs the same layers."""
    nodes = [node for node in prepared.graph.nodes if node.target in WEIGHTED]
    if [module_name(node) for node in nodes] != [row.layer for row in learned]:
        return
    for node, row in zip(nodes, learned, strict=True):
        _fix_range(prepared, node.args[0], row.inputs)
        _fix_weights(prepared, node.args[1], row.weight_scales)
        end = node
        while len(end.users) == 1 and next(iter(end.users)).target in FUSED:
            end = next(iter(end.users))
        for user in end.users:
            _fix_range(prepared, user, row.outputs)


def _fix_weights(prepared: GraphModule, place: Node, scales: Tensor | None) -> None:
    """Round weights as training did, whose integers are no larger than these.

    By a finer grid of their own they would be other weights than those that training ended with.
    """
    if scales is None or place.op != "call_module":
        return
    observer: Any = prepared.get_submodule(str(place.target))
    observer.min_val, observer.max_val = -scales * _LARGEST, scales * _LARGEST


def _fix_range(prepared: GraphModule, place: Node, bounds: Bounds | None) -> None:
    """Give an observer a range that stands, and those whose values it only moves as well."""
    if bounds is None or place.op != "call_module":
        return
    observers = require_package("torchao.quantization.pt2e.observer", target="executorch")
    low, high = bounds
    scale = (high - low) / (_LARGEST - _SMALLEST)
    fixed = observers.FixedQParamsObserver(
        scale,
        _SMALLEST - round(low / scale),
        dtype=torch.int8,
        quant_min=_SMALLEST,
        quant_max=_LARGEST,
    )
    setattr(prepared, str(place.target), fixed)
    observed: Any = place.args[0]
    if observed.target in _MOVING:
        for source in observed.all_input_nodes:
            _fix_range(prepared, source, bounds)

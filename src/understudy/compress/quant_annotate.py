"""Which tensors of a captured network become int8 in quantisation-aware training.

The rules are those of ONNX Runtime, which fuses an operator into its int8 kernel when all its
inputs are dequantised and its output is quantised again. torchao's own quantizer for x86 leaves the
convolution before a residual addition without a quantised output (its backend adds in float), and
ONNX Runtime would run that convolution in float32.

Importing this module imports torchao.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from understudy.compress.quant_affine import (
    ACTIVATION_MAX,
    ACTIVATION_MIN,
    DEPTHWISE_WEIGHT_MAX,
    WEIGHT_MAX,
    activation_scale,
    fake_quantize_activation,
    fake_quantize_weight,
    largest_weight,
    value_range,
    weight_scales,
)
from understudy.compress.quant_fold import (
    CONVOLUTIONS,
    folded_norm,
    prepare_norms,
)

aten = torch.ops.aten
DROPOUT = aten.dropout.default
WEIGHTED = (*CONVOLUTIONS, aten.linear.default)
# Done within the kernel of the operator before them.
_ACTIVATIONS = (
    aten.relu.default,
    aten.relu_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.relu6.default,
)
_WITH_INT8_KERNEL = (
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.mul.Tensor,
    aten.cat.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.sigmoid.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
)
# They move values or take the largest: the numbers in and out have the same scale.
_MOVING = (
    aten.max_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.permute.default,
    aten.transpose.int,
)
# What they make of values beyond these bounds is what they make of the bound.
_FLAT_BEYOND: dict[Any, tuple[float, float]] = {
    aten.hardswish.default: (-3.0, math.inf),
    aten.hardswish_.default: (-3.0, math.inf),
    aten.hardsigmoid.default: (-3.0, 3.0),
    aten.hardsigmoid_.default: (-3.0, 3.0),
}
_GROUPS = 6  # position of ``groups`` among the arguments of aten's convolutions
_ANNOTATION = "quantization_annotation"  # torchao's key
# Share of a new batch in the range of activations; torchao's and Jacob et al.'s order of size.
_AVERAGING = 0.01


class WeightFakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """Rounds weights to int8, a scale for each channel of axis 0, as they are in this step.

    There is no state: torchao's own observers keep a moving average of the range, which lags behind
    weights that change and is not what an averaged copy of the weights needs.
    """

    dtype, qscheme, ch_axis, is_dynamic = torch.int8, torch.per_channel_symmetric, 0, False

    def __init__(self, *, quant_max: int, **_: Any) -> None:
        super().__init__()
        self.quant_min, self.quant_max = -quant_max, quant_max
        self.scales = torch.ones(1)

    def forward(self, weight: Tensor) -> Tensor:
        self.scales = weight_scales(weight, largest=self.quant_max)
        return fake_quantize_weight(weight, self.scales, largest=self.quant_max)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scales and zero points of the last call's weights."""
        return self.scales, torch.zeros_like(self.scales, dtype=torch.int32)


class ActivationFakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """Rounds activations to uint8 in a range that follows them while ``observing`` is set.

    Args:
        bounds: values that the range does not go beyond.
    """

    dtype, qscheme, is_dynamic = torch.uint8, torch.per_tensor_affine, False
    quant_min, quant_max = ACTIVATION_MIN, ACTIVATION_MAX
    minimum: Tensor
    maximum: Tensor

    def __init__(self, *, bounds: tuple[float, float] = (-math.inf, math.inf), **_: Any) -> None:
        super().__init__()
        self.bounds = bounds
        self.observing = True
        self.register_buffer("minimum", torch.zeros(()))
        self.register_buffer("maximum", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        if self.observing:
            self.observe(values.detach())
        scale, zero_point = self.calculate_qparams()
        return fake_quantize_activation(values, scale, zero_point)

    @torch.no_grad()
    def observe(self, values: Tensor) -> None:
        """Move the range towards that of these values; the first ones set it."""
        low, high = (
            extreme.to(self.minimum.dtype).clamp(*self.bounds) for extreme in value_range(values)
        )
        is_first = (self.minimum == 0) & (self.maximum == 0)
        weight = torch.where(is_first, 1.0, _AVERAGING)
        self.minimum.lerp_(low, weight)
        self.maximum.lerp_(high, weight)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point."""
        return activation_scale(self.minimum, self.maximum)


def _weight_spec(largest: int) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=WeightFakeQuantize,
        quant_min=-largest,
        quant_max=largest,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def _activation_spec(bounds: tuple[float, float]) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=ActivationFakeQuantize.with_args(bounds=bounds),
        quant_min=ACTIVATION_MIN,
        quant_max=ACTIVATION_MAX,
        qscheme=torch.per_tensor_affine,
    )


_WEIGHT_SPECS = {largest: _weight_spec(largest) for largest in (WEIGHT_MAX, DEPTHWISE_WEIGHT_MAX)}
_UINT8 = _activation_spec((-math.inf, math.inf))
_BOUNDED = {bounds: _activation_spec(bounds) for bounds in set(_FLAT_BEYOND.values())}


class OnnxRuntimeQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates a captured graph for torchao's ``prepare_qat_pt2e``.

    The arithmetic before the first weighted layer (the normalisation) and after the last one stays
    in float32: one rounding of the normalised picture, none of the logits.

    Args:
        float_layers: names of modules that stay in float32 with all that is in them.
    """

    def __init__(self, float_layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.float_layers = frozenset(float_layers)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Fold batch norms into the convolutions that will be quantised."""
        nodes = model.graph.nodes
        prepare_norms(model, [node for node in nodes if is_inside(node, self.float_layers)])
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Put torchao's annotations on the nodes."""
        weighted = {
            node
            for node in model.graph.nodes
            if node.target in WEIGHTED and not is_inside(node, self.float_layers)
        }
        leading = _ancestors(weighted)
        quantized: set[Node] = set()
        for node in model.graph.nodes:
            if node in weighted:
                _annotate_input(node, node.args[0])
                annotation_of(node).input_qspec_map[node.args[1]] = _weights_of(node)
                if node.target in CONVOLUTIONS or node in leading:
                    quantized.add(_annotate_output(node))
            elif is_inside(node, self.float_layers) or node not in leading:
                continue
            elif node.target in _WITH_INT8_KERNEL:
                sources = _float_inputs(node)
                if any(past_dropout(source) in quantized for source in sources):
                    for source in sources:
                        _annotate_input(node, source)
                    quantized.add(_annotate_output(node))
            elif node.target in _MOVING and past_dropout(node.args[0]) in quantized:
                source = node.args[0]
                if source.target is not DROPOUT:
                    annotation_of(node).input_qspec_map[source] = _UINT8
                    annotation_of(node).output_qspec = SharedQuantizationSpec((source, node))
                    quantized.add(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Accept every annotation: they are all from ``annotate``."""


def annotation_of(node: Node) -> Any:
    """Return torchao's annotation of a node, a new one if there is none."""
    return node.meta.setdefault(_ANNOTATION, QuantizationAnnotation(_annotated=True))


def is_inside(node: Node, modules: Iterable[str]) -> bool:
    """Return whether a node was traced within one of the modules of these names."""
    stack = node.meta.get("nn_module_stack") or {}
    names = {name for name, _ in stack.values()}
    return not names.isdisjoint(modules)


def past_dropout(node: Node) -> Node:
    """Return the node whose values come out of dropout once training is over."""
    while node.target is DROPOUT:
        node = node.args[0]  # type: ignore[assignment]
    return node


def chain_end(node: Node) -> Node:
    """Return the last of the nodes that run in this node's kernel: its norm and activation."""
    # A batch norm that was not folded is an operator of its own.
    for following in ((folded_norm,), _ACTIVATIONS):
        users = list(node.users)
        if len(users) == 1 and users[0].target in following:
            node = users[0]
    return node


def _annotate_input(node: Node, source: Node) -> None:
    # Dropout is not there when the network runs: what is rounded is what goes into it.
    if source.target is DROPOUT:
        if node.target in WEIGHTED:
            annotation_of(node).input_qspec_map[source] = None  # torchao counts the entries
        inner: Any = source.args[0]
        _annotate_input(source, inner)
    else:
        annotation_of(node).input_qspec_map[source] = _UINT8


def _weights_of(node: Node) -> QuantizationSpec:
    num_groups = node.args[_GROUPS] if len(node.args) > _GROUPS else 1
    shape = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    return _WEIGHT_SPECS[largest_weight(shape, num_groups)]  # type: ignore[arg-type]


def _annotate_output(node: Node) -> Node:
    end = chain_end(node)
    annotation_of(node)
    # No step of the integers is spent on values that what reads them does not tell apart.
    bounds = {_FLAT_BEYOND.get(user.target) for user in end.users}
    (only,) = bounds if len(bounds) == 1 else (None,)
    annotation_of(end).output_qspec = _UINT8 if only is None else _BOUNDED[only]
    return end


def _float_inputs(node: Node) -> list[Node]:
    """Return the inputs that are computed float tensors, not constants or numbers."""
    return [
        source
        for source in node.all_input_nodes
        if source.op == "call_function"
        and isinstance(source.meta.get("val"), Tensor)
        and source.meta["val"].is_floating_point()
    ]


def _ancestors(nodes: Iterable[Node]) -> set[Node]:
    """Return all nodes whose values go into these nodes."""
    found: set[Node] = set()
    waiting = [source for node in nodes for source in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found

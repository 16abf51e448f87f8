"""Which layers lose most in int8, and which few of them must stay in float32.

Each layer is quantised alone, in PyTorch: its weight with a scale for each output channel, and what
goes into it with one range (``quant_affine``). The rest of the network stays in float32, so a loss
belongs to its layer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from understudy.compress.quant_affine import (
    activation_scale,
    fake_quantize_activation,
    fake_quantize_weight,
    largest_weight,
    weight_scales,
)
from understudy.errors import InputError, ModelError, problem

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)
BATCH_SIZE = 100


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantising one layer alone does to the answers of the network.

    Attributes:
        name: of the module.
        num_weights: elements of its weight.
        kl: mean Kullback-Leibler divergence of the float network's class probabilities from those
            with this layer in int8, in nats; 0 is no loss.
        top1_agreement: share of images with the float network's predicted class.
        accuracy_change: accuracy with this layer in int8 minus that of the float network; None
            without labels.
    """

    name: str
    num_weights: int
    kl: float
    top1_agreement: float
    accuracy_change: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the record as a plain dict."""
        return asdict(self)


def sensitivity(
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor | None = None,
    *,
    calibration_NCHW: Tensor,
) -> tuple[LayerSensitivity, ...]:
    """Return the layers that have weights, the most sensitive first.

    Takes a forward pass over ``images_NCHW`` for each layer. The model is not changed.

    Args:
        model: takes these images (uint8, or float in [0, 1]) and returns logits NK.
        images_NCHW: to compare on, of the validation split.
        labels_N: their classes, int64, for the change in accuracy.
        calibration_NCHW: images that set the ranges of the activations, in the same dtype.

    Raises:
        InputError: no images, labels that do not fit them, or a model without weighted layers.
    """
    network = copy.deepcopy(model).cpu().float().eval()
    layers: dict[str, nn.Module] = {
        name: layer for name, layer in network.named_modules() if isinstance(layer, _KINDS)
    }
    _check_request(layers, images_NCHW, labels_N, calibration_NCHW)
    with torch.no_grad():
        ranges = _input_ranges(network, layers, calibration_NCHW)
        float_NK = _logits(network, images_NCHW)
        records = []
        for name, layer in layers.items():
            if name not in ranges:
                continue  # not used in the forward pass
            with quantized(layer, *ranges[name]):
                int8_NK = _logits(network, images_NCHW)
            records.append(_compare(name, layer, float_NK, int8_NK, labels_N))
    return tuple(sorted(records, key=lambda record: (-record.kl, record.name)))


def choose_float_layers(
    ranked: Sequence[LayerSensitivity],
    passes: Callable[[tuple[str, ...]], bool],
    *,
    max_float_layers: int | None = None,
) -> tuple[str, ...]:
    """Return the fewest of the worst layers that must stay in float32 for the gate to pass.

    The gate is asked with none, then the worst one, the worst two and so on, as a further layer in
    float32 is no guarantee of a better network.

    Args:
        ranked: what ``sensitivity`` returns.
        passes: whether the network with these layers in float32 and the rest in int8 is good
            enough; quantises and evaluates it.
        max_float_layers: most layers to try; None: all but one.

    Raises:
        ModelError: the gate passes with none of these choices.
    """
    limit = len(ranked) - 1 if max_float_layers is None else min(max_float_layers, len(ranked) - 1)
    names = tuple(record.name for record in ranked)
    for num_layers in range(max(limit, 0) + 1):
        if passes(names[:num_layers]):
            return names[:num_layers]
    raise ModelError(
        problem(
            f"int8 loses more than the gate allows, also with {limit} of {len(ranked)} layers in "
            f"float32 ({', '.join(names[:limit])})",
            expected="a network that passes with a few float layers",
            mend="Use quantisation-aware training, a wider gate, or more float layers.",
        )
    )


@contextlib.contextmanager
def quantized(layer: nn.Module, minimum: Tensor, maximum: Tensor) -> Iterator[None]:
    """Compute with the layer's weight in int8 and its input in uint8, within a with-block.

    Args:
        layer: with a ``weight`` whose axis 0 is the output channel.
        minimum: of the layer's input; ``maximum`` likewise.
    """
    weight: Any = layer.weight
    original = weight.data
    scale, zero_point = activation_scale(minimum, maximum)

    def round_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fake_quantize_activation(inputs[0], scale, zero_point), *inputs[1:])

    hook = layer.register_forward_pre_hook(round_input)
    largest = largest_weight(original.shape, getattr(layer, "groups", 1))
    weight.data = fake_quantize_weight(
        original, weight_scales(original, largest=largest), largest=largest
    )
    try:
        yield
    finally:
        weight.data = original
        hook.remove()


def _input_ranges(
    network: nn.Module, layers: dict[str, nn.Module], images_NCHW: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each layer's smallest and largest input on these images."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, layer in layers.items():

        def watch(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            low, high = torch.aminmax(inputs[0])
            if name in ranges:
                low = torch.minimum(low, ranges[name][0])
                high = torch.maximum(high, ranges[name][1])
            ranges[name] = low, high

        hooks.append(layer.register_forward_pre_hook(watch))
    try:
        _logits(network, images_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


def _logits(network: nn.Module, images_NCHW: Tensor) -> Tensor:
    return torch.cat([network(some) for some in torch.split(images_NCHW.cpu(), BATCH_SIZE)])


def _compare(
    name: str, layer: nn.Module, float_NK: Tensor, int8_NK: Tensor, labels_N: Tensor | None
) -> LayerSensitivity:
    float_log_NK, int8_log_NK = (
        logits_NK.double().log_softmax(dim=1) for logits_NK in (float_NK, int8_NK)
    )
    kl = (float_log_NK.exp() * (float_log_NK - int8_log_NK)).sum(dim=1).mean()
    float_N, int8_N = float_NK.argmax(dim=1), int8_NK.argmax(dim=1)
    change = None
    if labels_N is not None:
        num_right = (int8_N == labels_N).sum() - (float_N == labels_N).sum()
        change = num_right.item() / len(labels_N)
    weight: Any = layer.weight
    return LayerSensitivity(
        name=name,
        num_weights=weight.numel(),
        kl=max(0.0, kl.item()),  # rounding can leave -1e-17
        top1_agreement=(float_N == int8_N).double().mean().item(),
        accuracy_change=change,
    )


def _check_request(
    layers: dict[str, nn.Module],
    images_NCHW: Tensor,
    labels_N: Tensor | None,
    calibration_NCHW: Tensor,
) -> None:
    problems = [
        problem(
            f"the sensitivity of layers was asked for with {what} images of {tuple(images.shape)}",
            expected="at least one image [n, C, H, W]",
            mend=f"Set the fraction of the {what} split above 0.",
        )
        for what, images in (("validation", images_NCHW), ("calibration", calibration_NCHW))
        if images.ndim != 4 or len(images) == 0
    ]
    if labels_N is not None and len(labels_N) != len(images_NCHW):
        problems.append(
            problem(
                f"there are {len(labels_N)} labels for {len(images_NCHW)} images",
                expected="one for each image",
                mend="Give labels of the same split, or none.",
            )
        )
    if not layers:
        problems.append(
            problem(
                "the model has no convolution or linear layer",
                expected="layers with weights",
                mend="Quantise another model.",
            )
        )
    if problems:
        raise InputError(*problems)

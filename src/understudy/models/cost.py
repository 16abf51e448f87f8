"""What a network costs: parameters, multiply-accumulates, weight and activation bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from understudy.models.onnx_cost import onnx_cost
from understudy.models.onnx_model import OnnxModel

ImageShape = tuple[int, int, int]

# Normalisations that runtimes do in place, or fold into the convolution before them.
_IN_PLACE_OPERATIONS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "dropout")


@dataclass(frozen=True)
class ModelCost:
    """Cost of one picture through a network.

    Attributes:
        num_params: trainable and frozen parameters; a shared one counts once.
        macs: multiply-accumulates of convolutions and matrix products; biases, norms and
            activations do not count. None only for a black box that hides its shapes.
        weight_bytes: parameters and floating-point statistics (batch norm), in their data types.
        peak_activation_bytes: see ``peak_activation_bytes``; None as for ``macs``.
    """

    num_params: int
    macs: int | None
    weight_bytes: int
    peak_activation_bytes: int | None


def model_cost(model: nn.Module, image_shape: ImageShape) -> ModelCost:
    """Return the cost of one picture (batch 1, evaluation mode).

    Args:
        model: a network or a ``NormalizedModel``; an ``OnnxModel`` inside it is counted from its
            graph.
        image_shape: (C, H, W).
    """
    black_box = next((part for part in model.modules() if isinstance(part, OnnxModel)), None)
    if black_box is not None:
        return ModelCost(*onnx_cost(black_box.path))
    return ModelCost(
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        macs=count_macs(model, image_shape),
        weight_bytes=weight_bytes(model),
        peak_activation_bytes=peak_activation_bytes(model, image_shape),
    )


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and saved floating-point buffers, shared ones once."""
    tensors = {
        (tensor.data_ptr(), tensor.shape): tensor
        for tensor in model.state_dict().values()
        if tensor.is_floating_point()
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def count_macs(model: nn.Module, image_shape: ImageShape) -> int:
    """Return the multiply-accumulates of one picture, counted in a real forward pass.

    PyTorch's counter sees every convolution and matrix product, also those in functions and
    attention, and counts two operations for each multiply-accumulate.
    """
    counter = FlopCounterMode(display=False)
    with _evaluation(model), counter:
        model(_blank(model, image_shape))
    return int(counter.get_total_flops()) // 2


def peak_activation_bytes(model: nn.Module, image_shape: ImageShape) -> int:
    """Return the least memory that activations of one picture need, operations run in order.

    The operations of a real forward pass are recorded; at each, the live tensors are its inputs,
    its outputs, and every earlier result that a later operation still reads (a residual, say); the
    largest sum of their bytes is returned. The picture and the logits count, weights and scratch
    space inside an operation do not. Views share memory, and an elementwise operation or a batch
    norm overwrites its input where nothing later reads that, as inference runtimes do.
    """
    trace = _Trace({_storage_id(tensor) for tensor in _all_tensors(model)})
    with _evaluation(model):
        image = _blank(model, image_shape)
        trace.read(image)
        with trace:
            output = model(image)
    trace.steps.append(({_storage_id(t) for t in _tensors(output)}, set(), False))
    return _peak(trace.steps, trace.num_bytes, start=_storage_id(image))


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which memory each operation reads and makes.

    Tensors are kept until the end, so that an address stands for one tensor throughout.
    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.num_bytes: dict[int, int] = {}
        self.kept: list[Tensor] = []
        self.steps: list[tuple[set[int], set[int], bool]] = []

    def read(self, value: Any) -> set[int]:
        found = set()
        for tensor in _tensors(value):
            key = _storage_id(tensor)
            if key not in self.weights and tensor.untyped_storage().nbytes() > 0:
                self.num_bytes[key] = tensor.untyped_storage().nbytes()
                self.kept.append(tensor)
                found.add(key)
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inputs = self.read((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        outputs = self.read(result) - inputs
        name = func.overloadpacket.__name__
        overwrites = torch.Tag.pointwise in func.tags or name in _IN_PLACE_OPERATIONS
        self.steps.append((inputs, outputs, overwrites))
        return result


def _peak(
    steps: list[tuple[set[int], set[int], bool]], num_bytes: dict[int, int], *, start: int
) -> int:
    last_read = {key: index for index, (inputs, _, _) in enumerate(steps) for key in inputs}
    live = {start}
    peak = 0
    for index, (inputs, outputs, overwrites) in enumerate(steps):
        dying = {key for key in inputs & live if last_read[key] <= index}
        made = sum(num_bytes[key] for key in outputs)
        reused = max((num_bytes[key] for key in dying), default=0) if overwrites else 0
        peak = max(peak, sum(num_bytes[key] for key in live) + max(0, made - reused))
        live = (live - dying) | {key for key in outputs if last_read.get(key, -1) > index}
    return peak


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training flags are as they were afterwards.

    Attention is computed step by step, as its fused kernels hide their products.
    """
    training = {module: module.training for module in model.modules()}
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
        for module, flag in training.items():
            module.training = flag


def _blank(model: nn.Module, image_shape: ImageShape) -> Tensor:
    like = next(model.parameters(), torch.empty(0))
    return torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype)


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage_id(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

"""A network without some of its channels, and the proof that it still computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

# Of the largest output: float32 rounding is a tenth of it at most, a lost channel far more.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Cut:
    """One side of one layer, which channels are removed from.

    Attributes:
        path: of the module, or of a parameter that belongs to no layer.
        remove: Torch-Pruning's function for the layer and the side.
        dim: the dimension of a norm's or a bare parameter's tensor that holds the channels.
        is_input: whether the layer reads these channels, and mixes them.
        is_parameter: whether ``path`` is a parameter.
    """

    path: str
    remove: Callable[[Any, list[int]], Any]
    dim: int
    is_input: bool
    is_parameter: bool


Cuts = dict[Cut, set[int]]


def without_channels(model: nn.Module, cuts: Cuts) -> nn.Module:
    """Return a copy of the model without these channels; gradients are not copied."""
    pruned = copy.deepcopy(model)
    pruned.zero_grad(set_to_none=True)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for cut, indices in cuts.items():
            cut.remove.__self__.pruning_dim = cut.dim  # type: ignore[attr-defined]
            if not cut.is_parameter:
                cut.remove(pruned.get_submodule(cut.path), sorted(indices))
                continue
            owner, _, name = cut.path.rpartition(".")
            parameter = cut.remove(pruned.get_parameter(cut.path), sorted(indices))
            setattr(pruned.get_submodule(owner), name, parameter)
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(trainable[name])
    return pruned


class ExactnessTrial:
    """Compares a network without channels to one in which nothing reads them.

    The weights are random: in trained ones a channel may be dead and its loss go unnoticed.
    """

    def __init__(self, model: nn.Module, example_NCHW: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.network = copy.deepcopy(model).float().eval()
        self.images_NCHW = torch.rand(example_NCHW.shape, generator=generator).to(
            example_NCHW.device
        )
        with torch.no_grad():
            for parameter in self.network.parameters():
                _fill(parameter, generator)
            for module in self.network.modules():
                if isinstance(module, _NormBase) and module.running_mean is not None:
                    _fill(module.running_mean, generator)
                    _fill(module.running_var, generator)

    def difference(self, cuts: Cuts) -> str | None:
        """Return what goes wrong without these channels, or None."""
        try:
            with torch.no_grad():
                masked = self._masked(cuts)
                output = without_channels(self.network, cuts)(self.images_NCHW)
        except Exception as error:  # whatever the network's own code does with other shapes
            return f"without some of its channels the network fails: {_first_line(error)}"
        pairs = list(zip(_tensors(output), _tensors(masked), strict=True))
        if any(left.shape != right.shape for left, right in pairs):
            return "its channels are the network's outputs"
        if all(_agree(left, right) for left, right in pairs):
            return None
        return "without some of its channels the network computes something else"

    def _masked(self, cuts: Cuts) -> object:
        """Return the output where every layer that reads one of the channels reads zero."""
        hooks = []
        for cut, indices in cuts.items():
            if cut.is_input:
                layer = self.network.get_submodule(cut.path)
                channel_dim = -1 if isinstance(layer, nn.Linear) else 1
                hooks.append(layer.register_forward_pre_hook(_zero(sorted(indices), channel_dim)))
        try:
            output: object = self.network(self.images_NCHW)
        finally:
            for hook in hooks:
                hook.remove()
        return output


def _tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _agree(output: Tensor, masked: Tensor) -> bool:
    return bool((output - masked).abs().max() <= _TOLERANCE * masked.abs().max())


def _zero(indices: list[int], dim: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index = torch.tensor(indices, device=inputs[0].device)
        return (inputs[0].index_fill(dim, index, 0), *inputs[1:])

    return hook


def _fill(tensor: Tensor | None, generator: torch.Generator) -> None:
    """Fill weights so that signals keep their size, and norms and biases with 0.5 to 1.5."""
    if tensor is None or not tensor.is_floating_point():
        return
    values = torch.empty(tensor.shape)
    if tensor.dim() >= 2 and tensor.numel():
        fan_in = tensor.numel() / tensor.shape[0]
        values.normal_(0, fan_in**-0.5, generator=generator)
    else:
        values.uniform_(0.5, 1.5, generator=generator)
    tensor.copy_(values)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

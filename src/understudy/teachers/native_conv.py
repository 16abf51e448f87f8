"""A network for inference on CPUs whose 3x3 convolutions run in the native kernels.

Their weights are transformed once, and a sum and a ReLU that follow a convolution are taken along
in its pass over memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from understudy.models.fast_conv import kernel_points
from understudy.models.native import address, kernels
from understudy.teachers.folding import folded

_LANES = 16
_TILE_SIDE = 4
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_CHANGES_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")


class FrozenConv3x3(nn.Module):
    """A trained ``nn.Conv2d`` with kernel 3, stride 1 and padding 1, without gradients.

    Pictures whose sides are no multiples of 4, or not float32, are left to PyTorch.
    """

    weight: Tensor
    bias: Tensor | None
    points: Tensor

    def __init__(self, trained: nn.Conv2d) -> None:
        super().__init__()
        weight = trained.weight.detach()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if trained.bias is None else trained.bias.detach())
        self.register_buffer("points", kernel_points(weight).contiguous())

    def forward(
        self, features: Tensor, added: Any = None, rectify: bool = False, reuse: bool = False
    ) -> Tensor:
        """Return conv(features) + added, its ReLU where ``rectify``.

        With ``reuse`` the result may be written over ``added``, which must not be ``features``.
        """
        if not _suits_kernel(features):
            output = F.conv2d(features, self.weight, self.bias, padding=1)
        else:
            shape = (len(features), len(self.weight), *features.shape[2:])
            if added is None or _is_float32(added, shape):
                return self._convolved(features, added, rectify, reuse)
            output = self._convolved(features, None, False, False)
        if added is not None:
            output = output + added
        return F.relu(output) if rectify else output

    def _convolved(
        self, features: Tensor, added: Tensor | None, rectify: bool, reuse: bool
    ) -> Tensor:
        library = kernels()
        assert library is not None
        features = features.contiguous(memory_format=torch.channels_last)
        if added is not None:
            added = added.contiguous(memory_format=torch.channels_last)
        num_images, num_inputs, height, width = features.shape
        num_outputs = len(self.weight)
        if reuse and added is not None:
            output = added
        else:
            shape = (num_images, num_outputs, height, width)
            output = torch.empty(shape, memory_format=torch.channels_last)
        operands = (features, self.points, self.bias, added, output)
        sizes = (num_images, height, width, num_inputs, num_outputs)
        flags = (rectify, torch.get_num_threads())
        if library.convolve_added(*map(address, operands), *sizes, *flags):
            raise MemoryError("no memory for the convolution's scratch space")
        return output


def has_native_convolutions(module: nn.Module) -> bool:
    """Return whether `with_native_convolutions` would replace anything on this machine."""
    return kernels() is not None and any(map(_replaceable, module.modules()))


def with_native_convolutions(module: nn.Module) -> nn.Module:
    """Return a copy with batch norm folded and its 3x3 convolutions replaced where possible.

    The rest is laid out channels-last. The module must be in evaluation mode and on the CPU, and
    the copy is only for use without gradients.
    """
    copied = folded(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if _replaceable(child):
                setattr(parent, name, FrozenConv3x3(child))
    for part in copied.modules():
        if isinstance(part, fx.GraphModule):
            _fuse(part)
    return copied  # type: ignore[no-any-return]


def _replaceable(module: nn.Module) -> bool:
    # Not subclasses: they may compute something else.
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.stride == module.dilation == module.padding == (1, 1)
        and module.padding_mode == "zeros"
        and module.groups == 1
        and module.in_channels % _LANES == module.out_channels % _LANES == 0
        and module.weight.dtype == torch.float32
    )


def _suits_kernel(features: Tensor) -> bool:
    return (
        features.dtype == torch.float32
        and features.dim() == 4
        and features.numel() > 0
        and features.shape[2] % _TILE_SIDE == features.shape[3] % _TILE_SIDE == 0
    )


def _is_float32(added: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(added, Tensor) and added.dtype == torch.float32 and added.shape == shape


def _fuse(traced: fx.GraphModule) -> None:
    layers = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(layers[node.target], FrozenConv3x3):
            continue
        total = _only_user(node)
        if total is not None and _is_sum(total, node) and not _changed_before(total, node, layers):
            [added] = [operand for operand in total.args if operand is not node]
            node = _replaced(traced.graph, (node, total), added=added, rectify=False)
        user = _only_user(node)
        if user is not None and _is_relu(user, layers):
            _replaced(traced.graph, (node, user), added=(*node.args, None)[1], rectify=True)
    _reuse_sums(traced, layers)
    for node in traced.graph.nodes:
        user = _only_user(node)
        is_conv = node.op == "call_module" and type(layers[str(node.target)]) is nn.Conv2d
        if is_conv and user is not None and user.target is F.relu:
            user.kwargs = {"inplace": True}
    traced.graph.lint()
    traced.recompile()


def _reuse_sums(traced: fx.GraphModule, layers: dict[str, nn.Module]) -> None:
    """Write a sum over its second operand where that is another one's output, not read again."""
    calls = [
        node
        for node in traced.graph.nodes
        if node.op == "call_module" and isinstance(layers[node.target], FrozenConv3x3)
    ]
    for node in calls:
        features, added, rectify = (*node.args, None, False)[:3]
        if added not in calls or added is features:
            continue
        # Other readers might keep a view of it.
        if all(user in calls and not user > node for user in added.users):
            node.args = (features, added, rectify, True)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replaced(
    graph: fx.Graph, both: tuple[fx.Node, fx.Node], *, added: Any, rectify: bool
) -> fx.Node:
    """Return one call in the place of a convolution's and its only user's."""
    convolution, user = both
    with graph.inserting_before(user):
        arguments = (convolution.args[0], added, rectify)
        call = graph.call_module(str(convolution.target), arguments)
    user.replace_all_uses_with(call)
    graph.erase_node(user)
    graph.erase_node(convolution)
    return call


def _is_relu(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(layers[str(node.target)]) is nn.ReLU
    return node.target in _RELUS


def _is_sum(node: fx.Node, convolution: fx.Node) -> bool:
    operands = node.args
    in_place = node.target in (operator.iadd, "add_")
    return (
        node.op in ("call_function", "call_method")
        and node.target in _SUMS
        and len(operands) == 2
        and not node.kwargs
        and all(isinstance(operand, fx.Node) for operand in operands)
        and operands[0] is not operands[1]
        # Otherwise another tensor, which more than one may read, is changed.
        and (operands[0] is convolution or not in_place)
    )


def _changed_before(total: fx.Node, node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Return whether something between the two may change the convolution's input."""
    between = node.next
    while between is not total:
        target: str | Callable[..., Any] = between.target
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if between.op == "call_module" and getattr(layers[str(target)], "inplace", False):
            return True
        if between.op == "call_module":
            name = ""
        if name.endswith("_") or name in _CHANGES_IN_PLACE or between.kwargs.get("inplace"):
            return True
        between = between.next
    return False

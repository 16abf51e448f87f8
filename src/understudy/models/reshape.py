"""The channel counts of a network as plain numbers, and a network brought to recorded counts.

A pruned network is stored as its weights (safetensors) and these counts (JSON): the network is
built by its name as before, brought to the counts, and takes the weights with
``load_state_dict(strict=True)``. No pickled module is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from understudy.errors import ModelError, problem

__all__ = ["ChannelShapes", "apply_channel_shapes", "channel_shapes", "layer_kind"]

# Module path to counts: {"network.conv1": {"in_channels": 3, "out_channels": 12, "groups": 1}}.
ChannelShapes = dict[str, dict[str, int | list[int]]]
Counts = Mapping[str, int | list[int]]


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer that can lose channels.

    Attributes:
        module_class: subclasses are of this kind too.
        counts: the attributes that hold its channel counts.
        tensor_shapes: module and counts to the shape of each of its parameters and buffers.
    """

    module_class: type[nn.Module]
    counts: tuple[str, ...]
    tensor_shapes: Callable[[Any, Any], dict[str, tuple[int, ...]]]


def _convolution(layer: _ConvNd, counts: dict[str, int]) -> dict[str, tuple[int, ...]]:
    num_in, num_out, groups = counts["in_channels"], counts["out_channels"], counts["groups"]
    first, second = (num_in, num_out) if layer.transposed else (num_out, num_in)
    return {"weight": (first, second // groups, *layer.kernel_size), "bias": (num_out,)}


def _per_channel(name: str) -> Callable[[Any, Any], dict[str, tuple[int, ...]]]:
    names = ("weight", "bias", "running_mean", "running_var")
    return lambda _, counts: dict.fromkeys(names, (counts[name],))


def _normalized_shape(_: nn.Module, counts: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("weight", "bias"), tuple(counts["normalized_shape"]))


_KINDS = (
    LayerKind(_ConvNd, ("in_channels", "out_channels", "groups"), _convolution),
    LayerKind(
        nn.Linear,
        ("in_features", "out_features"),
        lambda _, counts: {
            "weight": (counts["out_features"], counts["in_features"]),
            "bias": (counts["out_features"],),
        },
    ),
    LayerKind(_NormBase, ("num_features",), _per_channel("num_features")),  # batch, instance
    LayerKind(nn.GroupNorm, ("num_channels", "num_groups"), _per_channel("num_channels")),
    LayerKind(nn.LayerNorm, ("normalized_shape",), _normalized_shape),
    LayerKind(nn.RMSNorm, ("normalized_shape",), _normalized_shape),
    LayerKind(nn.PReLU, ("num_parameters",), _per_channel("num_parameters")),
    LayerKind(
        nn.Embedding,
        ("num_embeddings", "embedding_dim"),
        lambda _, counts: {"weight": (counts["num_embeddings"], counts["embedding_dim"])},
    ),
)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Return what is known of a layer that can lose channels; None for any other module."""
    own = dict(module.named_parameters(recurse=False))
    if hasattr(module, "parametrizations") or not own.keys() <= {"weight", "bias"}:
        return None  # weight normalisation and the like: the weight is computed from others
    return next((kind for kind in _KINDS if isinstance(module, kind.module_class)), None)


def channel_shapes(model: nn.Module) -> ChannelShapes:
    """Return the channel counts of every layer, by module path; JSON-able.

    Convolutions (in_channels, out_channels, groups), linear layers, batch, instance, group, layer
    and RMS norms, PReLU and embeddings by the names of their attributes; any other module that
    holds parameters itself by the shapes of these.
    """
    shapes: ChannelShapes = {}
    for path, module in model.named_modules():
        counts = _counts_of(module)
        if counts:
            shapes[path] = counts
    return shapes


def _counts_of(module: nn.Module) -> dict[str, int | list[int]]:
    kind = layer_kind(module)
    if kind is None:
        parameters = module.named_parameters(recurse=False)
        return {name: list(parameter.shape) for name, parameter in parameters}
    values = {name: getattr(module, name) for name in kind.counts}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def apply_channel_shapes(model: nn.Module, shapes: Mapping[str, Counts]) -> nn.Module:
    """Bring a freshly built network to recorded channel counts, in place.

    Each tensor keeps its leading entries, so the network stays initialised; a pruned network's own
    weights are loaded afterwards.

    Args:
        model: built with the name and arguments of the network that was pruned.
        shapes: what ``channel_shapes`` returned for it, perhaps read from JSON.

    Returns:
        ``model``.

    Raises:
        ModelError: another network's counts, counts that are no counts or above the network's own,
            or groups that do not divide the channels; every bad module is named and nothing is
            changed.
    """
    modules = dict(model.named_modules())
    own = channel_shapes(model)
    problems = [
        _path_problem(path, where="network" if path in own else "record")
        for path in [*own, *shapes]
        if (path in own) != (path in shapes)
    ]
    for path, counts in own.items():
        if path in shapes:
            problems += _count_problems(path, own=counts, given=shapes[path]) or _tensor_problems(
                path, modules[path], shapes[path]
            )
    if problems:
        raise ModelError(*problems)
    for path, counts in own.items():
        given = {k: list(v) if isinstance(v, list) else v for k, v in shapes[path].items()}
        if given != counts:
            _reshape(modules[path], given)
    return model


def _path_problem(path: str, *, where: str) -> str:
    other = "record" if where == "network" else "network"
    return problem(
        f"channel counts: the {where} has a module '{path}' that the {other} has not",
        expected="the counts of this very network after pruning",
        mend="Build the network with the name and arguments it had when it was pruned.",
    )


def _count_problems(path: str, *, own: Counts, given: Any) -> list[str]:
    """Return what is wrong with the counts of one module."""
    if not isinstance(given, Mapping) or given.keys() != own.keys():
        found = ", ".join(map(str, given)) if isinstance(given, Mapping) else repr(given)
        return [
            problem(
                f"channel counts of module '{path}': {found}",
                expected=", ".join(own),
                mend="Build the network with the name and arguments it had when it was pruned.",
            )
        ]
    problems = []
    for name, most in own.items():
        value = given[name]
        wanted = [most] if isinstance(most, int) else most
        values = [value] if isinstance(most, int) else value
        is_count_list = isinstance(values, list | tuple) and len(values) == len(wanted)
        if not is_count_list or not all(map(_is_count, values, wanted)):
            problems.append(
                problem(
                    f"channel counts of module '{path}': {name} {value!r}",
                    expected=f"from 1 to the network's own {most}",
                    mend="Correct the record, or build the network that was pruned.",
                )
            )
    divided = [name for name in ("in_channels", "out_channels", "num_channels") if name in given]
    groups = given.get("groups", given.get("num_groups", 1))
    if not problems and any(given[name] % groups for name in divided):
        found = ", ".join(f"{name} {given[name]}" for name in divided)
        problems.append(
            problem(
                f"channel counts of module '{path}': {found} in {groups} groups",
                expected="channels that the groups divide",
                mend="Correct the record.",
            )
        )
    return problems


def _tensor_problems(path: str, module: nn.Module, given: Any) -> list[str]:
    """Return whether a tensor would have to grow: fewer groups make a weight deeper."""
    kind = layer_kind(module)
    shapes = {} if kind is None else kind.tensor_shapes(module, given)
    tensors = {name: getattr(module, name, None) for name in shapes}
    grown = [
        name
        for name, tensor in tensors.items()
        if tensor is not None
        and any(size > most for size, most in zip(shapes[name], tensor.shape, strict=True))
    ]
    if not grown:
        return []
    return [
        problem(
            f"channel counts of module '{path}': {dict(given)} make its {grown[0]} larger",
            expected="a smaller part of the network's own tensors",
            mend="Correct the record, or build the network that was pruned.",
        )
    ]


def _is_count(value: Any, most: int) -> bool:
    # A size of 0, as some networks have, can only be kept.
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and (1 <= value <= most or value == most)


def _reshape(module: nn.Module, counts: dict[str, Any]) -> None:
    kind = layer_kind(module)
    if kind is None:
        shapes = {name: tuple(shape) for name, shape in counts.items()}
    else:
        shapes = kind.tensor_shapes(module, counts)
        for name, value in counts.items():
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
    for name, shape in shapes.items():
        tensor = getattr(module, name, None)
        if not isinstance(tensor, Tensor):  # no bias, no running statistics
            continue
        # A copy, so that no view keeps the whole of the old tensor alive.
        leading = tensor.detach()[tuple(slice(size) for size in shape)].clone()
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(leading, requires_grad=tensor.requires_grad))
        else:
            setattr(module, name, leading)

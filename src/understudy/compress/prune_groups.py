"""Which channels of a network hang together, and the network without some of them.

Torch-Pruning (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning") follows the autograd
graph of one forward pass and finds the layers whose channels can only go together. It takes every
operation that it does not know for an elementwise one, so each group is tried out here: a network
with random weights must compute without the channels what it computes where nothing reads them.
Groups that fail stay as they are: the logits, streams whose shortcut pads channels, whatever lies
before a norm over channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from understudy.compress.prune_cuts import Cut, Cuts, ExactnessTrial
from understudy.errors import MissingExtraError, ModelError, problem
from understudy.models.reshape import layer_kind


@dataclass(frozen=True)
class GroupImportance:
    """How important channels are.

    Attributes:
        of_group: one of Torch-Pruning's groups to a number for each channel of its root.
        relative: whether the numbers mean nothing beside those of other groups; they are then
            divided by their mean.
    """

    of_group: Callable[[Any], Tensor | None]
    relative: bool


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only go together, in units of those that must.

    Attributes:
        name: path of the first layer that makes these channels.
        channels_per_unit: 1, or the number of groups of a grouped convolution: each group loses
            the same channels.
        indices: for each cut, the indices that each unit takes.
        importance: of each unit; None where the rule gives none.
    """

    name: str
    channels_per_unit: int
    indices: dict[Cut, tuple[tuple[int, ...], ...]]
    importance: tuple[float, ...] | None

    @property
    def num_units(self) -> int:
        return len(next(iter(self.indices.values())))

    def channels(self, units: Iterable[int]) -> tuple[int, ...]:
        """Return the channels of the first layer that are these units."""
        sets = range(self.channels_per_unit)
        return tuple(sorted(unit + i * self.num_units for unit in units for i in sets))


def torch_pruning() -> Any:
    """Import Torch-Pruning, or say which extra brings it."""
    try:
        import torch_pruning as library
    except ModuleNotFoundError as error:
        if error.name != "torch_pruning":
            raise
        raise MissingExtraError("torch-pruning", "compress") from None
    return library


def union_of_cuts(chosen: Iterable[tuple[ChannelGroup, Iterable[int]]]) -> Cuts:
    """Return what to remove from each layer for chosen units of each group."""
    cuts: Cuts = {}
    for group, units in chosen:
        for unit in units:
            for cut, indices in group.indices.items():
                cuts.setdefault(cut, set()).update(indices[unit])
    return {cut: indices for cut, indices in cuts.items() if indices}


def find_groups(
    traced: nn.Module,
    example_NCHW: Tensor,
    *,
    trial: ExactnessTrial,
    importance: GroupImportance,
    ignored: tuple[str, ...],
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups that can be pruned, and why the others cannot, in the network's order.

    Args:
        traced: a copy of the network of which all parameters want gradients; switched to
            evaluation.
        example_NCHW: pictures it takes.
        trial: of the same network.
        importance: of the channels of a group.
        ignored: paths of modules whose output channels stay.

    Raises:
        ModelError: the network cannot be traced.
    """
    library = torch_pruning()
    graph = _trace(library, traced, example_NCHW)
    paths: dict[Any, str] = {module: path for path, module in traced.named_modules()}
    shared = _layers_of_shared_parameters(traced)
    groups: list[ChannelGroup] = []
    fixed: dict[str, str] = {}
    seen: set[str] = set()
    for root, path in paths.items():
        is_root = (
            isinstance(root, nn.Linear | nn.modules.conv._ConvNd) and root in graph.module2node
        )
        if not is_root or path in seen or _is_depthwise(root):
            continue
        pruner = graph.get_pruner_of_module(root)
        num_channels = pruner.get_out_channels(root)
        found = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(num_channels)))
        cuts = dict(_cuts_of(graph, found, paths))
        seen |= {cut.path for cut in cuts if not cut.is_input}
        reason = _reason_to_keep(cuts, traced, shared=shared, ignored=ignored)
        num_sets = max((_num_sets(traced, cut) for cut in cuts), default=1)
        if reason is None and (num_channels % num_sets or num_channels // num_sets < 2):
            reason = f"its {num_channels} channel(s) in {num_sets} set(s) are all needed"
        if reason is None:
            scores = _unit_scores(importance, found, num_channels, num_sets)
            indices = _units(cuts, num_channels, num_sets)
            groups.append(ChannelGroup(path, num_sets, indices, scores))
        else:
            fixed[path] = reason
    return _tried(groups, fixed, trial)


def _trace(library: Any, traced: nn.Module, example_NCHW: Tensor) -> Any:
    try:
        with torch.enable_grad():
            return library.DependencyGraph().build_dependency(
                traced,
                example_inputs=example_NCHW,
                # Given to its own, the library would first try one picture without its batch.
                forward_fn=lambda model, images: model(images),
                verbose=False,
            )
    except Exception as error:  # the network's code, or the tracing of what it does
        raise ModelError(
            problem(
                f"the network cannot be traced for pruning: {type(error).__name__}: {error}",
                expected="a PyTorch network that autograd can follow from pictures to logits",
                mend="Prune a network of another family, or leave pruning out.",
            )
        ) from error


def _cuts_of(
    graph: Any, found: Any, paths: Mapping[Any, str]
) -> Iterator[tuple[Cut, tuple[list[int], list[Any]]]]:
    """Yield each cut of a group with its indices and the root's channels that they follow."""
    for item in found.items:
        node = item.dep.target
        is_parameter = isinstance(node.module, nn.Parameter)
        path = graph._param_to_name.get(node.module) if is_parameter else paths.get(node.module)
        if path is None:  # an operation without weights
            continue
        pruner = graph.get_pruner_of_module(node.module)
        mixes = pruner.prune_in_channels != pruner.prune_out_channels
        is_input = mixes and item.dep.handler == pruner.prune_in_channels
        cut = Cut(path, item.dep.handler, node.pruning_dim, is_input, is_parameter)
        yield cut, (list(item.idxs), list(item.root_idxs))


def _reason_to_keep(
    cuts: Mapping[Cut, Any], traced: nn.Module, *, shared: set[str], ignored: tuple[str, ...]
) -> str | None:
    for cut, (_, roots) in cuts.items():
        kept = [path for path in ignored if f"{cut.path}.".startswith(f"{path}.")]
        if kept and not cut.is_input:
            return f"'{kept[0]}' is ignored"
        if cut.path in shared or cut.path.rpartition(".")[0] in shared:
            return f"'{cut.path}' shares its weights with another layer"
        if not cut.is_parameter and layer_kind(traced.get_submodule(cut.path)) is None:
            kind = type(traced.get_submodule(cut.path)).__name__
            return f"'{cut.path}' is a {kind}, which cannot lose channels"
        if None in roots:
            return f"the channels cannot be followed to '{cut.path}'"
    if not any(cut.is_input for cut in cuts):
        return "no later layer reads its channels, as of the logits"
    return None


def _layers_of_shared_parameters(model: nn.Module) -> set[str]:
    owners = Counter(
        parameter for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    return {
        path
        for path, module in model.named_modules()
        if any(owners[parameter] > 1 for parameter in module.parameters(recurse=False))
    }


def _is_depthwise(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    return bool(groups > 1 and groups == getattr(module, "out_channels", 0))


def _num_sets(model: nn.Module, cut: Cut) -> int:
    """Return how many equal sets of channels a layer has that must lose the same ones."""
    module = None if cut.is_parameter else model.get_submodule(cut.path)
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if module is None or _is_depthwise(module):
        return 1
    return int(getattr(module, "groups", 1))


def _units(
    cuts: Mapping[Cut, tuple[list[int], list[Any]]], num_channels: int, num_sets: int
) -> dict[Cut, tuple[tuple[int, ...], ...]]:
    num_units = num_channels // num_sets
    result = {}
    for cut, (indices, roots) in cuts.items():
        units: list[list[int]] = [[] for _ in range(num_units)]
        for index, root in zip(indices, roots, strict=True):
            units[root % num_units].append(index)
        result[cut] = tuple(map(tuple, units))
    return result


def _unit_scores(
    importance: GroupImportance, found: Any, num_channels: int, num_sets: int
) -> tuple[float, ...] | None:
    """Return the mean importance of each unit's channels."""
    try:
        scores = importance.of_group(found)
    except (RuntimeError, IndexError):  # norms that see only a part of the channels
        return None
    if not isinstance(scores, Tensor) or len(scores) < num_channels:
        return None
    units = scores[:num_channels].double().cpu().view(num_sets, -1).mean(0)
    mean = units.mean()
    if not torch.isfinite(mean):
        raise ModelError(
            problem(
                "importance of channels: weights or gradients are not finite",
                expected="finite numbers",
                mend="Check the training of the network, and the loss that made the gradients.",
            )
        )
    return tuple((units / mean if importance.relative and mean > 0 else units).tolist())


def _tried(
    groups: list[ChannelGroup], fixed: dict[str, str], trial: ExactnessTrial
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Keep the groups without which, together, the network computes the same."""
    if _difference(groups, trial) is None:
        return groups, fixed
    exact: list[ChannelGroup] = []
    for group in groups:
        difference = _difference([*exact, group], trial)
        if difference is None:
            exact.append(group)
        else:
            fixed[group.name] = difference
    return exact, fixed


def _difference(groups: list[ChannelGroup], trial: ExactnessTrial) -> str | None:
    """Try half of each group's units, at random to find hidden symmetries, and all but one."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(group.num_units, generator=generator).tolist() for group in groups]
    halves = [(g, order[len(order) // 2 :]) for g, order in zip(groups, orders, strict=True)]
    most = [(g, order[1:]) for g, order in zip(groups, orders, strict=True)]
    return trial.difference(union_of_cuts(halves)) or trial.difference(union_of_cuts(most))

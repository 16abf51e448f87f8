"""How far along a ranking of channels a goal reaches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from understudy.compress.prune_cuts import without_channels
from understudy.compress.prune_groups import ChannelGroup, union_of_cuts
from understudy.compress.prune_records import NetworkSize, PruneGoal, PruneRule
from understudy.errors import InputError, ModelError, problem
from understudy.models.cost import count_macs

# Milliseconds of one picture through the network.
Measure = Callable[[nn.Module], float]

LIMITS = {"num_params": "parameters", "num_macs": "multiply-accumulates", "latency_ms": "ms"}


def network_size(
    model: nn.Module, example_NCHW: Tensor, *, measure: Measure | None = None
) -> NetworkSize:
    """Return what the limits of a goal are compared with.

    Raises:
        InputError: the example is no picture, or ``measure`` does not return milliseconds.
    """
    if example_NCHW.dim() != 4:
        raise InputError(
            problem(
                f"an example of shape {list(example_NCHW.shape)}",
                expected="pictures [N, C, H, W]",
                mend="Give one picture as the network takes it, with its batch.",
            )
        )
    num_channels, height, width = example_NCHW.shape[1:]
    return NetworkSize(
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        num_macs=count_macs(model, (num_channels, height, width)),
        latency_ms=None if measure is None else latency_ms(model, measure),
    )


def latency_ms(model: nn.Module, measure: Measure) -> float:
    """Return what the function measures on a copy of the network in evaluation mode."""
    found = measure(copy.deepcopy(model).eval())
    if not (isinstance(found, int | float) and math.isfinite(found) and found > 0):
        raise InputError(
            problem(
                f"the measuring function returned {found!r}",
                expected="milliseconds above 0",
                mend="Correct the function that measures the latency.",
            )
        )
    return float(found)


class Search:
    """Finds how far along the ranking a goal reaches.

    What is removed for more of the ranking contains what is removed for less, so that sizes fall
    along it and the least that holds is found by bisection.
    """

    def __init__(
        self,
        model: nn.Module,
        example_NCHW: Tensor,
        groups: Sequence[ChannelGroup],
        rule: PruneRule,
        measure: Measure | None,
    ) -> None:
        self.model = model
        self.example_NCHW = example_NCHW
        self.groups = groups
        self.rule = rule
        self.measure = measure
        # Ties go by the order of the network: the ranking is the same on every machine.
        self.orders = [
            sorted(range(group.num_units), key=lambda unit: (_scores(group)[unit], unit))
            for group in groups
        ]
        ranked = []
        for index, (group, order) in enumerate(zip(groups, self.orders, strict=True)):
            for rank, unit in enumerate(order):
                share = (rank + 1) / group.num_units
                key = _scores(group)[unit] if rule.scope == "global" else share
                ranked.append((key, index, rank))
        self.ranking = [index for _, index, _ in sorted(ranked)]
        self._sizes: dict[tuple[int, ...], NetworkSize] = {}
        self._latencies_ms: dict[tuple[int, ...], float] = {}

    def smallest(self, goal: PruneGoal, fixed: Mapping[str, str]) -> tuple[int, ...]:
        """Return the units that each group keeps; see ``prune`` for errors."""
        fails, holds = -1, len(self.ranking)
        self.check_reachable(goal, fixed)
        while holds - fails > 1:
            # First of all whether anything must go.
            middle = 0 if fails < 0 else (holds + fails) // 2
            if self._missed(self.kept(middle), goal):
                fails = middle
            else:
                holds = middle
        return self.kept(holds)

    def check_reachable(self, goal: PruneGoal, fixed: Mapping[str, str]) -> None:
        """Raise an ``InputError`` that says what can be reached if the goal cannot.

        ``fixed`` says which layers stay and why.
        """
        least_kept = self.kept(len(self.ranking))
        missed = self._missed(least_kept, goal)
        if not missed:
            return
        if not self.groups:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in fixed.items())
            raise ModelError(
                problem(
                    f"none of the network's layers can lose channels ({reasons or 'none found'})",
                    expected="convolutions or linear layers that autograd can follow",
                    mend="Choose another importance, or leave pruning out.",
                )
            )
        least = self.size(least_kept, with_latency="latency_ms" in missed)
        kept = ", ".join(list(fixed)[:5]) + (", ..." if len(fixed) > 5 else "")
        raise InputError(
            *(
                problem(
                    f"pruning to at most {getattr(goal, name):,} {LIMITS[name]}",
                    expected=f"at least {getattr(least, name):,}, the smallest that can be reached "
                    f"with {self.rule.least_channels} channel(s) a layer",
                    mend="Raise the limit, lower round_to, or train a smaller "
                    f"network. Layers that cannot be pruned: {kept or 'none'}.",
                )
                for name in missed
            )
        )

    def kept(self, num_ranked: int) -> tuple[int, ...]:
        """Return the units each group keeps where so many of the ranking may go."""
        counts = [0] * len(self.groups)
        for index in self.ranking[:num_ranked]:
            counts[index] += 1
        return tuple(
            self._rounded(group, group.num_units - count)
            for group, count in zip(self.groups, counts, strict=True)
        )

    def _rounded(self, group: ChannelGroup, num_kept: int) -> int:
        per_unit = group.channels_per_unit
        step = self.rule.round_to // math.gcd(self.rule.round_to, per_unit)
        least = math.ceil(self.rule.least_channels / per_unit)
        return min(group.num_units, math.ceil(max(num_kept, least) / step) * step)

    def removed(self, kept: tuple[int, ...]) -> list[tuple[ChannelGroup, list[int]]]:
        """Return the units of each group that go."""
        return [
            (group, order[: group.num_units - num_kept])
            for group, order, num_kept in zip(self.groups, self.orders, kept, strict=True)
        ]

    def size(self, kept: tuple[int, ...], *, with_latency: bool) -> NetworkSize:
        """Return the size of the network with so many units a group; each is found once."""
        if kept not in self._sizes:
            self._sizes[kept] = network_size(self._candidate(kept), self.example_NCHW)
        size = self._sizes[kept]
        if not with_latency or self.measure is None:
            return size
        if kept not in self._latencies_ms:
            self._latencies_ms[kept] = latency_ms(self._candidate(kept), self.measure)
        return replace(size, latency_ms=self._latencies_ms[kept])

    def _candidate(self, kept: tuple[int, ...]) -> nn.Module:
        return without_channels(self.model, union_of_cuts(self.removed(kept)))

    def _missed(self, kept: tuple[int, ...], goal: PruneGoal) -> list[str]:
        """Return the limits that do not hold; the clock runs only where all others do."""
        size = self.size(kept, with_latency=False)
        missed = [name for name in ("num_params", "num_macs") if _exceeds(size, goal, name)]
        if not missed and goal.latency_ms is not None:
            size = self.size(kept, with_latency=True)
            missed = ["latency_ms"] if _exceeds(size, goal, "latency_ms") else []
        return missed


def _scores(group: ChannelGroup) -> tuple[float, ...]:
    assert group.importance is not None
    return group.importance


def _exceeds(size: NetworkSize, goal: PruneGoal, name: str) -> bool:
    limit = getattr(goal, name)
    return limit is not None and getattr(size, name) > limit

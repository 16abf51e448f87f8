"""What pruning is asked for and what it did, as plain records that go to JSON and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from understudy.errors import InputError, problem
from understudy.models.reshape import ChannelShapes

Importance = Literal["l1", "batch_norm", "taylor"]
Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class PruneGoal:
    """Limits that the pruned network keeps, all of them; None: no such limit.

    Attributes:
        num_params: at most so many parameters.
        num_macs: at most so many multiply-accumulates a picture (``models.cost``).
        latency_ms: at most so long, by the measuring function that comes with it.

    Raises:
        InputError: no limit at all, or a limit that is none, such as a ratio.
    """

    num_params: int | None = None
    num_macs: int | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in ("num_params", "num_macs"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                problems.append(
                    problem(
                        f"pruning to {name} {value!r}",
                        expected="a whole number from 1 up, an amount and not a ratio",
                        mend="For half of a network give half of what it has now.",
                    )
                )
        ms = self.latency_ms
        if ms is not None and not (_is_number(ms) and math.isfinite(ms) and ms > 0):
            problems.append(
                problem(
                    f"pruning to latency_ms {ms!r}",
                    expected="milliseconds above 0",
                    mend="Give the time that one picture may take.",
                )
            )
        if self.num_params is None and self.num_macs is None and ms is None:
            problems.append(
                problem(
                    "pruning without a goal",
                    expected="num_params, num_macs or latency_ms",
                    mend="Give at least one limit; pruning stops as soon as all of them hold.",
                )
            )
        if problems:
            raise InputError(*problems)


@dataclass(frozen=True)
class PruneRule:
    """Which channels go first, and which stay.

    Attributes:
        importance: "l1": sums of absolute weights of a channel (Li et al. 2017); "batch_norm": its
            scale in batch norm (Liu et al. 2017, "Network Slimming"), for networks that have them
            after their convolutions; "taylor": weight times gradient, the first-order effect on
            the loss (Molchanov et al. 2019). Each is averaged over the layers that make or read
            the channel; the first two are divided by the mean of these layers' channels, as
            weights of different layers do not compare.
        scope: "global": all channels are ranked together; "layer": every layer loses the same
            share of its own.
        round_to: channel counts become multiples of this, or stay. Multiples of 8 are quicker on
            CPUs: vectors are whole, and the fast training kernels want 16.
        min_channels: of a layer; None: ``round_to``.
        ignored: paths of modules, with all inside them, whose output channels stay.

    Raises:
        InputError: an unknown name or a count below 1.
    """

    importance: Importance = "l1"
    scope: Scope = "global"
    round_to: int = 1
    min_channels: int | None = None
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            problem(
                f"pruning with {name} {getattr(self, name)!r}",
                expected=" or ".join(get_args(choices)),
                mend="Choose one of them.",
            )
            for name, choices in (("importance", Importance), ("scope", Scope))
            if getattr(self, name) not in get_args(choices)
        ]
        problems += [
            problem(
                f"pruning with {name} {getattr(self, name)!r}",
                expected="a whole number from 1 up",
                mend="Give a number of channels.",
            )
            for name in ("round_to", "min_channels")
            if not (getattr(self, name) is None and name == "min_channels")
            and not (_is_int(getattr(self, name)) and getattr(self, name) >= 1)
        ]
        if problems:
            raise InputError(*problems)

    @property
    def least_channels(self) -> int:
        """Channels that a layer keeps at least, unless it had fewer."""
        return self.round_to if self.min_channels is None else self.min_channels


@dataclass(frozen=True)
class NetworkSize:
    """What a goal limits; ``latency_ms`` is None where nothing measures it."""

    num_params: int
    num_macs: int
    latency_ms: float | None


@dataclass(frozen=True)
class RoundReport:
    """One round of pruning.

    Attributes:
        goal: of this round.
        before: the network that came in.
        after: the network without the channels, not fine-tuned.
        channels_before: output channels of each layer that could be pruned, by its path; layers
            that share their channels count as the first of them.
        channels_after: likewise.
        removed: which of ``channels_before`` went, counted from 0.
        fixed: why each other layer could not.
        shapes_before: as ``models.reshape.channel_shapes`` gives them.
        shapes_after: likewise; what the pruned weights are stored with.
    """

    goal: PruneGoal
    before: NetworkSize
    after: NetworkSize
    channels_before: Mapping[str, int]
    channels_after: Mapping[str, int]
    removed: Mapping[str, tuple[int, ...]]
    fixed: Mapping[str, str]
    shapes_before: ChannelShapes
    shapes_after: ChannelShapes

    @property
    def removed_ratio(self) -> float:
        """Removed channels in all that could be pruned, 0 to 1."""
        before = sum(self.channels_before.values())
        return 1 - sum(self.channels_after.values()) / before if before else 0.0


@dataclass(frozen=True)
class PruneReport:
    """A whole pruning; ``rounds`` in their order, at least one."""

    goal: PruneGoal
    rule: PruneRule
    rounds: tuple[RoundReport, ...]

    @property
    def before(self) -> NetworkSize:
        return self.rounds[0].before

    @property
    def after(self) -> NetworkSize:
        return self.rounds[-1].after

    @property
    def shapes_before(self) -> ChannelShapes:
        return self.rounds[0].shapes_before

    @property
    def shapes_after(self) -> ChannelShapes:
        return self.rounds[-1].shapes_after

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """Output channels of each prunable layer, before the first round and after the last."""
        last = self.rounds[-1].channels_after
        # A layer that is down to one channel is none that could be pruned in later rounds.
        return {
            path: (num_before, last.get(path, self._last_known(path)))
            for path, num_before in self.rounds[0].channels_before.items()
        }

    def _last_known(self, path: str) -> int:
        known = [one.channels_after[path] for one in self.rounds if path in one.channels_after]
        return known[-1]

    @property
    def removed_ratio(self) -> float:
        """Removed channels in all that could be pruned, 0 to 1."""
        before = sum(old for old, _ in self.channels.values())
        return 1 - sum(new for _, new in self.channels.values()) / before if before else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the pruned network less useful than its size promises."""
        found = []
        channels = self.channels
        if all(old == new for old, new in channels.values()):
            found.append("Nothing was removed: the network kept the limits as it was.")
        single = [path for path, (old, new) in channels.items() if new == 1 < old]
        if single:
            found.append(
                f"One channel is left in {', '.join(single)}: hardly anything passes there. "
                "Prune less, set min_channels, or ignore these layers."
            )
        least = self.rule.least_channels
        spent = [path for path, (old, new) in channels.items() if new <= least < old]
        if channels and len(spent) * 2 > len(channels):
            found.append(
                f"{len(spent)} of {len(channels)} layers are down to {least} channel(s): a smaller "
                "network trained from the start may well be better."
            )
        return tuple(found)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)

"""When to leave a network with several exits: thresholds on confidence, and what they come to.

A picture leaves at the first exit whose confidence, the largest probability of its logits over its
temperature, is at least the exit's threshold; the last exit takes the rest (Teerapittayanon et al.
2016, "BranchyNet", algorithm 1, with the largest probability in place of the entropy). Exits are
numbered from shallow to deep.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.errors import InputError, problem

# Above every probability: nothing leaves.
NEVER = 2.0
MAX_GRID_POLICIES = 1024
MAX_CANDIDATES = 100
MAX_PASSES = 10
MAX_CURVE_POINTS = 40
TargetName = Literal["accuracy_drop", "mean_macs", "mean_latency_ms"]


@dataclass(frozen=True)
class ExitPolicy:
    """Where pictures leave.

    Attributes:
        thresholds: of every exit but the last; above 1 (``NEVER``) nothing leaves there.
        temperatures: of every exit; 1 leaves confidences as they are.
    """

    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]

    def __post_init__(self) -> None:
        wrong = [value for value in self.temperatures if not value > 0]
        if len(self.temperatures) != len(self.thresholds) + 1 or wrong:
            raise InputError(
                problem(
                    f"{len(self.thresholds)} thresholds and temperatures {self.temperatures}",
                    expected="a positive temperature for each exit, a threshold for all but one",
                    mend="Give as many as the network has exits.",
                )
            )

    def to_json(self) -> dict[str, Any]:
        """Return the policy as plain lists."""
        return {"thresholds": list(self.thresholds), "temperatures": list(self.temperatures)}


@dataclass(frozen=True)
class PolicyOutcome:
    """What a policy comes to on labelled pictures.

    Attributes:
        accuracy: share of right answers, each given by the exit that the picture left at.
        mean_cost: mean over the pictures of the cost of the exit they left at.
        shares: share of the pictures that leave at each exit.
        leaver_accuracies: accuracy on the pictures that leave at each exit; None for an exit at
            which none leaves.
        num_samples: pictures.
    """

    accuracy: float
    mean_cost: float
    shares: tuple[float, ...]
    leaver_accuracies: tuple[float | None, ...]
    num_samples: int

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class CurvePoint:
    """One policy of the curve of accuracy against mean cost."""

    thresholds: tuple[float, ...]
    accuracy: float
    mean_cost: float

    def to_json(self) -> dict[str, Any]:
        """Return the point as plain values."""
        return asdict(self)


def confidences(logits_ENK: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Return the largest probability [E, N], float32, of every exit for every picture."""
    scale_E11 = torch.tensor(list(temperatures), dtype=torch.float32)[:, None, None]
    return (logits_ENK.float() / scale_E11).softmax(dim=2).amax(dim=2)


def leave_at(confidences_EN: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return the exit [N], int64, at which each picture leaves."""
    chosen_N = torch.full(confidences_EN.shape[1:], len(thresholds))
    for number in reversed(range(len(thresholds))):
        leaves_N = confidences_EN[number] >= thresholds[number]
        chosen_N = torch.where(leaves_N, number, chosen_N)
    return chosen_N


def apply_policy(
    policy: ExitPolicy, logits_ENK: Tensor, labels_N: Tensor, costs: Sequence[float]
) -> PolicyOutcome:
    """Return what a policy comes to.

    Args:
        policy: thresholds and temperatures.
        logits_ENK: of every exit for every picture.
        labels_N: int64.
        costs: of a picture that leaves at each exit, in any unit.

    Raises:
        InputError: the shapes do not fit each other.
    """
    _check_shapes(logits_ENK, labels_N, costs, num_exits=len(policy.temperatures))
    chosen_N = leave_at(confidences(logits_ENK, policy.temperatures), policy.thresholds)
    right_EN = logits_ENK.argmax(dim=2) == labels_N
    right_N = right_EN.gather(0, chosen_N[None])[0].double()
    num_exits, num_samples = right_EN.shape
    counts = torch.bincount(chosen_N, minlength=num_exits).tolist()
    rights = torch.bincount(chosen_N, weights=right_N, minlength=num_exits).tolist()
    return PolicyOutcome(
        accuracy=sum(rights) / num_samples,
        mean_cost=sum(n * cost for n, cost in zip(counts, costs, strict=True)) / num_samples,
        shares=tuple(n / num_samples for n in counts),
        leaver_accuracies=tuple(r / n if n else None for r, n in zip(rights, counts, strict=True)),
        num_samples=num_samples,
    )


def fit_temperature(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Return the temperature with the least negative log-likelihood, in 0.05 to 20.

    Temperature scaling (Guo, Pleiss, Sun and Weinberger 2017, section 4.2): one parameter, in
    which the likelihood has one maximum in 1 / T, found by golden-section search.
    """
    logits_NK = logits_NK.double()

    def loss(log_temperature: float) -> float:
        scaled_NK = logits_NK / torch.tensor(log_temperature, dtype=torch.float64).exp()
        return torch.nn.functional.cross_entropy(scaled_NK, labels_N).item()

    low, high, ratio = -3.0, 3.0, (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    values = loss(left), loss(right)
    while high - low > 1e-4:
        if values[0] < values[1]:
            high, right, left = right, left, right - ratio * (right - low)
            values = loss(left), values[0]
        else:
            low, left, right = left, right, left + ratio * (high - left)
            values = values[1], loss(right)
    return float(torch.tensor((low + high) / 2, dtype=torch.float64).exp())


class ExitSearch:
    """Looks for thresholds on labelled pictures, which must be those of the validation split.

    First a grid over quantiles of every exit's confidences (all of them where there is one side
    exit, coarser for more), then one exit's threshold at a time over finer quantiles until nothing
    gets better.

    Args:
        logits_ENK: of every exit for every picture.
        labels_N: int64.
        costs: of a picture that leaves at each exit, growing with depth.
        temperatures: of every exit.

    Raises:
        InputError: the shapes do not fit each other, or there are no side exits.
    """

    def __init__(
        self,
        logits_ENK: Tensor,
        labels_N: Tensor,
        costs: Sequence[float],
        temperatures: Sequence[float],
    ) -> None:
        num_exits = len(temperatures)
        _check_shapes(logits_ENK, labels_N, costs, num_exits=num_exits)
        self.temperatures = tuple(temperatures)
        self.costs_E = torch.tensor(list(costs), dtype=torch.float64)
        self.right_EN = (logits_ENK.argmax(dim=2) == labels_N).double()
        self.confidences_EN = confidences(logits_ENK, temperatures)
        per_exit = int(MAX_GRID_POLICIES ** (1 / (num_exits - 1)))
        self.grid = [
            self.point(thresholds)
            for thresholds in itertools.product(
                *(self.candidates(k, per_exit) for k in range(num_exits - 1))
            )
        ]

    def candidates(self, number: int, count: int) -> list[float]:
        """Return thresholds of one exit to try: "never", and quantiles down to "always".

        Between two confidences rather than on one: rounding in another runtime decides alike.
        """
        values = torch.unique(self.confidences_EN[number].double())
        between = torch.cat([torch.zeros(1, dtype=torch.float64), (values[1:] + values[:-1]) / 2])
        steps = min(len(between), max(1, min(count, MAX_CANDIDATES) - 1))
        positions = torch.linspace(0, len(between) - 1, steps).round().long()
        # Float32, as the confidences and the exported file are.
        return [NEVER, *between[positions].float().tolist()]

    def point(self, thresholds: Sequence[float]) -> CurvePoint:
        """Return what thresholds come to."""
        chosen_N = leave_at(self.confidences_EN, thresholds)
        accuracy = self.right_EN.gather(0, chosen_N[None]).mean().item()
        return CurvePoint(tuple(thresholds), accuracy, self.costs_E[chosen_N].mean().item())

    def last(self) -> CurvePoint:
        """Return what the last exit alone comes to, without any side head's say."""
        return self.point([NEVER] * (len(self.temperatures) - 1))

    def curve(self) -> list[CurvePoint]:
        """Return the best accuracy for each mean cost, cheapest first: a Pareto front, thinned."""
        front: list[CurvePoint] = []
        for point in sorted(self.grid, key=lambda item: (item.mean_cost, -item.accuracy)):
            if not front or point.accuracy > front[-1].accuracy:
                front.append(point)
        step = (len(front) - 1) / (MAX_CURVE_POINTS - 1)
        if step <= 1:
            return front
        return [front[round(number * step)] for number in range(MAX_CURVE_POINTS)]

    def best(self, target: TargetName, at_most: float) -> ExitPolicy:
        """Return the policy for a target.

        Args:
            target: "accuracy_drop": the cheapest whose accuracy is at most ``at_most`` (0.01 is
                one point) below the last exit's; "mean_macs" or "mean_latency_ms", whichever the
                costs are: the most accurate whose mean cost is at most ``at_most``.
            at_most: of the target.

        Raises:
            InputError: no policy reaches the target.
        """
        if target == "accuracy_drop":
            least = self.last().accuracy - at_most - 1e-12

            def rank(point: CurvePoint) -> tuple[bool, float, float]:
                return point.accuracy >= least, -point.mean_cost, point.accuracy
        else:
            self._check_cost(target, at_most)

            def rank(point: CurvePoint) -> tuple[bool, float, float]:
                return point.mean_cost <= at_most * (1 + 1e-9), point.accuracy, -point.mean_cost

        best = max(self.grid, key=rank)
        for _ in range(MAX_PASSES):
            before = best
            for number in range(len(best.thresholds)):
                earlier, later = best.thresholds[:number], best.thresholds[number + 1 :]
                tried = [
                    self.point((*earlier, threshold, *later))
                    for threshold in self.candidates(number, MAX_CANDIDATES)
                ]
                best = max([best, *tried], key=rank)
            if best == before:
                break
        return ExitPolicy(best.thresholds, self.temperatures)

    def _check_cost(self, target: str, at_most: float) -> None:
        least = self.costs_E.min().item()
        if at_most < least:
            raise InputError(
                problem(
                    f"{target} of at most {at_most:g}, and the first exit costs {least:g} already",
                    expected=f"between {least:g} and {self.costs_E.max().item():g}",
                    mend="Raise it, put the first exit at an earlier layer, or take a smaller "
                    "student.",
                )
            )


def _check_shapes(
    logits_ENK: Tensor, labels_N: Tensor, costs: Sequence[float], *, num_exits: int
) -> None:
    fits = logits_ENK.ndim == 3 and logits_ENK.shape[:2] == (num_exits, len(labels_N))
    if not fits or len(costs) != num_exits or num_exits < 2 or len(labels_N) == 0:
        raise InputError(
            problem(
                f"logits of shape {tuple(logits_ENK.shape)}, {len(labels_N)} labels and "
                f"{len(costs)} costs for {num_exits} exits",
                expected="logits [exits, pictures, classes] of at least 2 exits and 1 picture",
                mend="Give logits, labels and costs of the same exits and pictures.",
            )
        )

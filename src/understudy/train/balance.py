"""Balances: the weights of the terms, adjusted while training.

Each is a module whose state lies in buffers or parameters, so it is saved and resumed with the
training. All processes of a training come to the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import Weights, recipe_weights

# The recipe's weights are looked at this often to find the largest that a schedule reaches.
NUM_GRID_POINTS = 101
# A gradient this much smaller than the largest is not raised to its size any more.
MIN_RELATIVE_NORM = 1e-6


def build_balance(settings: DistillSettings) -> nn.Module | None:
    """Return the balance that the settings ask for; None where the weights are fixed."""
    balance = settings.balance
    if balance.method == "validation":
        return ValidationBalance(times=balance.times, step=balance.step)
    if balance.method == "uncertainty":
        return UncertaintyBalance(largest_weights(settings))
    if balance.method == "gradient_norm":
        names = list(recipe_weights(settings, 0.0))
        return GradientNormBalance(
            names, every_steps=balance.every_steps, smoothing=balance.smoothing
        )
    return None


def largest_weights(settings: DistillSettings) -> dict[str, float]:
    """Return for every term the largest weight that its schedule reaches."""
    points = [number / (NUM_GRID_POINTS - 1) for number in range(NUM_GRID_POINTS)]
    grid = [recipe_weights(settings, progress) for progress in points]
    return {name: max(weights[name] for weights in grid) for name in grid[0]}


class ValidationBalance(nn.Module):
    """Moves weight between the teacher (soft) and the labels (hard) as validation tells.

    Soft are all terms but ``ce``. An adjustment multiplies soft over hard weight by ``step`` or
    divides it by ``step``; the sum of all weights stays as the recipe has it at that moment. It is
    hill climbing on the validation's negative log likelihood (NLL): the first adjustment moves
    towards the teacher, and the direction is turned round whenever the window between the last
    two adjustments did worse than the one before. A window is judged by the exponent

        (ln NLL_begin - ln NLL_end) / (ln progress_end - ln progress_begin),

    which stays the same along a power law, so that the ordinary slowing down of training does not
    read as harm done by the weights. The first window begins at the first validation. The rule is
    ours; it follows no paper.

    Args:
        times: shares of training. The first validation at or after each is an adjustment; several
            that passed since the last validation are one.
        step: factor, above 1.
    """

    log_ratio: Tensor
    direction: Tensor
    num_passed: Tensor
    begin: Tensor
    last_exponent: Tensor

    def __init__(self, *, times: Sequence[float], step: float) -> None:
        super().__init__()
        self.times, self.step = tuple(sorted(times)), step
        self.register_buffer("log_ratio", torch.zeros((), dtype=torch.float64))
        self.register_buffer("direction", torch.ones((), dtype=torch.float64))
        self.register_buffer("num_passed", torch.zeros((), dtype=torch.int64))
        # Progress and NLL where the window began, and the exponent of the one before: none yet.
        self.register_buffer("begin", torch.full((2,), torch.nan, dtype=torch.float64))
        self.register_buffer("last_exponent", torch.tensor(torch.nan, dtype=torch.float64))

    def observe(
        self, terms: dict[str, Tensor], weights: dict[str, float], network: nn.Module
    ) -> Tensor | None:
        """Updates tell nothing."""
        return None

    def adjust(self, weights: dict[str, float]) -> Weights:
        """Return the weights with the ratio of soft to hard moved, their sum unchanged."""
        hard = weights.get("ce", 0.0)
        soft = sum(weights.values()) - hard
        if soft <= 0 or hard <= 0:
            return {**weights}
        ratio = math.exp(self.log_ratio.item())
        hard_factor = (soft + hard) / (soft * ratio + hard)
        return {
            name: weight * hard_factor * (1.0 if name == "ce" else ratio)
            for name, weight in weights.items()
        }

    def after_step(self) -> None:
        """Updates tell nothing."""

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Adjust the ratio where one of the times has passed. Not finite numbers are left out."""
        nll = numbers["nll"]
        if not math.isfinite(nll) or progress <= 0:
            return
        num_passed = sum(progress >= time for time in self.times)
        begin_progress, begin_nll = self.begin.tolist()
        if num_passed > self.num_passed.item():
            if progress > begin_progress:
                self._judge(curve_exponent((begin_progress, begin_nll), (progress, nll)))
            self.log_ratio += self.direction * math.log(self.step)
            self.num_passed.fill_(num_passed)
        elif math.isfinite(begin_progress):
            return
        self.begin.copy_(torch.tensor([progress, nll]))

    def _judge(self, exponent: float) -> None:
        """Turn round where this window did worse than the one before, if there was one."""
        if exponent < self.last_exponent.item():
            self.direction.neg_()
        self.last_exponent.fill_(exponent)


def curve_exponent(begin: tuple[float, float], end: tuple[float, float]) -> float:
    """Return how steeply a learning curve falls between two points (progress, NLL), log over log.

    Along ``NLL = c * progress ** -a`` it is a.
    """
    smallest = torch.finfo(torch.float64).tiny
    fallen = math.log(max(begin[1], smallest)) - math.log(max(end[1], smallest))
    return fallen / (math.log(end[0]) - math.log(begin[0]))


class UncertaintyBalance(nn.Module):
    """Weights learned as the inverse variances of the terms (Kendall, Gal and Cipolla 2018).

    "Multi-task learning using uncertainty to weigh losses for scene geometry and semantics",
    eq. 10, ``L / sigma^2 + log sigma`` for each term, in their numerically stable form with
    ``s = log sigma^2``:

        sum_i  w_i exp(-s_i) L_i  +  (w_i / W_i) s_i / 2

    with the recipe's weight w_i, which may be scheduled, and its largest value W_i over training.
    All s_i start at 0: training starts with the recipe's weights. For a constant weight this is
    eq. 10 of the weighted loss; its minimum over s_i is at ``exp(s_i) = 2 W_i L_i``, where the
    term's weight is ``(w_i / W_i) / (2 L_i)``. So a constant weight sets only where the learning
    starts, while a schedule, and with it ``teacher_share``, keeps its effect: at 0 the term and
    its variance rest.

    The s_i are trained by the student's optimiser. Terms must not be negative: then there would be
    no minimum.

    Args:
        largest_weights: W_i by name of the term; a term that is not named keeps its weight.
    """

    def __init__(self, largest_weights: Mapping[str, float]) -> None:
        super().__init__()
        self.largest = {name: weight for name, weight in largest_weights.items() if weight > 0}
        self.log_variances_T = nn.Parameter(torch.zeros(len(self.largest)))

    def observe(
        self, terms: dict[str, Tensor], weights: dict[str, float], network: nn.Module
    ) -> Tensor | None:
        """Return ``sum_i (w_i / W_i) s_i / 2`` over the terms there are."""
        shares = [
            weights[name] / largest if name in terms else 0.0
            for name, largest in self.largest.items()
        ]
        return (self.log_variances_T * self.log_variances_T.new_tensor(shares)).sum() / 2

    def adjust(self, weights: dict[str, float]) -> Weights:
        """Return ``w_i exp(-s_i)``, with gradient."""
        precisions_T = (-self.log_variances_T).exp()
        adjusted: Weights = {**weights}
        for number, name in enumerate(self.largest):
            adjusted[name] = weights[name] * precisions_T[number]
        return adjusted

    def after_step(self) -> None:
        """The optimiser has moved the variances."""

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Validation tells nothing."""


class GradientNormBalance(nn.Module):
    """Makes the size of every term's gradient proportional to the term's weight.

    With G_i, the norm of the gradient of term i, and the recipe's weights w_i, term i gets

        w_i c / G_i,    c = sum_j w_j G_j / sum_j w_j,

    so that its weighted gradient has norm ``w_i c``, and all of these norms together stay as large
    as the recipe's weights alone would make them. After GradNorm (Chen, Badrinarayanan, Lee and
    Rabinovich 2018, "Gradient normalization for adaptive loss balancing in deep multitask
    networks"), whose aim for ``alpha = 0`` (equal rates of training) is also equal norms. There
    the weights are trained towards it; here they follow from the norms, which are measured every
    ``every_steps`` updates, beginning with the first, and averaged exponentially.

    The norms are over the parameters of the network that all terms reach, and of the first
    micro-batch of an update; with several processes their mean over the processes. A measurement
    costs a backward pass for each term.

    Args:
        names: of the terms to balance.
        every_steps: updates between two measurements.
        smoothing: share of the former norms that stays, in [0, 1).
    """

    norms_T: Tensor
    num_updates: Tensor
    measured_at: Tensor

    def __init__(self, names: Sequence[str], *, every_steps: int, smoothing: float) -> None:
        super().__init__()
        self.names, self.every_steps, self.smoothing = tuple(names), every_steps, smoothing
        not_known_T = torch.full((len(self.names),), torch.nan, dtype=torch.float64)
        self.register_buffer("norms_T", not_known_T)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("measured_at", torch.tensor(-1))

    def observe(
        self, terms: dict[str, Tensor], weights: dict[str, float], network: nn.Module
    ) -> Tensor | None:
        """Measure the norms where it is time to."""
        num_updates = self.num_updates.item()
        if num_updates % self.every_steps or self.measured_at.item() == num_updates:
            return None
        self.measured_at.fill_(num_updates)
        chosen = {name: terms[name] for name in self.names if name in terms}
        parameters = [p for p in network.parameters() if p.requires_grad]
        norms = gradient_norms(chosen, parameters)
        norms_T = self.norms_T.new_tensor([norms.get(name, torch.nan) for name in self.names])
        self._remember(mean_over_processes(norms_T))
        return None

    def _remember(self, norms_T: Tensor) -> None:
        """Average with what was known. A norm that is not finite tells nothing."""
        known_T = torch.where(self.norms_T.isfinite(), self.norms_T, norms_T)
        mean_T = self.smoothing * known_T + (1 - self.smoothing) * norms_T
        self.norms_T.copy_(torch.where(norms_T.isfinite(), mean_T, self.norms_T))

    def adjust(self, weights: dict[str, float]) -> Weights:
        """Return ``w_i c / G_i``; a term without a gradient keeps its weight."""
        norms = {
            name: norm
            for name, norm in zip(self.names, self.norms_T.tolist(), strict=True)
            if math.isfinite(norm) and norm > 0 and weights.get(name, 0.0) > 0
        }
        adjusted: Weights = {**weights}
        if norms:
            total = sum(weights[name] * norm for name, norm in norms.items())
            common = total / sum(weights[name] for name in norms)
            smallest = MIN_RELATIVE_NORM * max(norms.values())
            for name, norm in norms.items():
                adjusted[name] = weights[name] * common / max(norm, smallest)
        return adjusted

    def after_step(self) -> None:
        """Count the update."""
        self.num_updates += 1

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Validation tells nothing."""


def gradient_norms(
    terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]
) -> dict[str, float]:
    """Return the norm of each term's gradient over the parameters that all of them reach.

    The graph is kept for the backward pass to come, and no ``.grad`` is touched. A term that
    reaches no parameter is left out; nothing is returned where the terms share no parameter.
    """
    gradients = {
        name: torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        for name, term in terms.items()
        if term.requires_grad
    }
    gradients = {
        name: values
        for name, values in gradients.items()
        if any(value is not None for value in values)
    }
    shared = [
        number
        for number in range(len(parameters))
        if all(values[number] is not None for values in gradients.values())
    ]
    if not shared:
        return {}
    return {
        name: torch.nn.utils.get_total_norm([values[number].float() for number in shared]).item()
        for name, values in gradients.items()
    }


def mean_over_processes(values_T: Tensor) -> Tensor:
    """Return the mean over the processes of a training; of the only one its own values."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values_T
    summed_T = values_T.clone()
    torch.distributed.all_reduce(summed_T)
    return summed_T / torch.distributed.get_world_size()

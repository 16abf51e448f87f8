"""How much of a difference between two accuracies is chance: standard errors on a test split."""

from __future__ import annotations

import math
from dataclasses import dataclass

from understudy.report.results import CalibrationBin, PairedCounts, SplitMetrics

# Two standard errors: about 95 of 100 differences by chance alone are smaller.
NUM_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Difference:
    """A difference of two rates and its standard error, both in [0, 1] units."""

    value: float
    standard_error: float

    @property
    def margin(self) -> float:
        """Half-width of the interval that chance alone explains."""
        return NUM_STANDARD_ERRORS * self.standard_error

    @property
    def is_noise(self) -> bool:
        """Whether chance alone explains it."""
        return abs(self.value) <= self.margin


def rate_standard_error(rate: float, num_samples: int) -> float:
    """Return the binomial standard error of a rate.

    Uses the Agresti-Coull estimate (2 successes and 2 failures added), so that a rate of 0 or 1 on
    few samples does not claim to be exact.
    """
    adjusted = (rate * num_samples + 2) / (num_samples + 4)
    return math.sqrt(adjusted * (1 - adjusted) / (num_samples + 4))


def accuracy_difference(
    ours: SplitMetrics, theirs: SplitMetrics, *, paired: PairedCounts | None = None
) -> Difference:
    """Return our accuracy minus theirs with its standard error.

    With paired counts on the same samples the error is McNemar's, which is smaller; without them
    the two accuracies count as independent, which is on the safe side. Paired counts that say
    another difference than the accuracies do (other samples) are not used.
    """
    value = ours.accuracy - theirs.accuracy
    n = ours.num_samples
    if paired is not None and n > 0:
        gained, lost = paired.only_student_right, paired.only_control_right
        if abs((gained - lost) / n - value) < 0.5 / n:
            variance = gained + lost - (gained - lost) ** 2 / n
            # One more discordant pair either way is always possible.
            return Difference(value, math.sqrt(max(variance, 1.0)) / n)
    error = math.hypot(
        rate_standard_error(ours.accuracy, ours.num_samples),
        rate_standard_error(theirs.accuracy, theirs.num_samples),
    )
    return Difference(value, error)


def calibration_noise(bins: tuple[CalibrationBin, ...]) -> float:
    """Return the expected calibration error that a perfectly calibrated model would show.

    The error is a mean of absolute values, so it is above zero by chance alone, the more so the
    fewer samples a bin has: sum over bins of n_b / n * sqrt(2 / pi) * binomial standard error.
    """
    total = sum(item.count for item in bins)
    noise = 0.0
    for item in bins:
        if item.count > 0 and item.confidence is not None:
            variance = item.confidence * (1 - item.confidence) / item.count
            noise += item.count / total * math.sqrt(2 / math.pi * max(variance, 0.0))
    return noise


def line_fit(points: list[tuple[int, float]]) -> Difference:
    """Return the rise of the least-squares line over the points, with its standard error."""
    xs, ys = [float(x) for x, _ in points], [y for _, y in points]
    n = len(points)
    mean_x, mean_y = sum(xs) / n, sum(ys) / n
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    length = xs[-1] - xs[0]
    return Difference(slope * length, math.sqrt(residual / max(n - 2, 1) / spread) * length)

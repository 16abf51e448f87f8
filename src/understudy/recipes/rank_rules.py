"""Which of several teachers makes the best student, and what of it is chance: pure functions.

A difference between two students has two sources of chance. Training again with another seed gives
another student; that is estimated from all students of all seeds together. And the validation split
is a sample; that is estimated from the pictures that only one of two gets right. Everything is
paired: students of one seed have the same first weights and order, and all see the same pictures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t
from torch import Tensor

from understudy.report.sampling import NUM_STANDARD_ERRORS, Difference

# Of 100 differences by chance alone, 95 are smaller than their margin.
COVERAGE = 0.95


@dataclass(frozen=True)
class TrainingNoise:
    """How much a student's accuracy differs from seed to seed, what all share of a seed taken off.

    Attributes:
        standard_deviation: of one training, in [0, 1] units.
        degrees_of_freedom: how much the estimate rests on.
    """

    standard_deviation: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class Comparison:
    """Two candidates: the first one's accuracy minus the second's, of teachers and of students."""

    first: str
    second: str
    teacher: Difference
    student: Difference

    @property
    def turned(self) -> Comparison:
        """The same with first and second exchanged."""
        return Comparison(self.second, self.first, negated(self.teacher), negated(self.student))


def negated(difference: Difference) -> Difference:
    """Return theirs minus ours."""
    return Difference(-difference.value, difference.standard_error)


def paired_difference(ours_N: Tensor, theirs_N: Tensor) -> Difference:
    """Return the difference of two accuracies on the same pictures, with McNemar's standard error.

    Args:
        ours_N, theirs_N: whether each picture is answered rightly, bool.
    """
    num_pictures = len(ours_N)
    gained, lost = int((ours_N & ~theirs_N).sum()), int((theirs_N & ~ours_N).sum())
    variance = gained + lost - (gained - lost) ** 2 / num_pictures
    # One more picture either way is always possible.
    error = math.sqrt(max(variance, 1.0)) / num_pictures
    return Difference((gained - lost) / num_pictures, error)


def training_noise(accuracies: Mapping[str, Sequence[float]]) -> TrainingNoise | None:
    """Return the residual of student and seed in a two-way table; None with one seed or student.

    Args:
        accuracies: each student's by seed, in the same order of seeds.
    """
    rows = list(accuracies.values())
    num_students, num_seeds = len(rows), len(rows[0])
    freedom = (num_students - 1) * (num_seeds - 1)
    if freedom == 0:
        return None
    row_means = [statistics.fmean(row) for row in rows]
    seed_means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    mean = statistics.fmean(row_means)
    squares = sum(
        (value - row_mean - seed_mean + mean) ** 2
        for row, row_mean in zip(rows, row_means, strict=True)
        for value, seed_mean in zip(row, seed_means, strict=True)
    )
    return TrainingNoise(math.sqrt(squares / freedom), freedom)


def student_difference(
    ours_SN: Tensor, theirs_SN: Tensor, noise: TrainingNoise | None
) -> Difference:
    """Return the difference of two students' mean accuracies over the seeds.

    Its standard error joins training and pictures. Where the noise of training rests on few
    trainings it is widened as Student's t distribution asks, so that ``Difference.margin`` covers
    what it says. Without an estimate of it only the pictures count: a difference beyond the margin
    is then one of these two trainings, not of the two teachers.

    Args:
        ours_SN, theirs_SN: whether each picture is answered rightly with each seed, bool.
        noise: of ``training_noise``.
    """
    num_seeds, num_pictures = ours_SN.shape
    difference_N = (ours_SN.double() - theirs_SN.double()).mean(dim=0)
    variance = difference_N.var(correction=0).item() / num_pictures
    variance = max(variance, 1.0 / num_pictures**2)
    if noise is not None:
        quantile = float(student_t.ppf((1 + COVERAGE) / 2, noise.degrees_of_freedom))
        widened = noise.standard_deviation * max(1.0, quantile / NUM_STANDARD_ERRORS)
        variance += 2 * widened**2 / num_seeds
    return Difference(difference_N.mean().item(), math.sqrt(variance))


def better_teachers_of_worse_students(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the pairs in which the first is the better teacher and makes the worse student.

    Both differences are beyond noise. Cho and Hariharan 2019 ("On the efficacy of knowledge
    distillation") and Mirzadeh et al. 2020 show it for teachers that are much larger than the
    student.
    """
    return [
        pair
        for comparison in comparisons
        for pair in (comparison, comparison.turned)
        if pair.teacher.value > pair.teacher.margin and pair.student.value < -pair.student.margin
    ]


def ranked(
    student_accuracies: Mapping[str, float],
    images_per_second: Mapping[str, float],
    comparisons: Sequence[Comparison],
) -> list[list[str]]:
    """Return the candidates from best to worst, those that are tied in one list.

    The best student leads; the candidates whose students are within noise of it are tied with it,
    and the one that labels fastest comes first among them. The rest are ranked likewise.
    """
    within_noise = {
        frozenset((one.first, one.second)) for one in comparisons if one.student.is_noise
    }
    left = sorted(student_accuracies, key=lambda name: -student_accuracies[name])
    groups = []
    while left:
        leader = left[0]
        tied = [n for n in left if n == leader or frozenset((n, leader)) in within_noise]
        groups.append(sorted(tied, key=lambda name: -images_per_second[name]))
        left = [name for name in left if name not in tied]
    return groups

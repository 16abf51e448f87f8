"""Sampling errors against plain references: NumPy on the samples themselves, and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from understudy.report.results import CalibrationBin, PairedCounts, SplitMetrics
from understudy.report.sampling import (
    accuracy_difference,
    calibration_noise,
    line_fit,
    rate_standard_error,
)


def metrics(right_N: np.ndarray) -> SplitMetrics:
    accuracy = float(right_N.mean())
    return SplitMetrics(
        accuracy=accuracy,
        per_class_accuracy=(accuracy,),
        nll=0.1,
        brier=0.1,
        ece=0.0,
        confusion=((len(right_N),),),
        calibration_bins=(),
        num_samples=len(right_N),
    )


def test_paired_error_is_that_of_the_per_sample_differences() -> None:
    generator = np.random.default_rng(0)
    ours = generator.random(2000) < 0.9
    theirs = np.where(generator.random(2000) < 0.1, generator.random(2000) < 0.5, ours)
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    paired = PairedCounts(gained, lost)
    found = accuracy_difference(metrics(ours), metrics(theirs), paired=paired)
    differences = ours.astype(float) - theirs.astype(float)
    assert found.value == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(differences.std() / np.sqrt(2000))
    unpaired = accuracy_difference(metrics(ours), metrics(theirs))
    assert unpaired.standard_error > found.standard_error


def test_paired_counts_of_other_samples_are_not_used() -> None:
    ours, theirs = np.arange(100) < 90, np.arange(100) < 80
    plain = accuracy_difference(metrics(ours), metrics(theirs))
    assert accuracy_difference(metrics(ours), metrics(theirs), paired=PairedCounts(3, 5)) == plain


def test_difference_by_chance_alone_is_noise_about_95_times_in_100() -> None:
    generator = np.random.default_rng(1)
    noisy = 0
    for _ in range(400):
        ours, theirs = generator.random((2, 300)) < 0.8
        counts = PairedCounts(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()))
        noisy += accuracy_difference(metrics(ours), metrics(theirs), paired=counts).is_noise
    assert 0.91 < noisy / 400 < 0.99


def test_a_perfect_rate_on_few_samples_is_not_certain() -> None:
    assert rate_standard_error(1.0, 10) > 0.05
    assert rate_standard_error(0.7, 10**6) == pytest.approx(np.sqrt(0.21 / 10**6), rel=1e-3)
    assert rate_standard_error(0.0, 0) > 0


def test_calibration_noise_is_what_a_calibrated_model_shows() -> None:
    generator = np.random.default_rng(2)
    confidences, counts = [0.55, 0.75, 0.95], [60, 120, 300]
    errors = []
    for _ in range(600):
        gaps = [
            n * abs((generator.random(n) < p).mean() - p)
            for p, n in zip(confidences, counts, strict=True)
        ]
        errors.append(sum(gaps) / sum(counts))
    bins = tuple(
        CalibrationBin(p - 0.05, p + 0.05, p, p, n)
        for p, n in zip(confidences, counts, strict=True)
    )
    empty = CalibrationBin(0.0, 0.1, None, None, 0)
    assert calibration_noise((*bins, empty)) == pytest.approx(np.mean(errors), rel=0.06)


def test_line_fit_is_least_squares() -> None:
    generator = np.random.default_rng(3)
    points = [(x, 0.8 + 0.01 * x + 0.002 * generator.normal()) for x in range(5, 17)]
    xs, ys = np.array(points).T
    (slope, _), covariance = np.polyfit(xs, ys, 1, cov=True)
    found = line_fit(points)
    assert found.value == pytest.approx(slope * 11)
    assert found.standard_error == pytest.approx(np.sqrt(covariance[0, 0]) * 11)

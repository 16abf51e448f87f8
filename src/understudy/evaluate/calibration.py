"""How far probabilities can be trusted: calibration error, Brier score, negative log-likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_BINS = 15


@dataclass(frozen=True)
class CalibrationBin:
    """The samples whose confidence lies in (lower, upper].

    Attributes:
        confidence: mean confidence, None in an empty bin.
        accuracy: share of correct answers, None in an empty bin.
        count: number of samples.
    """

    lower: float
    upper: float
    confidence: float | None
    accuracy: float | None
    count: int


def calibration_bins(
    probabilities_NK: Tensor, labels_N: Tensor, *, num_bins: int = NUM_BINS
) -> tuple[CalibrationBin, ...]:
    """Sort samples into ``num_bins`` equally wide bins of confidence, (lower, upper] each.

    Confidence is the largest probability of a sample (Guo, Pleiss, Sun and Weinberger 2017,
    "On Calibration of Modern Neural Networks", section 2).
    """
    confidence_N, predicted_N = probabilities_NK.double().max(dim=1)
    correct_N = (predicted_N == labels_N).double()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    # bucketize gives i with edges[i-1] < v <= edges[i]: the paper's right-closed intervals.
    bin_N = torch.bucketize(confidence_N, edges[1:-1])
    counts = torch.bincount(bin_N, minlength=num_bins)
    confidence_sums = torch.bincount(bin_N, weights=confidence_N, minlength=num_bins)
    correct_sums = torch.bincount(bin_N, weights=correct_N, minlength=num_bins)
    return tuple(
        CalibrationBin(
            lower=edges[i].item(),
            upper=edges[i + 1].item(),
            confidence=(confidence_sums[i] / counts[i]).item() if counts[i] else None,
            accuracy=(correct_sums[i] / counts[i]).item() if counts[i] else None,
            count=int(counts[i]),
        )
        for i in range(num_bins)
    )


def expected_calibration_error(bins: tuple[CalibrationBin, ...]) -> float:
    """Return sum over bins of count/n times |accuracy - confidence| (Guo et al. 2017, eq. 3)."""
    num_samples = sum(one.count for one in bins)
    return sum(
        one.count / num_samples * abs(one.accuracy - one.confidence)
        for one in bins
        if one.accuracy is not None and one.confidence is not None
    )


def brier_score(probabilities_NK: Tensor, labels_N: Tensor) -> float:
    """Return the mean squared distance between probabilities and the one-hot label, in [0, 2].

    The original definition over all classes (Brier 1950, "Verification of Forecasts Expressed in
    Terms of Probability", eq. 2), which for two classes is twice the one-column form.
    """
    one_hot_NK = F.one_hot(labels_N, probabilities_NK.shape[1]).double()
    return (probabilities_NK.double() - one_hot_NK).square().sum(dim=1).mean().item()


def negative_log_likelihood(log_probabilities_NK: Tensor, labels_N: Tensor) -> float:
    """Return the mean of -log p(label), in nats."""
    return -log_probabilities_NK.double().gather(1, labels_N[:, None]).mean().item()

"""Reference statistics: what inputs and outputs looked like at release, to compare service with.

Sums are exact: whole-number histograms of pixels, float64 elsewhere. No picture and no feature of
one is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from understudy.errors import DataError, problem

STATISTICS_SCHEMA_VERSION = 1
NUM_PIXEL_BINS = 32
NUM_SHARE_BINS = 20
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
CHUNK_IMAGES = 2048

FloatArray = NDArray[np.float64]


def reference_statistics(
    images_NCHW: NDArray[np.uint8], logits_NK: NDArray[Any], *, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return statistics of pictures and of the student's answers to them, JSON-able.

    All values are on the scale that the network sees: pixels in [0, 1], natural logarithms. A
    histogram has ``counts`` between equally spaced ``edges``, each bin closed on the left and the
    last on both sides.

    Args:
        images_NCHW: uint8, such as the validation split, as the network is given them.
        logits_NK: the logits of the released file for these pictures.

    Raises:
        DataError: shapes, types or values do not fit.
    """
    _check(images_NCHW, logits_NK, class_names)
    probabilities_NK = softmax(logits_NK)
    return {
        "schema_version": STATISTICS_SCHEMA_VERSION,
        "num_images": len(images_NCHW),
        "image_shape": list(images_NCHW.shape[1:]),
        "class_names": list(class_names),
        "inputs": _input_statistics(images_NCHW),
        "outputs": _output_statistics(probabilities_NK, logits_NK.argmax(axis=1)),
    }


def softmax(logits_NK: NDArray[Any]) -> FloatArray:
    """Return probabilities in float64."""
    shifted_NK = logits_NK.astype(np.float64)
    shifted_NK = shifted_NK - shifted_NK.max(axis=1, keepdims=True)
    powers_NK: FloatArray = np.exp(shifted_NK)
    shares_NK: FloatArray = powers_NK / powers_NK.sum(axis=1, keepdims=True)
    return shares_NK


def _input_statistics(images_NCHW: NDArray[np.uint8]) -> dict[str, Any]:
    num_channels = images_NCHW.shape[1]
    counts_CV = np.zeros((num_channels, 256), np.int64)
    brightness: list[FloatArray] = []
    contrast: list[FloatArray] = []
    for start in range(0, len(images_NCHW), CHUNK_IMAGES):
        chunk_NCHW = images_NCHW[start : start + CHUNK_IMAGES]
        for channel in range(num_channels):
            counts_CV[channel] += np.bincount(chunk_NCHW[:, channel].ravel(), minlength=256)
        flat_NP = chunk_NCHW.reshape(len(chunk_NCHW), -1)
        brightness.append(flat_NP.mean(axis=1, dtype=np.float64) / 255)
        contrast.append(flat_NP.std(axis=1, dtype=np.float64) / 255)
    return {
        "channels": [_channel(counts_V) for counts_V in counts_CV],
        "brightness": _spread(np.concatenate(brightness)),
        "contrast": _spread(np.concatenate(contrast)),
    }


def _channel(counts_V: NDArray[np.int64]) -> dict[str, Any]:
    values_V = np.arange(256) / 255
    total = counts_V.sum()
    mean = float((counts_V * values_V).sum() / total)
    variance = float((counts_V * (values_V - mean) ** 2).sum() / total)
    return {
        "mean": mean,
        "std": math.sqrt(variance),
        "histogram": {
            "edges": [index / NUM_PIXEL_BINS for index in range(NUM_PIXEL_BINS + 1)],
            "counts": counts_V.reshape(NUM_PIXEL_BINS, -1).sum(axis=1).tolist(),
        },
    }


def _output_statistics(
    probabilities_NK: FloatArray, predicted_N: NDArray[np.int64]
) -> dict[str, Any]:
    num_classes = probabilities_NK.shape[1]
    counts_K = np.bincount(predicted_N, minlength=num_classes)
    # 0 log 0 is 0.
    logs_NK = np.log(np.where(probabilities_NK > 0, probabilities_NK, 1.0))
    entropy_N = -(probabilities_NK * logs_NK).sum(axis=1)
    return {
        "predicted_counts": counts_K.tolist(),
        "predicted_shares": (counts_K / len(predicted_N)).tolist(),
        "mean_probabilities": probabilities_NK.mean(axis=0).tolist(),
        "confidence": _share(probabilities_NK.max(axis=1)),
        # Relative to the entropy of all classes alike, so 0 is sure and 1 knows nothing.
        "entropy": _share(entropy_N / math.log(num_classes)),
    }


def _spread(values_N: FloatArray) -> dict[str, Any]:
    quantiles = np.quantile(values_N, QUANTILES)
    return {
        "mean": float(values_N.mean()),
        "std": float(values_N.std()),
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
    }


def _share(values_N: FloatArray) -> dict[str, Any]:
    # Rounding may leave a hair outside of [0, 1], which a histogram would drop.
    counts, edges = np.histogram(np.clip(values_N, 0, 1), bins=NUM_SHARE_BINS, range=(0, 1))
    histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
    return {**_spread(values_N), "histogram": histogram}


def _check(
    images_NCHW: NDArray[np.uint8], logits_NK: NDArray[Any], class_names: Sequence[str]
) -> None:
    problems = []
    if images_NCHW.dtype != np.uint8 or images_NCHW.ndim != 4 or images_NCHW.size == 0:
        problems.append(
            problem(
                f"the reference pictures are {images_NCHW.dtype} of {images_NCHW.shape}",
                expected="uint8 [n, C, H, W], n at least 1",
                mend="Give the pictures of the validation split.",
            )
        )
    expected_shape = (len(images_NCHW), len(class_names))
    if logits_NK.shape != expected_shape or len(class_names) < 2:
        problems.append(
            problem(
                f"the reference logits have shape {logits_NK.shape}",
                expected=f"{expected_shape}: pictures, class names (at least 2)",
                mend="Give the logits of the same pictures.",
            )
        )
    elif not np.isfinite(logits_NK).all():
        problems.append(
            problem(
                "the reference logits hold NaN or infinity",
                expected="finite numbers",
                mend="Check the parity of the released file.",
            )
        )
    if problems:
        raise DataError(*problems)

"""Reference statistics against plain NumPy, and what they refuse."""

import json

import numpy as np
import pytest
from scipy.stats import entropy

from understudy.errors import DataError
from understudy.package import statistics
from understudy.package.statistics import reference_statistics, softmax

NAMES = ("a", "b", "c")


@pytest.fixture
def sample():
    random = np.random.default_rng(3)
    images_NCHW = random.integers(0, 256, (50, 3, 6, 5)).astype(np.uint8)
    return images_NCHW, random.normal(0, 3, (50, 3)).astype(np.float32)


def test_inputs_are_what_numpy_finds(sample, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_IMAGES", 7)
    images_NCHW, logits_NK = sample
    found = reference_statistics(images_NCHW, logits_NK, class_names=NAMES)["inputs"]
    pixels_NCHW = images_NCHW / 255
    for index, channel in enumerate(found["channels"]):
        assert channel["mean"] == pytest.approx(pixels_NCHW[:, index].mean(), abs=1e-12)
        assert channel["std"] == pytest.approx(pixels_NCHW[:, index].std(), abs=1e-12)
        histogram = channel["histogram"]
        counts, edges = np.histogram(images_NCHW[:, index], bins=32, range=(0, 256))
        assert histogram["counts"] == counts.tolist()
        np.testing.assert_allclose(histogram["edges"], edges / 256)
    for name, values_N in (
        ("brightness", pixels_NCHW.mean(axis=(1, 2, 3))),
        ("contrast", pixels_NCHW.std(axis=(1, 2, 3))),
    ):
        assert found[name]["mean"] == pytest.approx(values_N.mean())
        for quantile, value in found[name]["quantiles"].items():
            assert value == pytest.approx(np.quantile(values_N, float(quantile)))


def test_outputs_are_what_numpy_finds(sample):
    images_NCHW, logits_NK = sample
    found = reference_statistics(images_NCHW, logits_NK, class_names=NAMES)["outputs"]
    probabilities_NK = softmax(logits_NK)
    np.testing.assert_allclose(probabilities_NK.sum(axis=1), 1)
    assert found["predicted_counts"] == np.bincount(logits_NK.argmax(1), minlength=3).tolist()
    assert sum(found["predicted_shares"]) == pytest.approx(1)
    np.testing.assert_allclose(found["mean_probabilities"], probabilities_NK.mean(axis=0))
    assert found["confidence"]["mean"] == pytest.approx(probabilities_NK.max(axis=1).mean())
    relative_N = entropy(probabilities_NK, axis=1, base=3)
    assert found["entropy"]["mean"] == pytest.approx(relative_N.mean())
    for name in ("confidence", "entropy"):
        assert sum(found[name]["histogram"]["counts"]) == 50
        assert len(found[name]["histogram"]["edges"]) == 21


def test_they_are_json_and_repeat(sample):
    first, second = (reference_statistics(*sample, class_names=NAMES) for _ in range(2))
    assert json.dumps(first, allow_nan=False) == json.dumps(second)
    assert first["num_images"] == 50
    assert first["image_shape"] == [3, 6, 5]


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
def test_sure_and_unsure_answers_stay_finite_and_inside(logits):
    images_NCHW = np.full((2, 1, 2, 2), 255, np.uint8)
    found = reference_statistics(images_NCHW, np.array([logits] * 2), class_names=NAMES)
    json.dumps(found, allow_nan=False)
    assert sum(found["outputs"]["entropy"]["histogram"]["counts"]) == 2
    assert found["inputs"]["channels"][0]["histogram"]["counts"][-1] == 8
    assert found["inputs"]["channels"][0]["mean"] == 1
    assert found["inputs"]["channels"][0]["std"] == 0


@pytest.mark.parametrize(
    ("images", "logits", "message"),
    [
        (np.zeros((2, 3, 4, 4), np.float32), np.zeros((2, 3)), "float32 of"),
        (np.zeros((0, 3, 4, 4), np.uint8), np.zeros((0, 3)), "n at least 1"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros((2, 3)), r"\[n, C, H, W\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 4)), r"expected \(2, 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.full((2, 3), np.nan), "NaN or infinity"),
    ],
)
def test_what_does_not_fit(images, logits, message):
    with pytest.raises(DataError, match=message):
        reference_statistics(images, logits, class_names=NAMES)

import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import Tensor, nn

from understudy.errors import DataError, ModelError
from understudy.evaluate.accuracy import Metrics, evaluate_logits, predict_logits
from understudy.evaluate.calibration import calibration_bins, expected_calibration_error

NAMES = ("a", "b", "c", "d", "e")


def some_logits(num_samples: int = 400, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits_NK = 3 * torch.randn(num_samples, num_classes, generator=generator)
    labels_N = torch.randint(0, num_classes, (num_samples,), generator=generator)
    logits_NK[torch.arange(num_samples), labels_N] += 2
    return logits_NK, labels_N


def test_metrics_equal_scikit_learn():
    logits_NK, labels_N = some_logits()
    teacher_NK, _ = some_logits()
    teacher_NK[::3] = teacher_NK[::3].flip(1)
    result = evaluate_logits(logits_NK, labels_N, class_names=NAMES, teacher_logits_NK=teacher_NK)
    probabilities_NK = logits_NK.double().softmax(1).numpy()
    labels, predicted = labels_N.numpy(), logits_NK.argmax(1).numpy()
    confusion = reference.confusion_matrix(labels, predicted, labels=range(5))
    assert np.array_equal(result.confusion, confusion)
    assert result.accuracy == pytest.approx(reference.accuracy_score(labels, predicted))
    assert result.per_class_accuracy == pytest.approx(
        reference.recall_score(labels, predicted, average=None)
    )
    assert result.nll == pytest.approx(reference.log_loss(labels, probabilities_NK))
    assert result.brier == pytest.approx(
        reference.brier_score_loss(labels, probabilities_NK, scale_by_half=False)
    )
    assert result.agreement_with_teacher == np.mean(predicted == teacher_NK.argmax(1).numpy())
    assert result.num_samples == 400


def loop_ece(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> float:
    """Guo et al. 2017, equation 3, word by word."""
    total = 0.0
    for m in range(1, num_bins + 1):
        members = [
            i
            for i, row in enumerate(probabilities)
            if (m - 1) / num_bins < row.max() <= m / num_bins
        ]
        if not members:
            continue
        accuracy = sum(probabilities[i].argmax() == labels[i] for i in members) / len(members)
        confidence = sum(probabilities[i].max() for i in members) / len(members)
        total += len(members) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_ece_equals_the_loop(num_bins):
    logits_NK, labels_N = some_logits()
    result = evaluate_logits(logits_NK, labels_N, class_names=NAMES, num_bins=num_bins)
    probabilities = logits_NK.double().softmax(1).numpy()
    assert result.ece == pytest.approx(loop_ece(probabilities, labels_N.numpy(), num_bins))
    assert len(result.calibration_bins) == num_bins
    assert sum(one.count for one in result.calibration_bins) == 400


def test_bins_are_closed_on_the_right():
    probabilities_NK = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.76, 0.24]])
    bins = calibration_bins(probabilities_NK, torch.tensor([0, 0, 0, 1]), num_bins=4)
    assert [one.count for one in bins] == [0, 1, 1, 2]
    assert bins[0].confidence is None
    assert bins[0].accuracy is None
    assert bins[3].accuracy == 0.5
    assert bins[3].confidence == pytest.approx(0.88)


def test_perfectly_calibrated_and_perfectly_wrong():
    probabilities_NK = torch.tensor([[0.75, 0.25]]).repeat(4, 1)
    calibrated = calibration_bins(probabilities_NK, torch.tensor([0, 0, 0, 1]))
    assert expected_calibration_error(calibrated) == pytest.approx(0, abs=1e-12)
    wrong = calibration_bins(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert expected_calibration_error(wrong) == 1.0


def test_a_class_absent_from_the_split_has_no_accuracy():
    logits_NK = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    result = evaluate_logits(logits_NK, torch.tensor([0, 0]), class_names=("x", "y", "z"))
    assert result.per_class_accuracy == (0.5, None, None)
    assert result.confusion == ((1, 0, 1), (0, 0, 0), (0, 0, 0))
    assert result.agreement_with_teacher is None
    text = json.dumps(result.to_json(), allow_nan=False)
    assert Metrics.from_json(json.loads(text)) == result


def test_certain_and_wrong_stays_finite():
    result = evaluate_logits(
        torch.tensor([[1e4, 0.0], [0.0, 1e4]]), torch.tensor([1, 1]), class_names=("x", "y")
    )
    assert result.nll == pytest.approx(5000)
    assert result.brier == pytest.approx(1.0)
    assert math.isfinite(result.ece)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_an_error(value):
    logits_NK, labels_N = some_logits(20)
    teacher_NK = logits_NK.clone()
    logits_NK[7, 1] = logits_NK[9, 4] = value
    with pytest.raises(ModelError, match="the model's logits are NaN or infinite for 2 of 20 "):
        evaluate_logits(logits_NK, labels_N, class_names=NAMES)
    with pytest.raises(ModelError, match=r"the teacher's .* first at position 7"):
        evaluate_logits(teacher_NK, labels_N, class_names=NAMES, teacher_logits_NK=logits_NK)


def test_misfits_are_listed_together():
    logits_NK, labels_N = some_logits(20)
    labels_N[3] = 5
    with pytest.raises(DataError) as raised:
        evaluate_logits(logits_NK[:19], labels_N, class_names=NAMES, teacher_logits_NK=logits_NK)
    assert "the model's logits have shape (19, 5); expected (20, 5)" in raised.value.problems[0]
    assert raised.value.problems[1].startswith("labels run from 0 to 5; expected 0 to 4")
    with pytest.raises(DataError, match="the split is empty"):
        evaluate_logits(logits_NK[:0], labels_N[:0], class_names=NAMES)


class SomeImages:
    """The one method of a source that is used here."""

    def __init__(self, images_NCHW: Tensor) -> None:
        self.images_NCHW = images_NCHW

    def iter_images(self, index_batches):
        for indices in index_batches:
            yield self.images_NCHW[indices]


class TinyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.frozen_norm = nn.BatchNorm2d(1).eval()
        self.drop = nn.Dropout(0.9)
        self.linear = nn.Linear(16, 3)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        values = self.frozen_norm(self.norm(images_NCHW.float() / 255))
        return self.linear(self.drop(values).flatten(1))


def test_prediction_keeps_order_and_the_models_modes():
    torch.manual_seed(0)
    source = SomeImages(torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8))
    model = TinyNetwork()
    indices = torch.tensor([29, 0, 5, 5, 11, 2, 7])
    told = []
    logits_NK = predict_logits(
        model,
        source,
        indices,
        batch_size=3,
        progress=lambda done, total, note="": told.append((done, total)),
    )
    assert model.training
    assert model.drop.training
    assert not model.frozen_norm.training
    assert torch.equal(model.norm.running_mean, torch.zeros(1))
    model.eval()
    one_at_a_time = torch.cat([model(source.images_NCHW[i : i + 1]) for i in indices.tolist()])
    torch.testing.assert_close(logits_NK, one_at_a_time)
    assert logits_NK.dtype == torch.float32
    assert not logits_NK.is_inference()
    assert told == [(3, 7), (6, 7), (7, 7)]


def test_prediction_takes_a_black_box_and_refuses_nothing_to_do():
    source = SomeImages(torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1))
    logits_NK = predict_logits(
        lambda images: images.flatten(1).half().repeat(1, 2), source, torch.arange(8)
    )
    assert logits_NK.tolist() == [[i, i] for i in range(8)]
    with pytest.raises(DataError, match="no samples to evaluate"):
        predict_logits(nn.Identity(), source, torch.arange(0))

import math

import numpy as np
import pytest
import torch

from understudy.data.batches import Batch
from understudy.errors import InputError, ModelError
from understudy.teachers.ensemble import EnsembleTeacher, validation_weights
from understudy.teachers.outputs import TeacherOutputs

NUM_SAMPLES, NUM_CLASSES = 6, 4


class Fixed:
    """A teacher that always gives these outputs."""

    def __init__(self, logits_NK, **features):
        self.answer = TeacherOutputs(logits_NK, features)
        self.asked = []

    def outputs(self, batch, *, view):
        self.asked.append((batch, view))
        return self.answer


def random_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(NUM_SAMPLES, NUM_CLASSES, generator=generator)


def new_batch(**changes) -> Batch:
    images_NCHW = torch.zeros(NUM_SAMPLES, 1, 2, 2, dtype=torch.uint8)
    labels_N = torch.tensor([0, 1, 2, 3, 0, 1])
    return Batch(
        **{"indices_N": labels_N, "images_NCHW": images_NCHW, "labels_N": labels_N, **changes}
    )


def softmax(values, axis):
    powers = np.exp(np.asarray(values, dtype=np.float64))
    return powers / powers.sum(axis=axis, keepdims=True)


def mixture(members, weights_MN, temperature):
    """Return the weighted mean of softened distributions, [N, K], with loops."""
    mean_NK = np.zeros((NUM_SAMPLES, NUM_CLASSES))
    for member, weights_N in zip(members, weights_MN, strict=True):
        soft_NK = softmax(member.numpy() / temperature, 1)
        for row in range(NUM_SAMPLES):
            mean_NK[row] += weights_N[row] * soft_NK[row]
    return mean_NK


def answered(members, batch=None, **options):
    ensemble = EnsembleTeacher([Fixed(member) for member in members], **options)
    return ensemble.outputs(new_batch() if batch is None else batch, view=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mean_is_the_mean_of_softened_distributions(temperature):
    members = [random_logits(0), random_logits(1), random_logits(2, scale=10)]
    logits_NK = answered(members, temperature=temperature).logits_NK
    expected = mixture(members, np.full((3, NUM_SAMPLES), 1 / 3), temperature)
    assert logits_NK.dtype == torch.float32
    assert np.allclose(softmax(logits_NK / temperature, 1), expected, atol=1e-6)


@pytest.mark.parametrize("combine", ["mean", "validation", "confidence"])
def test_an_ensemble_of_one_or_of_equals_is_that_teacher(combine):
    member = random_logits(0, scale=20)
    for count in (1, 3):
        options = {"combine": combine, "validation_accuracies": [0.8] * count, "temperature": 4.0}
        logits_NK = answered([member] * count, **options).logits_NK
        assert torch.allclose(logits_NK, member, atol=2e-5)


def test_extreme_logits_stay_finite():
    members = [1e4 * random_logits(0), -1e4 * random_logits(0), torch.zeros(6, 4)]
    for combine in ("mean", "confidence"):
        logits_NK = answered(members, combine=combine).logits_NK
        assert torch.isfinite(logits_NK).all()
        assert np.allclose(softmax(logits_NK - logits_NK.amax(1, keepdim=True), 1).sum(1), 1)


def test_validation_weights_are_those_of_samme():
    accuracies = [0.5, 0.9, 0.97]
    expected = np.array([math.log(a / (1 - a)) + math.log(NUM_CLASSES - 1) for a in accuracies])
    expected /= expected.sum()
    got = validation_weights(accuracies, num_classes=NUM_CLASSES)
    assert np.allclose(got, expected)
    members = [random_logits(seed) for seed in range(3)]
    outputs = answered(members, combine="validation", validation_accuracies=accuracies)
    weights_MN = np.repeat(expected[:, None], NUM_SAMPLES, axis=1)
    assert np.allclose(softmax(outputs.logits_NK, 1), mixture(members, weights_MN, 1.0), atol=1e-6)


def test_members_at_chance_have_no_say_and_perfect_ones_not_all():
    weights_M = validation_weights([0.0, 0.25, 0.6, 1.0], num_classes=NUM_CLASSES)
    assert weights_M[:2].tolist() == [0, 0]
    assert 0 < weights_M[2] < weights_M[3] < 1
    assert weights_M.sum() == pytest.approx(1)
    assert validation_weights([0.5, 0.75], num_classes=2).tolist() == [0, 1]
    with pytest.raises(InputError, match="one above chance"):
        validation_weights([0.1, 0.25], num_classes=NUM_CLASSES)


def confidence(members, losses):
    """Zhang, Chen, Wang 2022, equation 2, for one sample."""
    total = sum(math.exp(loss) for loss in losses)
    return [(1 - math.exp(loss) / total) / (len(members) - 1) for loss in losses]


def loss_of(member, row, label):
    return -math.log(softmax(member[row].numpy(), 0)[label])


@pytest.mark.parametrize("num_members", [2, 4])
def test_confidence_follows_each_members_cross_entropy_with_the_label(num_members):
    members = [random_logits(seed) for seed in range(num_members)]
    batch = new_batch()
    weights_NM = [
        confidence(members, [loss_of(member, row, label) for member in members])
        for row, label in enumerate(batch.labels_N.tolist())
    ]
    outputs = answered(members, batch, combine="confidence", temperature=2.0)
    expected = mixture(members, np.array(weights_NM).T, 2.0)
    assert np.allclose(softmax(outputs.logits_NK / 2, 1), expected, atol=1e-6)


def test_confidence_takes_mixed_labels_for_mixed_pictures_and_entropy_for_unknown_ones():
    members = [random_logits(seed) for seed in range(3)]
    partners_N = torch.tensor([3, 3, 1, 0, 2, 2])
    shares_N = torch.tensor([0.9, 0.5, 0.7, 1.0, 0.0, 0.6])
    labels_N = torch.tensor([0, 1, 2, 3, 0, -1])
    batch = new_batch(labels_N=labels_N, partner_labels_N=partners_N, label_weight_N=shares_N)
    weights_NM = []
    for row in range(NUM_SAMPLES):
        losses = []
        for member in members:
            if labels_N[row] >= 0:
                share = shares_N[row].item()
                own = loss_of(member, row, labels_N[row].item())
                losses.append(share * own + (1 - share) * loss_of(member, row, partners_N[row]))
            else:
                probabilities = softmax(member[row].numpy(), 0)
                losses.append(-sum(p * math.log(p) for p in probabilities))
        weights_NM.append(confidence(members, losses))
    outputs = answered(members, batch, combine="confidence")
    expected = mixture(members, np.array(weights_NM).T, 1.0)
    assert np.allclose(softmax(outputs.logits_NK, 1), expected, atol=1e-6)


def test_features_are_named_by_member():
    first = Fixed(random_logits(0), **{"layer3:map": torch.ones(6, 2)})
    second = Fixed(random_logits(1), **{"layer3:map": torch.zeros(6, 5), "stem:map": torch.ones(6)})
    inner = EnsembleTeacher([first, second])
    batch = new_batch()
    outputs = EnsembleTeacher([second, inner]).outputs(batch, view=3)
    expected = ["1/layer3:map", "1/stem:map", "2/1/layer3:map", "2/2/layer3:map", "2/2/stem:map"]
    assert list(outputs.features) == expected
    assert outputs.features["2/1/layer3:map"] is first.answer.features["layer3:map"]
    assert outputs.top_k is None
    assert first.asked == [(batch, 3)]


def test_bad_ensembles_are_refused():
    with pytest.raises(InputError, match="no teachers"):
        EnsembleTeacher([])
    one = Fixed(random_logits(0))
    with pytest.raises(InputError) as caught:
        EnsembleTeacher([one], combine="vote", temperature=0)
    assert len(caught.value.problems) == 2
    for accuracies in (None, [0.5], [0.5, 1.5], [0.5, math.nan]):
        with pytest.raises(InputError, match="one in \\[0, 1\\] for each"):
            EnsembleTeacher([one, one], combine="validation", validation_accuracies=accuracies)
    with pytest.raises(ModelError, match=r"\(6, 4\), \(6, 3\)"):
        answered([random_logits(0), random_logits(0)[:, :3]])

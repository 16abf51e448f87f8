"""Several teachers as one: a weighted mean of what they say.

The members' distributions are averaged, not their logits: a class counts as far as some member
finds it likely, and members whose logits differ in scale or offset count alike (Hinton, Vinyals,
Dean 2015, section 1, "Distilling the Knowledge in a Neural Network"; You, Xu, Xu, Tao 2017,
"Learning from Multiple Teacher Networks", whose soft targets are this mean of softened outputs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.data.batches import Batch
from understudy.errors import InputError, ModelError, problem
from understudy.teachers.outputs import TeacherOutputs

Combination = Literal["mean", "validation", "confidence"]
COMBINATIONS = ("mean", "validation", "confidence")

# A member without a mistake on the validation split has made too few answers to be taken for
# certain: its weight stays finite.
MAX_ACCURACY = 0.999


class Member(Protocol):
    """A teacher: stored, live, or an ensemble itself."""

    def outputs(self, batch: Batch, *, view: int) -> TeacherOutputs:
        """Return what the teacher says of the batch in this view."""
        ...


class EnsembleTeacher:
    """Several teachers that answer as one, with features under ``"MEMBER/TAP"``.

    The members may be of different architectures. Their logits become one distribution
    (``combined_logits``); their features stay apart, since different networks' features are not
    comparable: member 1's tap "layer3:map" is "1/layer3:map", so that a loss names the member it
    learns from.

    Args:
        members: the teachers, numbered from 1.
        combine: "mean": all members count alike. "validation": by their accuracy
            (``validation_weights``). "confidence": for each picture by how well the member answers
            it (``confidence_weights``).
        validation_accuracies: the members' on the validation split, in [0, 1]; for "validation".
        temperature: of the loss, at which the mean is taken.

    Raises:
        InputError: no members, an unknown combination, accuracies missing or impossible, a
            temperature that is not positive.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        combine: Combination = "mean",
        validation_accuracies: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        problems = _problems(len(members), combine, validation_accuracies, temperature)
        if problems:
            raise InputError(*problems)
        self._members = tuple(members)
        self._combine = combine
        self._validation_accuracies = tuple(validation_accuracies or ())
        self._temperature = temperature

    def outputs(self, batch: Batch, *, view: int) -> TeacherOutputs:
        """Return the members' outputs of the batch in this view, combined.

        Raises:
            ModelError: the members answer with different numbers of classes.
            InputError: no member's validation accuracy is better than chance.
        """
        answers = [member.outputs(batch, view=view) for member in self._members]
        shapes = [tuple(answer.logits_NK.shape) for answer in answers]
        if len(set(shapes)) > 1:
            raise ModelError(
                problem(
                    f"the ensemble's teachers answer with shapes {shapes}",
                    expected="the same classes of every teacher",
                    mend="Give each teacher's class names, or leave out those of other data.",
                )
            )
        logits_MNK = torch.stack([answer.logits_NK for answer in answers])
        features = {
            f"{number}/{key}": values
            for number, answer in enumerate(answers, start=1)
            for key, values in answer.features.items()
        }
        weights_MN = self._weights(logits_MNK, batch)
        logits_NK = combined_logits(logits_MNK, weights_MN, temperature=self._temperature)
        return TeacherOutputs(logits_NK, features)

    def _weights(self, logits_MNK: Tensor, batch: Batch) -> Tensor:
        num_members, num_samples, num_classes = logits_MNK.shape
        if self._combine == "confidence":
            return confidence_weights(
                logits_MNK,
                batch.labels_N,
                partner_labels_N=batch.partner_labels_N,
                label_weight_N=batch.label_weight_N,
            )
        if self._combine == "validation":
            weights_M = validation_weights(self._validation_accuracies, num_classes=num_classes)
        else:
            weights_M = torch.full((num_members,), 1 / num_members)
        return weights_M[:, None].expand(num_members, num_samples)


def combined_logits(logits_MNK: Tensor, weights_MN: Tensor, *, temperature: float) -> Tensor:
    """Return logits_NK whose softened distribution is the members' weighted mean.

    ``softmax(logits / T) = sum_m w_m softmax(logits_m / T)`` at the given temperature T: exact for
    a loss at this temperature, and a sharper or softer version of the same mean at another. Each
    row is shifted by the weighted mean of the members' own normalisers, which changes no
    distribution and makes the ensemble of one teacher that teacher, logits included.

    Args:
        logits_MNK: of M members.
        weights_MN: from 0 to 1, with sum 1 over the members.
        temperature: T, above 0.
    """
    softened_MNK = logits_MNK.float() / temperature
    normalizers_MN = softened_MNK.logsumexp(dim=2)
    log_probabilities_MNK = softened_MNK - normalizers_MN[:, :, None]
    mean_NK = torch.logsumexp(log_probabilities_MNK + weights_MN.log()[:, :, None], dim=0)
    shift_N = (weights_MN * normalizers_MN).sum(dim=0)
    return temperature * (mean_NK + shift_N[:, None])


def validation_weights(accuracies: Sequence[float], *, num_classes: int) -> Tensor:
    """Return one weight a member, [M], with sum 1, from its accuracy on the validation split.

    Proportional to ``log(a / (1 - a)) + log(K - 1)``, the weight of a member in the multi-class
    AdaBoost SAMME (Zhu, Zou, Rosset, Hastie 2009, "Multi-class AdaBoost", algorithm 2): none at
    chance or below, more than in proportion to the accuracy near perfection. Accuracies count as
    ``MAX_ACCURACY`` at most.

    Raises:
        InputError: no member is better than chance.
    """
    weights = []
    for accuracy in accuracies:
        accuracy = min(accuracy, MAX_ACCURACY)
        above_chance = accuracy * num_classes > 1
        log_odds = math.log(accuracy / (1 - accuracy)) if above_chance else -math.inf
        weights.append(max(0.0, log_odds + math.log(max(1, num_classes - 1))))
    if not sum(weights):
        raise InputError(
            problem(
                f"the teachers' validation accuracies are {list(accuracies)}",
                expected=f"one above chance (1 in {num_classes}) at least",
                mend="Train better teachers, or combine them by 'mean'.",
            )
        )
    return torch.tensor(weights) / sum(weights)


def confidence_weights(
    logits_MNK: Tensor,
    labels_N: Tensor,
    *,
    partner_labels_N: Tensor | None = None,
    label_weight_N: Tensor | None = None,
) -> Tensor:
    """Return one weight a member and picture, [M, N], with sum 1 over the members.

    ``w_m = (1 - exp(L_m) / sum_j exp(L_j)) / (M - 1)``, L being a member's cross-entropy with the
    label (Zhang, Chen, Wang 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation",
    equations 1 and 2). A mixed picture's label is its mixture of two. Where there is no label
    (below 0), L is the entropy of the member's own answer.
    """
    num_members = len(logits_MNK)
    if num_members == 1:
        return torch.ones(logits_MNK.shape[:2])
    log_probabilities_MNK = logits_MNK.float().log_softmax(dim=2)
    losses_MN = -_picked(log_probabilities_MNK, labels_N)
    if partner_labels_N is not None and label_weight_N is not None:
        partner_losses_MN = -_picked(log_probabilities_MNK, partner_labels_N)
        losses_MN = torch.lerp(partner_losses_MN, losses_MN, label_weight_N.expand_as(losses_MN))
    entropies_MN = -(log_probabilities_MNK.exp() * log_probabilities_MNK).sum(dim=2)
    labelled_N = labels_N >= 0
    if partner_labels_N is not None:
        labelled_N = labelled_N & (partner_labels_N >= 0)
    losses_MN = torch.where(labelled_N, losses_MN, entropies_MN)
    return (1 - F.softmax(losses_MN, dim=0)) / (num_members - 1)


def _picked(values_MNK: Tensor, labels_N: Tensor) -> Tensor:
    """Return each row's value at its label, [M, N]; at class 0 where there is no label."""
    columns_MN1 = labels_N.clamp(min=0)[None, :, None].expand(len(values_MNK), -1, 1)
    return values_MNK.gather(2, columns_MN1).squeeze(2)


def _problems(
    num_members: int,
    combine: str,
    validation_accuracies: Sequence[float] | None,
    temperature: float,
) -> list[str]:
    problems = []
    if not num_members:
        problems.append(
            problem("an ensemble of no teachers", expected="one or more", mend="Name its members.")
        )
    if combine not in COMBINATIONS:
        problems.append(
            problem(
                f"the ensemble combines by '{combine}'",
                expected=", ".join(COMBINATIONS),
                mend="Use mean where nothing is known of the teachers.",
            )
        )
    accuracies = validation_accuracies or ()
    impossible = not all(0 <= accuracy <= 1 for accuracy in accuracies)
    if combine == "validation" and (len(accuracies) != num_members or impossible):
        problems.append(
            problem(
                f"the validation accuracies {list(accuracies)} of {num_members} teachers",
                expected="one in [0, 1] for each",
                mend="Measure each on the validation split.",
            )
        )
    if not temperature > 0:
        problems.append(
            problem(
                f"the ensemble's temperature is {temperature}",
                expected="above 0",
                mend="Give the temperature of the loss.",
            )
        )
    return problems

"""What an update minimises: named loss terms, and how much each of them counts."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn import functional

from understudy.data.batches import Batch
from understudy.losses.logits import cross_entropy
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.schedules import schedule_value
from understudy.train.settings import Schedule


class StepOutput(NamedTuple):
    """What one forward pass gives: unweighted scalar loss terms by name, and the logits_NK."""

    terms: dict[str, Tensor]
    logits_NK: Tensor


class Objective(Protocol):
    """A way of teaching. ``progress`` is the share of training done, in [0, 1].

    Attributes:
        parts: what is trained or remembered beside the network: adapters, variances, a memory,
            peers, an averaged teacher. Its parameters are optimised with the network's, its state
            is in every checkpoint, and none of it is exported.
    """

    parts: nn.Module

    def step(
        self, network: nn.Module, batch: Batch, teacher: TeacherOutputs | None, progress: float
    ) -> StepOutput:
        """Run the network on the batch and return its loss terms."""
        ...

    def weights(self, progress: float) -> dict[str, float | Tensor]:
        """Return the weight of every term that ``step`` gives; a tensor is learnt."""
        ...

    def after_step(self, network: nn.Module) -> None:
        """Take note of an update of the network."""
        ...

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Take note of what the network reached on the validation split."""
        ...


def value_at(value: float | Schedule, progress: float) -> float:
    """Return a constant, or a schedule's value at this progress."""
    if isinstance(value, Schedule):
        return schedule_value(
            value.start, value.end, shape=value.shape, progress=progress, steps=value.steps
        )
    return value


def label_loss(logits_NK: Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy with the labels of mixed or plain pictures.

    The mean of a part of an update counts by its labels, and not by its pictures.
    """
    loss = cross_entropy(
        logits_NK,
        batch.labels_N,
        partner_labels_N=batch.partner_labels_N,
        label_weight_N=batch.label_weight_N,
        label_smoothing=label_smoothing,
    )
    return loss if batch.label_factor is None else loss * batch.label_factor


def count_right(logits_NK: Tensor, batch: Batch) -> tuple[float, int]:
    """Return how many labelled samples are right (mixed labels by their weights), of how many."""
    answers_N, labelled_N = logits_NK.argmax(dim=1), batch.labelled_N
    right_N = (answers_N == batch.labels_N).float()
    if batch.partner_labels_N is not None and batch.label_weight_N is not None:
        partner_right_N = (answers_N == batch.partner_labels_N).float()
        right_N = batch.label_weight_N * right_N + (1 - batch.label_weight_N) * partner_right_N
    return right_N[labelled_N].sum().item(), int(labelled_N.sum())


def sample_losses(logits_NK: Tensor, batch: Batch) -> Tensor:
    """Return each sample's cross-entropy with its own label."""
    return functional.cross_entropy(logits_NK.float(), batch.labels_N, reduction="none")


class LabelObjective:
    """Cross-entropy with the labels and nothing else: how a teacher and a control are trained."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        self.parts: nn.Module = nn.Module()

    def step(
        self, network: nn.Module, batch: Batch, teacher: TeacherOutputs | None, progress: float
    ) -> StepOutput:
        """Return the term ``ce``. The teacher is not asked."""
        logits_NK = network(batch.images_NCHW)
        loss = label_loss(logits_NK, batch, label_smoothing=self.label_smoothing)
        return StepOutput({"ce": loss}, logits_NK)

    def weights(self, progress: float) -> dict[str, float | Tensor]:
        """The one term counts in full."""
        return {"ce": 1.0}

    def after_step(self, network: nn.Module) -> None:
        """Nothing is remembered."""

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Nothing is adjusted."""

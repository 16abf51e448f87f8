"""What an update minimises: named loss terms, and how much each of them counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from understudy.data.batches import Batch
from understudy.losses.logits import cross_entropy, kl
from understudy.train.schedules import schedule_value
from understudy.train.settings import DistillSettings, Schedule


class StepOutput(NamedTuple):
    """What one forward pass gives: unweighted scalar loss terms by name, and the logits_NK."""

    terms: dict[str, Tensor]
    logits_NK: Tensor


class Objective(Protocol):
    """A way of teaching. ``progress`` is the share of training done, in [0, 1]."""

    def step(
        self, network: nn.Module, batch: Batch, teacher_logits_NK: Tensor | None, progress: float
    ) -> StepOutput:
        """Run the network on the batch and return its loss terms."""
        ...

    def weights(self, progress: float) -> dict[str, float]:
        """Return the weight of every term that ``step`` gives."""
        ...


def value_at(value: float | Schedule, progress: float) -> float:
    """Return a constant, or a schedule's value at this progress."""
    if isinstance(value, Schedule):
        return schedule_value(
            value.start, value.end, shape=value.shape, progress=progress, steps=value.steps
        )
    return value


@dataclass(frozen=True)
class LabelObjective:
    """Cross-entropy with the labels and nothing else: how a teacher and a control are trained."""

    label_smoothing: float = 0.0

    def step(
        self, network: nn.Module, batch: Batch, teacher_logits_NK: Tensor | None, progress: float
    ) -> StepOutput:
        """Return the term ``ce``. The teacher is not asked."""
        logits_NK = network(batch.images_NCHW)
        return StepOutput({"ce": self.cross_entropy(logits_NK, batch)}, logits_NK)

    def cross_entropy(self, logits_NK: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of mixed or plain pictures."""
        return cross_entropy(
            logits_NK,
            batch.labels_N,
            partner_labels_N=batch.partner_labels_N,
            label_weight_N=batch.label_weight_N,
            label_smoothing=self.label_smoothing,
        )

    def weights(self, progress: float) -> dict[str, float]:
        """The one term counts in full."""
        return {"ce": 1.0}


@dataclass(frozen=True)
class DistillObjective:
    """Cross-entropy plus temperature KL to the teacher (Hinton, Vinyals and Dean 2015)."""

    settings: DistillSettings
    label_smoothing: float = 0.0

    def step(
        self, network: nn.Module, batch: Batch, teacher_logits_NK: Tensor | None, progress: float
    ) -> StepOutput:
        """Return the terms ``kl`` (with its factor T squared) and, where it counts, ``ce``."""
        assert teacher_logits_NK is not None, "a distilled student needs a teacher source"
        logits_NK = network(batch.images_NCHW)
        temperature = value_at(self.settings.temperature, progress)
        terms = {"kl": kl(logits_NK, teacher_logits_NK, temperature=temperature)}
        if self.settings.ce_weight != 0:
            labels = LabelObjective(self.label_smoothing)
            terms["ce"] = labels.cross_entropy(logits_NK, batch)
        return StepOutput(terms, logits_NK)

    def weights(self, progress: float) -> dict[str, float]:
        """Return ``kl_weight`` and ``ce_weight`` at this progress."""
        return {
            "kl": value_at(self.settings.kl_weight, progress),
            "ce": value_at(self.settings.ce_weight, progress),
        }

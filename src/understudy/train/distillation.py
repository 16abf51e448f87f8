"""Distillation from one teacher source: KL, labels, and any further losses of the recipe."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from understudy.data.batches import Batch
from understudy.losses.logits import kl
from understudy.models.taps import Taps
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.distill_settings import DistillSettings
from understudy.train.loss_table import LOSSES
from understudy.train.objective import StepOutput, label_loss, value_at
from understudy.train.terms import Seen

Weights = dict[str, float | Tensor]


class WeightBalance(Protocol):
    """Adjusts the weights of the terms. A module: its state is saved with the training's."""

    def observe(
        self, terms: dict[str, Tensor], weights: dict[str, float], network: nn.Module
    ) -> Tensor | None:
        """Look at a micro-batch's terms and the recipe's weights, before ``adjust``.

        Return a penalty to minimise with the terms, or None.
        """
        ...

    def adjust(self, weights: dict[str, float]) -> Weights:
        """Return the weights to use in place of those of the recipe."""
        ...

    def after_step(self) -> None:
        """Count an update of the network."""
        ...

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Take note of what the network reached on the validation split."""
        ...


class DistillObjective:
    """Temperature KL (Hinton, Vinyals and Dean 2015), cross-entropy, and further terms.

    Args:
        settings: weights, temperature, schedules.
        label_smoothing: of the cross-entropy.
        taps: the student's layers that the terms look at; None where none does.
        terms: one module a further loss, called with a ``Seen``.
        balance: adjusts the weights while training; None leaves them as they are.
    """

    def __init__(
        self,
        settings: DistillSettings,
        label_smoothing: float = 0.0,
        *,
        taps: Taps | None = None,
        terms: nn.ModuleDict | None = None,
        balance: nn.Module | None = None,
    ) -> None:
        self.settings, self.label_smoothing, self.taps = settings, label_smoothing, taps
        self.terms = terms if terms is not None else nn.ModuleDict()
        self.balance: WeightBalance | None = balance  # type: ignore[assignment]
        self.parts: nn.Module = nn.ModuleDict({"terms": self.terms})
        if balance is not None:
            self.parts.add_module("balance", balance)

    def step(
        self, network: nn.Module, batch: Batch, teacher: TeacherOutputs | None, progress: float
    ) -> StepOutput:
        """Return ``kl`` (with its factor T squared) and ``ce`` where they count, and the rest."""
        assert teacher is not None, "a distilled student needs a teacher source"
        features: dict[str, Tensor] = {}
        if self.taps is None:
            logits_NK = network(batch.images_NCHW)
        else:
            logits_NK, features = self.taps.run(network, batch.images_NCHW)
        temperature = value_at(self.settings.temperature, progress)
        terms: dict[str, Tensor] = {}
        if self.settings.kl_weight != 0:
            terms["kl"] = kl(logits_NK, teacher.logits_NK, temperature=temperature)
        if self.settings.ce_weight != 0 or self.settings.teacher_share != 1:
            terms["ce"] = label_loss(logits_NK, batch, label_smoothing=self.label_smoothing)
        seen = Seen(logits_NK, features, teacher, batch, temperature)
        for name, term in self.terms.items():
            terms[name] = term(seen)
        if self.balance is not None:
            penalty = self.balance.observe(terms, recipe_weights(self.settings, progress), network)
            if penalty is not None:
                terms["balance"] = penalty
        return StepOutput(terms, logits_NK)

    def weights(self, progress: float) -> Weights:
        """Return every term's weight at this progress, after ``teacher_share`` and the balance."""
        weights = recipe_weights(self.settings, progress)
        if self.balance is None:
            return {**weights}
        return {**self.balance.adjust(weights), "balance": 1.0}

    def after_step(self, network: nn.Module) -> None:
        """Let the balance know."""
        if self.balance is not None:
            self.balance.after_step()

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Let the balance know."""
        if self.balance is not None:
            self.balance.after_validation(numbers, progress)


def recipe_weights(settings: DistillSettings, progress: float) -> dict[str, float]:
    """Return every term's weight at this progress as the settings say, ``teacher_share`` included.

    Args:
        settings: weights and schedules.
        progress: share of training done, in [0, 1].
    """
    share = value_at(settings.teacher_share, progress)
    ce_weight = value_at(settings.ce_weight, progress)
    weights = {
        "kl": share * value_at(settings.kl_weight, progress),
        "ce": ce_weight + (1 - share) * max(0.0, 1 - ce_weight),
    }
    for name, loss in settings.losses.items():
        given = LOSSES[name].weight if loss.weight is None else loss.weight
        weights[name] = share * value_at(given, progress)
    return weights

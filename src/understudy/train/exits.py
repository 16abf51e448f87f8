"""Training side heads with the network: each is guided by labels, the teacher and the last exit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from understudy.data.batches import Batch
from understudy.heads.exits import ExitNetwork
from understudy.losses.logits import kl
from understudy.models.taps import EMBEDDING, Tap, Taps
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.exit_settings import ExitGuidance
from understudy.train.objective import Objective, StepOutput, label_loss, value_at
from understudy.train.settings import Schedule


class ExitHint(nn.Module):
    """Squared distance of a layer's features to the last layer's (Zhang et al. 2019, equation 4).

    Means over positions are compared, ``||adapter(F_i) - F_C||^2`` per picture; the last layer
    learns nothing from it. The adapters are trained with the network and never exported.

    Args:
        model: the plain network that the side heads are on.
        layers: of the side heads.
        adapters: one a layer, to the width of the network's embedding.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], adapters: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        self.layers = [Tap(name, "pooled") for name in layers]
        self.last = Tap(EMBEDDING, "pooled")
        self.taps = Taps(model, [*self.layers, self.last])

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Return the sum over the layers of the mean over the pictures."""
        target_ND = features[self.last.key].detach()
        distances = [
            (adapter(features[tap.key]) - target_ND).square().sum(dim=1).mean()
            for tap, adapter in zip(self.layers, self.adapters, strict=True)
        ]
        return torch.stack(distances).sum()


class _AllExits(nn.Module):
    """The network as the wrapped objective sees it; keeps what one forward pass gave."""

    def __init__(self, network: nn.Module, taps: Taps | None) -> None:
        super().__init__()
        self.network, self.taps = network, taps
        self.exits: list[Tensor] = []
        self.features: dict[str, Tensor] = {}

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if self.taps is None:
            return self._last(images_NCHW)
        logits_NK, self.features = self.taps.run(self._last, images_NCHW)
        return logits_NK

    def _last(self, images_NCHW: Tensor) -> Tensor:
        self.exits = self.network(images_NCHW, all_exits=True)
        return self.exits[-1]


class ExitObjective:
    """Another objective for the last exit, and guidance for the side heads, in one forward pass.

    Terms, each the sum over the side heads: ``exit_ce``, cross-entropy with the labels;
    ``exit_teacher`` and ``exit_last``, KL to the teacher and to the last exit with the factor T
    squared; ``exit_hint``. The network is an ``ExitNetwork``.

    Args:
        last: what the last exit minimises; any objective.
        guidance: weights and temperature of the side heads' losses.
        temperature: where the guidance has none of its own.
        label_smoothing: of the side heads' cross-entropy.
        teacher_share: factor on the weight of the teacher, as for the last exit.
        hint: compares features; None: they are not compared.
        hint_weight: of ``hint``.

    Attributes:
        networks: those that the wrapped objective trains beside this one, by role.
    """

    def __init__(
        self,
        last: Objective,
        guidance: ExitGuidance,
        *,
        temperature: float | Schedule = 4.0,
        label_smoothing: float = 0.0,
        teacher_share: float | Schedule = 1.0,
        hint: ExitHint | None = None,
        hint_weight: float | Schedule = 0.0,
    ) -> None:
        self.last, self.guidance, self.label_smoothing = last, guidance, label_smoothing
        self.temperature = temperature if guidance.temperature is None else guidance.temperature
        self.teacher_share, self.hint, self.hint_weight = teacher_share, hint, hint_weight
        self.parts: nn.Module = last.parts
        if hint is not None:
            self.parts = nn.ModuleDict({"last": last.parts, "exit_hint": hint})
        self.networks: Mapping[str, nn.Module] = getattr(last, "networks", {})

    def step(
        self, network: nn.Module, batch: Batch, teacher: TeacherOutputs | None, progress: float
    ) -> StepOutput:
        """Return the wrapped objective's terms and those of the side heads."""
        seen = _AllExits(network, None if self.hint is None else self.hint.taps)
        output = self.last.step(seen, batch, teacher, progress)
        assert seen.exits, "the wrapped objective did not run the network"
        *sides, last_NK = seen.exits
        temperature = value_at(self.temperature, progress)
        targets = {"exit_last": last_NK.detach()}
        if teacher is not None:
            targets["exit_teacher"] = teacher.logits_NK
        terms = dict(output.terms)
        if self.guidance.ce_weight != 0:
            terms["exit_ce"] = _summed(sides, lambda side_NK: self._label_loss(side_NK, batch))
        for name, target_NK in targets.items():
            if self._weights()[name] != 0:
                terms[name] = _summed(
                    sides,
                    lambda side_NK, target_NK=target_NK: kl(  # type: ignore[misc]
                        side_NK, target_NK, temperature=temperature
                    ),
                )
        if self.hint is not None:
            terms["exit_hint"] = self.hint(seen.features)
        return StepOutput(terms, output.logits_NK)

    def _label_loss(self, logits_NK: Tensor, batch: Batch) -> Tensor:
        return label_loss(logits_NK, batch, label_smoothing=self.label_smoothing)

    def _weights(self) -> dict[str, float | Schedule]:
        guidance = self.guidance
        return {
            "exit_ce": guidance.ce_weight,
            "exit_teacher": guidance.teacher_weight,
            "exit_last": guidance.last_weight,
            "exit_hint": self.hint_weight,
        }

    def weights(self, progress: float) -> dict[str, float | Tensor]:
        """Return the weight of every term."""
        own = {name: value_at(weight, progress) for name, weight in self._weights().items()}
        own["exit_teacher"] *= value_at(self.teacher_share, progress)
        return {**self.last.weights(progress), **own}

    def after_step(self, network: nn.Module) -> None:
        """Hand the plain network on."""
        self.last.after_step(network.model if isinstance(network, ExitNetwork) else network)

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Hand the numbers on."""
        self.last.after_validation(numbers, progress)


def _summed(sides: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sum of a loss over the side heads."""
    return torch.stack([loss(side_NK) for side_NK in sides]).sum()

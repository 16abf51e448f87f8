"""The losses of a recipe as modules: each with the adapters, variances or memory that it needs.

``build_terms`` makes them from the settings; ``loss_table.py`` names them without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from understudy import losses
from understudy.data.batches import Batch
from understudy.heads.adapters import Embedder, ReviewFusion, build_adapter, match_positions
from understudy.models.taps import Tap, as_kind, kind_shape
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.distill_settings import (
    DistillSettings,
    LayerPair,
    LossSettings,
    compared_kind,
    kept_kind,
    layers_of,
)
from understudy.train.loss_table import LOSSES

Shape = tuple[int, ...]
Arguments = Mapping[str, float]


class Seen(NamedTuple):
    """What a term may look at: both sides' outputs for one batch.

    ``features`` are the student's by ``Tap.key``; ``temperature`` is that of the distillation.
    """

    logits_NK: Tensor
    features: Mapping[str, Tensor]
    teacher: TeacherOutputs
    batch: Batch
    temperature: float


def _dkd(seen: Seen, arguments: Arguments) -> Tensor:
    return losses.dkd(seen.logits_NK, seen.teacher.logits_NK, seen.batch.labels_N, **arguments)


def _dist(seen: Seen, arguments: Arguments) -> Tensor:
    return losses.dist(seen.logits_NK, seen.teacher.logits_NK, **arguments)


def _standardized_kl(seen: Seen, arguments: Arguments) -> Tensor:
    return losses.standardized_kl(seen.logits_NK, seen.teacher.logits_NK, **arguments)


def _mse_logits(seen: Seen, arguments: Arguments) -> Tensor:
    return losses.mse_logits(seen.logits_NK, seen.teacher.logits_NK)


def _top_k_kl(seen: Seen, arguments: Arguments) -> Tensor:
    if seen.teacher.top_k is None:
        values_NK = seen.teacher.logits_NK
        classes_NK = torch.arange(values_NK.shape[1], device=values_NK.device).expand_as(values_NK)
    else:
        values_NK, classes_NK = seen.teacher.top_k
    return losses.top_k_kl(seen.logits_NK, values_NK, classes_NK, **arguments)


LOGIT_LOSSES: dict[str, Callable[[Seen, Arguments], Tensor]] = {
    "dkd": _dkd,
    "dist": _dist,
    "standardized_kl": _standardized_kl,
    "mse_logits": _mse_logits,
    "top_k_kl": _top_k_kl,
}
# Several layers: lists.
LAYER_LOSSES: dict[str, Callable[..., Tensor]] = {
    "hint": losses.hint,
    "attention_transfer": losses.attention_transfer,
    "nst": losses.nst,
    "embedding_alignment": losses.embedding_alignment,
    "salient_attention": losses.salient_attention,
}
# One layer, compared by how the samples of a batch relate: vectors.
RELATION_LOSSES: dict[str, Callable[..., Tensor]] = {
    "similarity_preserving": losses.similarity_preserving,
    "rkd": losses.rkd,
    "pkt": losses.pkt,
    "correlation_congruence": losses.correlation_congruence,
}


@dataclass(frozen=True)
class TermContext:
    """What terms are built for.

    Attributes:
        student_shapes: shapes without batch of the student's tapped layers, by layer name.
        teacher_shapes: the same of the teacher's.
        train_indices_N: sample numbers of the training split, ascending.
        train_labels_N: their labels.
        prior_KK: the teacher's mean soft distribution for each class; None where not needed.
    """

    student_shapes: Mapping[str, Shape]
    teacher_shapes: Mapping[str, Shape]
    train_indices_N: Tensor
    train_labels_N: Tensor
    prior_KK: Tensor | None = None


class LogitTerm(nn.Module):
    """A loss between logits."""

    def __init__(self, name: str, arguments: Mapping[str, float | None]) -> None:
        super().__init__()
        self.function, self.arguments = LOGIT_LOSSES[name], arguments

    def forward(self, seen: Seen) -> Tensor:
        return self.function(seen, _at(self.arguments, seen))


class PriorTerm(nn.Module):
    """The class-wise priors of the teacher, held as a table."""

    prior_KK: Tensor

    def __init__(self, prior_KK: Tensor, arguments: Mapping[str, float | None]) -> None:
        super().__init__()
        self.register_buffer("prior_KK", prior_KK)
        self.arguments = arguments

    def forward(self, seen: Seen) -> Tensor:
        arguments = _at(self.arguments, seen)
        return losses.class_prior(seen.logits_NK, self.prior_KK, seen.batch.labels_N, **arguments)


class FeatureTerm(nn.Module):
    """A loss between pairs of layers; the student's go through their adapters."""

    def __init__(self, name: str, settings: LossSettings, context: TermContext) -> None:
        super().__init__()
        self.name, self.kind = name, kept_kind(name, settings)
        self.compared = compared_kind(name, settings)
        self.pairs = layers_of(settings)
        self.arguments = {**LOSSES[name].arguments, **settings.arguments}
        self.adapters = nn.ModuleList(self._adapter(pair, settings, context) for pair in self.pairs)

    def _adapter(self, pair: LayerPair, settings: LossSettings, context: TermContext) -> nn.Module:
        shapes = [context.student_shapes[pair.student], context.teacher_shapes[pair.teacher]]
        if self.compared == "attention" or not LOSSES[self.name].equal_widths:
            return nn.Identity()
        shapes = [kind_shape(shape, self.kind) for shape in shapes]
        where = f"distillation.losses.{self.name}"
        return build_adapter(settings.adapter, shapes[0], shapes[1], where=where)

    def layers(self, seen: Seen) -> tuple[list[Tensor], list[Tensor]]:
        """Return the student's adapted layers and the teacher's, in equal resolutions."""
        students, teachers = [], []
        for pair, adapter in zip(self.pairs, self.adapters, strict=True):
            student = adapter(seen.features[Tap(pair.student, self.kind).key])
            teacher = seen.teacher.features[Tap(pair.teacher, self.kind).key]
            if self.compared != self.kind:
                student, teacher = (as_kind(x, self.compared) for x in (student, teacher))
            if self.compared != "pooled":
                student, teacher = match_positions(student, teacher, kind=self.compared)
            students.append(student)
            teachers.append(teacher)
        return students, teachers

    def forward(self, seen: Seen) -> Tensor:
        students, teachers = self.layers(seen)
        arguments = _at(self.arguments, seen)
        if self.name in RELATION_LOSSES:
            function = RELATION_LOSSES[self.name]
            return function(students[0].flatten(1), teachers[0].flatten(1), **arguments)
        return LAYER_LOSSES[self.name](students, teachers, **arguments)


class VidTerm(nn.Module):
    """Variational information distillation: a regressor and a variance for each layer."""

    def __init__(self, settings: LossSettings, context: TermContext) -> None:
        super().__init__()
        self.compared = FeatureTerm("vid", settings, context)
        self.variances = nn.ParameterList(
            losses.vid_variance(kind_shape(context.teacher_shapes[pair.teacher], "pooled")[0])
            for pair in layers_of(settings)
        )

    def forward(self, seen: Seen) -> Tensor:
        students, teachers = self.compared.layers(seen)
        return losses.vid(students, teachers, list(self.variances))


class ReviewTerm(nn.Module):
    """Knowledge review: layers are fused from deep to shallow before they are compared."""

    def __init__(self, settings: LossSettings, context: TermContext) -> None:
        super().__init__()
        self.pairs = layers_of(settings)
        arguments = {**LOSSES["review"].arguments, **settings.arguments}
        self.fusion = ReviewFusion(
            [context.student_shapes[pair.student] for pair in self.pairs],
            [context.teacher_shapes[pair.teacher] for pair in self.pairs],
            mid_channels=int(arguments["mid_channels"] or 0),
        )

    def forward(self, seen: Seen) -> Tensor:
        students = [seen.features[Tap(pair.student, "map").key] for pair in self.pairs]
        teachers = [seen.teacher.features[Tap(pair.teacher, "map").key] for pair in self.pairs]
        return losses.review(self.fusion(students), teachers)


class ContrastTerm(nn.Module):
    """Contrastive representation distillation: embeddings of both sides and a memory bank."""

    train_indices_N: Tensor

    def __init__(self, settings: LossSettings, context: TermContext) -> None:
        super().__init__()
        self.pair, self.kind = layers_of(settings)[0], kept_kind("crd", settings)
        arguments = {**LOSSES["crd"].arguments, **settings.arguments}
        size = int(arguments["embedding_size"] or 0)
        widths = [
            math.prod(kind_shape(context.student_shapes[self.pair.student], self.kind)),
            math.prod(kind_shape(context.teacher_shapes[self.pair.teacher], self.kind)),
        ]
        self.student_embedder, self.teacher_embedder = (Embedder(w, size) for w in widths)
        self.memory = losses.ContrastMemory(
            len(context.train_indices_N), size, num_negatives=int(arguments["num_negatives"] or 0)
        )
        self.register_buffer("train_indices_N", context.train_indices_N, persistent=False)

    def forward(self, seen: Seen) -> Tensor:
        student = seen.features[Tap(self.pair.student, self.kind).key]
        teacher = seen.teacher.features[Tap(self.pair.teacher, self.kind).key]
        positions_N = torch.searchsorted(self.train_indices_N, seen.batch.indices_N)
        student_ND = self.student_embedder(student.flatten(1))
        teacher_ND = self.teacher_embedder(teacher.flatten(1))
        return losses.crd(student_ND, teacher_ND, positions_N, self.memory)


def build_terms(settings: DistillSettings, context: TermContext) -> nn.ModuleDict:
    """Return one module for each further loss of the settings, initialised from torch's seed."""
    return nn.ModuleDict(
        {name: _build_term(name, loss, context) for name, loss in settings.losses.items()}
    )


def _build_term(name: str, settings: LossSettings, context: TermContext) -> nn.Module:
    arguments = {**LOSSES[name].arguments, **settings.arguments}
    if name == "class_prior":
        assert context.prior_KK is not None, "class_prior needs the teacher's table"
        return PriorTerm(context.prior_KK, arguments)
    if name in LOGIT_LOSSES:
        return LogitTerm(name, arguments)
    special = {"vid": VidTerm, "review": ReviewTerm, "crd": ContrastTerm}
    if name in special:
        term: nn.Module = special[name](settings, context)
        return term
    return FeatureTerm(name, settings, context)


def student_taps(settings: DistillSettings) -> list[Tap]:
    """Return the student's layers that the losses of the settings look at."""
    return _taps(settings, lambda pair: pair.student)


def teacher_taps(settings: DistillSettings) -> list[Tap]:
    """Return the teacher's layers that the losses of the settings look at."""
    return _taps(settings, lambda pair: pair.teacher)


def _taps(settings: DistillSettings, layer: Callable[[LayerPair], str]) -> list[Tap]:
    taps = [
        Tap(layer(pair), kept_kind(name, loss))
        for name, loss in settings.losses.items()
        if LOSSES[name].reads != "logits"
        for pair in layers_of(loss)
    ]
    return list(dict.fromkeys(taps))


def _at(arguments: Mapping[str, float | None], seen: Seen) -> dict[str, float]:
    """Fill in the temperature of the distillation where a loss has none of its own."""
    return {n: seen.temperature if v is None else v for n, v in arguments.items()}

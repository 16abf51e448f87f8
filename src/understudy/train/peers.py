"""Networks that learn beside the student in the same step: an online teacher, or peers.

Every network is taught by what the others answer to the same pictures, and no gradient flows into
an answer that teaches. The gradient of the summed loss with respect to one network is therefore
that of its own loss, and one step on the sum is a step of each network on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from understudy.data.batches import Batch
from understudy.losses.logits import kl
from understudy.teachers.outputs import TeacherOutputs
from understudy.train.distill_settings import DistillSettings
from understudy.train.distillation import recipe_weights
from understudy.train.objective import Objective, StepOutput, label_loss, value_at
from understudy.train.settings import Schedule

Precision = Literal["float32", "bfloat16"]


def run_beside(network: nn.Module, images_NCHW: Tensor, *, precision: Precision) -> Tensor:
    """Return float32 logits_NK of a network that Fabric knows nothing of.

    It gets the precision that Fabric gives the student: autocast for bfloat16.
    """
    autocast = torch.autocast(
        images_NCHW.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"
    )
    with autocast:
        logits_NK: Tensor = network(images_NCHW)
    return logits_NK.float()


class OnlineObjective:
    """Teacher and student learn together, the teacher from the labels, the student from both.

    "The teacher and the student models are updated simultaneously" (online distillation: Gou et
    al. 2021, "Knowledge distillation: a survey", section 3.2). With ``teacher_kl_weight`` the
    teacher listens to the student too, as peers do.

    Args:
        teacher: uint8 images_NCHW to logits_NK; trained.
        student: what the student minimises, given the teacher's outputs of this very step.
        temperature: of the teacher's ``teacher_kl``, a number or a schedule.
        teacher_kl_weight: how much the teacher learns from the student; its labels count 1.
        label_smoothing: of the teacher's cross-entropy.
        precision: that of the student.

    Attributes:
        networks: the teacher by its role.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: Objective,
        *,
        temperature: float | Schedule = 1.0,
        teacher_kl_weight: float | Schedule = 0.0,
        label_smoothing: float = 0.0,
        precision: Precision = "float32",
    ) -> None:
        self.teacher, self.student = teacher, student
        self.temperature, self.teacher_kl_weight = temperature, teacher_kl_weight
        self.label_smoothing, self.precision = label_smoothing, precision
        self.networks: Mapping[str, nn.Module] = {"teacher": teacher}
        self.parts: nn.Module = nn.ModuleDict({"teacher": teacher, "student": student.parts})

    def step(
        self, network: nn.Module, batch: Batch, teacher: TeacherOutputs | None, progress: float
    ) -> StepOutput:
        """Return the student's terms, ``teacher_ce``, and ``teacher_kl`` where it counts."""
        images_NCHW = batch.images_NCHW
        teacher_NK = run_beside(self.teacher, images_NCHW, precision=self.precision)
        output = self.student.step(network, batch, TeacherOutputs(teacher_NK.detach()), progress)
        terms = dict(output.terms)
        terms["teacher_ce"] = label_loss(teacher_NK, batch, label_smoothing=self.label_smoothing)
        if self.teacher_kl_weight != 0:
            temperature = value_at(self.temperature, progress)
            student_NK = output.logits_NK.detach()
            terms["teacher_kl"] = kl(teacher_NK, student_NK, temperature=temperature)
        return StepOutput(terms, output.logits_NK)

    def weights(self, progress: float) -> dict[str, float | Tensor]:
        """Return the student's weights and the teacher's."""
        own = {"teacher_ce": 1.0, "teacher_kl": value_at(self.teacher_kl_weight, progress)}
        return {**self.student.weights(progress), **own}

    def after_step(self, network: nn.Module) -> None:
        """Let the student's objective know."""
        self.student.after_step(network)

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Let the student's objective know."""
        self.student.after_validation(numbers, progress)


class MutualObjective:
    """Deep mutual learning (Zhang et al. 2018, "Deep Mutual Learning", equations 6 to 9).

    Network k of K minimises its cross-entropy and the mean over the others of
    ``KL(p_l || p_k)``; the paper weighs both 1 and has temperature 1. All step together on the
    answers of one pass, where the paper's algorithm 1 lets them step in turn.

    Args:
        peers: the networks besides the student's: uint8 images_NCHW to logits_NK; trained.
        settings: weights, temperature and schedules, the same for every network.
        label_smoothing: of the cross-entropies.
        precision: that of the student.

    Attributes:
        networks: the peers by role: "peer-1" and so on.
    """

    def __init__(
        self,
        peers: Sequence[nn.Module],
        settings: DistillSettings,
        *,
        label_smoothing: float = 0.0,
        precision: Precision = "float32",
    ) -> None:
        self.settings, self.label_smoothing, self.precision = settings, label_smoothing, precision
        self.networks: Mapping[str, nn.Module] = {
            f"peer-{number}": peer for number, peer in enumerate(peers, start=1)
        }
        self.parts: nn.Module = nn.ModuleDict(self.networks)

    def step(
        self, network: nn.Module, batch: Batch, teacher: TeacherOutputs | None, progress: float
    ) -> StepOutput:
        """Return ``kl`` and ``ce`` of the student, ``peer1_kl`` and ``peer1_ce``, and so on."""
        settings, images_NCHW = self.settings, batch.images_NCHW
        logits = {"": network(images_NCHW)}
        for role, peer in self.networks.items():
            answer_NK = run_beside(peer, images_NCHW, precision=self.precision)
            logits[prefix_of(role)] = answer_NK
        temperature = value_at(settings.temperature, progress)
        terms: dict[str, Tensor] = {}
        for prefix, own_NK in logits.items():
            if settings.kl_weight != 0:
                others = [answer.detach() for name, answer in logits.items() if name != prefix]
                distances = [kl(own_NK, other_NK, temperature=temperature) for other_NK in others]
                terms[f"{prefix}kl"] = torch.stack(distances).mean()
            if settings.ce_weight != 0 or settings.teacher_share != 1:
                loss = label_loss(own_NK, batch, label_smoothing=self.label_smoothing)
                terms[f"{prefix}ce"] = loss
        return StepOutput(terms, logits[""])

    def weights(self, progress: float) -> dict[str, float | Tensor]:
        """Return the weights of the recipe, for every network alike."""
        weights = recipe_weights(self.settings, progress)
        prefixes = ["", *map(prefix_of, self.networks)]
        return {prefix + name: value for prefix in prefixes for name, value in weights.items()}

    def after_step(self, network: nn.Module) -> None:
        """Nothing is remembered."""

    def after_validation(self, numbers: dict[str, float], progress: float) -> None:
        """Nothing is adjusted."""


def prefix_of(role: str) -> str:
    """Return what stands before the terms of a network beside the student: ``peer1_``."""
    return role.replace("-", "") + "_"

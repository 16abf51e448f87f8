"""The ways of passing knowledge on, as recipes name them. Importing this does not import torch.

Each section says what it asks of the rest of the recipe in ``problems``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from understudy.recipes.sections import ModelSection, TeacherSection
from understudy.settings import Section
from understudy.train.distill_settings import DistillSettings
from understudy.train.loss_table import LOSSES
from understudy.train.settings import Temperature, Weight


class StrategySection(Section):
    """What all strategies have: whether there is a teacher, and from where its outputs come.

    Attributes:
        teacher_is: what the recipe must say of a teacher.
        stored: the teacher's outputs are computed once and stored.
        is_chain: runs as several steps, each with a teacher of its own.
    """

    teacher_is: ClassVar[Literal["needed", "optional", "none"]] = "needed"
    stored: ClassVar[bool] = True
    is_chain: ClassVar[bool] = False
    name: str

    def problems(
        self, teacher: TeacherSection | None, distillation: DistillSettings
    ) -> Iterator[str]:
        """Yield what does not fit this strategy in the rest of the recipe."""
        if teacher is None and self.teacher_is == "needed":
            yield f"strategy {self.name} needs a teacher section"
        if teacher is not None and self.teacher_is == "none":
            yield f"strategy {self.name} has no teacher: drop the teacher section"
        if teacher is not None and not teacher.has_weights and self.name != "online":
            yield (
                "teacher: give its weights (--set teacher.checkpoint=FILE), or training to train it"
            )


class Offline(StrategySection):
    """One trained teacher, whose outputs are computed once and stored."""

    name: Literal["offline"] = "offline"


class Ensemble(StrategySection):
    """Several trained teachers, `teacher` being the first, combined into one."""

    name: Literal["ensemble"] = "ensemble"
    teachers: Annotated[
        tuple[TeacherSection, ...], Field(min_length=1, description="The teachers besides it.")
    ]
    combine: Annotated[
        Literal["mean", "validation", "confidence"],
        Field(
            description="Equal weights; by accuracy on the validation split; or for each sample "
            "by how sure and right a teacher is."
        ),
    ] = "mean"

    def problems(
        self, teacher: TeacherSection | None, distillation: DistillSettings
    ) -> Iterator[str]:
        """Every teacher has weights."""
        yield from super().problems(teacher, distillation)
        for position, other in enumerate(self.teachers):
            if not other.has_weights:
                place = f"strategy.teachers.{position}"
                yield (
                    f"{place}: give its weights (--set {place}.checkpoint=FILE), or training to "
                    "train it"
                )


class Online(StrategySection):
    """Teacher and student are trained together, in one step and with `training`.

    Both start from their first weights; a teacher with a checkpoint goes on from there.
    """

    teacher_is: ClassVar[Literal["needed", "optional", "none"]] = "needed"
    stored: ClassVar[bool] = False
    name: Literal["online"] = "online"
    teacher_kl_weight: Annotated[
        Weight, Field(description="How much the teacher learns from the student; 0: not at all.")
    ] = 0.0

    def problems(
        self, teacher: TeacherSection | None, distillation: DistillSettings
    ) -> Iterator[str]:
        """The teacher must be one that can be trained, by the one training section there is."""
        yield from super().problems(teacher, distillation)
        if teacher is not None and teacher.training is not None:
            yield "strategy online trains the teacher as `training` says: drop teacher.training"
        if teacher is not None and teacher.model.name.endswith(".onnx"):
            yield "strategy online trains the teacher, which an .onnx file cannot be"


class Mutual(StrategySection):
    """Peers that teach each other (Zhang et al. 2018, deep mutual learning).

    All of them learn with the weights and temperature of `distillation` (the paper has 1, 1 and 1)
    and as `training` says; the student is the one that is kept, evaluated and exported.
    """

    teacher_is: ClassVar[Literal["needed", "optional", "none"]] = "none"
    stored: ClassVar[bool] = False
    name: Literal["mutual"] = "mutual"
    peers: Annotated[
        tuple[ModelSection, ...],
        Field(description="Their networks; empty: one peer of the student's own kind."),
    ] = ()

    def problems(
        self, teacher: TeacherSection | None, distillation: DistillSettings
    ) -> Iterator[str]:
        """Peers must be networks that can be trained."""
        yield from super().problems(teacher, distillation)
        for number, peer in enumerate(self.peers, start=1):
            if peer.name.endswith(".onnx"):
                yield f"strategy mutual trains peer {number}, which an .onnx file cannot be"


class EmaTeacher(StrategySection):
    """The student's own moving average teaches it (Tarvainen and Valpola 2017, mean teacher).

    The student itself is kept. `training.ema_decay` of the same value keeps the average, and the
    control's as well.
    """

    teacher_is: ClassVar[Literal["needed", "optional", "none"]] = "none"
    stored: ClassVar[bool] = False
    name: Literal["ema_teacher"] = "ema_teacher"
    decay: Annotated[
        float, Field(gt=0, lt=1, description="Share of the average that stays at an update.")
    ] = 0.999


class DeepToShallow(StrategySection):
    """The last exit of one network teaches its shallower ones (Zhang et al. 2019).

    Every side head minimises (1 - `guidance_weight`) cross-entropy + `guidance_weight` KL to the
    last exit + `hint_weight` times the squared distance of its features to the last layer's; the
    last exit cross-entropy. The heads are dropped afterwards unless the recipe has `exits`.
    """

    teacher_is: ClassVar[Literal["needed", "optional", "none"]] = "none"
    stored: ClassVar[bool] = False
    name: Literal["deep_to_shallow"] = "deep_to_shallow"
    layers: Annotated[
        tuple[str, ...], Field(min_length=1, description="Layers that get a side head.")
    ]
    head_channels: Annotated[
        int | None,
        Field(gt=0, description="Of a 1x1 convolution in each side head; null: none."),
    ] = None
    guidance_weight: Annotated[
        float, Field(ge=0, le=1, description="Of the last exit, against the labels.")
    ] = 0.3
    temperature: Annotated[Temperature, Field(description="Of the KL to the last exit.")] = 3.0
    hint_weight: Annotated[
        Weight, Field(description="Of the features' distance to the last layer's.")
    ] = 0.03


class BornAgain(StrategySection):
    """Generations of the student's network, each taught by the one before (Furlanello et al. 2018).

    The first generation learns from `teacher` if there is one, otherwise from labels; every one
    has first weights of its own. The control has the updates of one generation.
    """

    teacher_is: ClassVar[Literal["needed", "optional", "none"]] = "optional"
    is_chain: ClassVar[bool] = True
    name: Literal["born_again"] = "born_again"
    num_generations: Annotated[
        int, Field(gt=0, description="Generations that are taught by an earlier one.")
    ] = 1


class Progressive(StrategySection):
    """A chain of teacher, assistants and student (Mirzadeh et al. 2020).

    Each is trained as `training` says; the control has the updates of the student alone.
    """

    is_chain: ClassVar[bool] = True
    name: Literal["progressive"] = "progressive"
    assistants: Annotated[
        tuple[ModelSection, ...],
        Field(description="From large to small; empty: proposed from the capacity gap."),
    ] = ()
    num_assistants: Annotated[
        int | None,
        Field(
            gt=0,
            description="How many to propose; null: as few as keep each step within a factor of "
            "10 in parameters.",
        ),
    ] = None

    def problems(
        self, teacher: TeacherSection | None, distillation: DistillSettings
    ) -> Iterator[str]:
        """Assistants are given or proposed, not both."""
        yield from super().problems(teacher, distillation)
        if self.assistants and self.num_assistants not in (None, len(self.assistants)):
            yield (
                f"strategy progressive names {len(self.assistants)} assistants and asks for "
                f"{self.num_assistants}: drop num_assistants"
            )


class LabelFree(StrategySection):
    """Soft targets only, on pictures that need no labels (`data.unlabelled`).

    The control, which has nothing else, learns from the labelled pictures with as many updates.
    """

    name: Literal["label_free"] = "label_free"

    def problems(
        self, teacher: TeacherSection | None, distillation: DistillSettings
    ) -> Iterator[str]:
        """Labels must not count."""
        yield from super().problems(teacher, distillation)
        if distillation.ce_weight != 0 or distillation.teacher_share != 1:
            yield "strategy label_free uses no labels: set distillation.ce_weight to 0"
        for name in label_users(distillation, uses_none=True):
            yield f"strategy label_free uses no labels, which {name} needs: drop it"


def label_users(distillation: DistillSettings, *, uses_none: bool) -> list[str]:
    """Return what in the settings needs the label of every training picture.

    With ``uses_none`` also what takes the teacher's answer for a label that is not there.
    """
    found = [f"distillation.losses.{n}" for n in distillation.losses if LOSSES[n].needs_labels]
    curriculum = distillation.curriculum
    refused = ("student_loss", "margin", "loss") if uses_none else ("student_loss",)
    if curriculum is not None and curriculum.difficulty in refused:
        found.append(f"distillation.curriculum.difficulty {curriculum.difficulty}")
    return found


STRATEGIES: dict[str, type[StrategySection]] = {
    "offline": Offline,
    "ensemble": Ensemble,
    "online": Online,
    "mutual": Mutual,
    "ema_teacher": EmaTeacher,
    "deep_to_shallow": DeepToShallow,
    "born_again": BornAgain,
    "progressive": Progressive,
    "label_free": LabelFree,
}


def _strategy_name(value: Any) -> Any:
    """Tell pydantic which section is meant; without a name it is the first."""
    if isinstance(value, dict):
        return value.get("name", "offline")
    return getattr(value, "name", None)


Strategy = Annotated[
    Annotated[Offline, Tag("offline")]
    | Annotated[Ensemble, Tag("ensemble")]
    | Annotated[Online, Tag("online")]
    | Annotated[Mutual, Tag("mutual")]
    | Annotated[EmaTeacher, Tag("ema_teacher")]
    | Annotated[DeepToShallow, Tag("deep_to_shallow")]
    | Annotated[BornAgain, Tag("born_again")]
    | Annotated[Progressive, Tag("progressive")]
    | Annotated[LabelFree, Tag("label_free")],
    Discriminator(_strategy_name),
]

"""What a recipe says of further tasks on the student's embedding. Does not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from understudy.settings import Section
from understudy.train.distill_settings import Balance, DistillSettings
from understudy.train.loss_table import LOSSES
from understudy.train.settings import Optimizer, Temperature, TrainSettings, Weight

# The head that the student was trained with.
OWN_TASK = "classes"

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class HeadOptimizer(Optimizer):
    """The optimiser of a head, with defaults for standardised embeddings."""

    name: Literal["sgd", "adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 0.01
    weight_decay: Annotated[float, Field(ge=0, description="Not applied to biases.")] = 0.01


class HeadTraining(TrainSettings):
    """How a head is trained: as any network, with defaults of its own."""

    num_epochs: Annotated[int, Field(gt=0)] = 20
    batch_size: Annotated[int, Field(gt=0, description="Samples an update.")] = 256
    optimizer: HeadOptimizer = HeadOptimizer()
    checkpoint_every_epochs: Annotated[int, Field(gt=0)] = 5

    @model_validator(mode="after")
    def _every_view_comes_again(self) -> HeadTraining:
        if self.last_views is not None:
            raise ValueError("a head sees its views in turn: drop last_views")
        return self


class HeadGuidance(DistillSettings):
    """How the probe on the teacher's embedding guides a head; losses on logits only."""

    kl_weight: Annotated[Weight, Field(description="A number or a schedule.")] = 0.5
    ce_weight: Annotated[Weight, Field(description="A number or a schedule.")] = 0.5
    temperature: Annotated[Temperature, Field(description="A number or a schedule.")] = 2.0


class HeadSettings(Section):
    """A head for one more task. The student's weights stay as they are."""

    label_column: Annotated[
        str, Field(description="Column of the data with the task's labels, text or whole numbers.")
    ]
    hidden: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...],
        Field(description="Widths of hidden layers; empty: a linear head."),
    ] = ()
    num_views: Annotated[
        int, Field(gt=0, description="Views of the training split that the head sees, in turn.")
    ] = 2
    training: HeadTraining = HeadTraining()
    teacher: Annotated[
        bool,
        Field(
            description="Train a linear probe on the teacher's embedding first, whose soft targets "
            "guide the head; the same head without them is trained for comparison."
        ),
    ] = False
    probe: Annotated[
        HeadTraining, Field(description="Training of the probe on the teacher's embedding.")
    ] = HeadTraining()
    distillation: HeadGuidance = HeadGuidance()

    @model_validator(mode="after")
    def _only_logits_are_shared(self) -> HeadSettings:
        settings = self.distillation
        problems = [
            f"losses.{name} is not for heads: only losses on logits are"
            for name in settings.losses
            if LOSSES[name].reads != "logits" or name == "class_prior"
        ]
        if settings.curriculum is not None:
            problems.append("curriculum is not for heads")
        if settings.balance != Balance():
            problems.append("balance is not for heads")
        if problems:
            raise ValueError("distillation: " + "; ".join(problems))
        return self


def check_task_names(names: list[str]) -> list[str]:
    """Return what is wrong with the names of the tasks."""
    if OWN_TASK in names:
        return [f"heads.{OWN_TASK} is the name of the student's own head: choose another"]
    return []

"""How side heads are taught. Importing this module does not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from understudy.settings import Section
from understudy.train.settings import Schedule, Temperature, Weight


class ExitGuidance(Section):
    """The losses of every side head; what the last exit learns from stays as it is."""

    ce_weight: Annotated[Weight, Field(description="Of cross-entropy with the labels.")] = 0.2
    teacher_weight: Annotated[
        Weight,
        Field(
            description="Of KL to the trained teacher; where there is none, as with strategy "
            "`online`, it does not count."
        ),
    ] = 0.5
    last_weight: Annotated[
        Weight, Field(description="Of KL to the last exit, which learns nothing from it.")
    ] = 0.3
    temperature: Annotated[
        Temperature | None, Field(description="Of both KL; null: that of the distillation.")
    ] = None

    @model_validator(mode="after")
    def _something_to_learn(self) -> ExitGuidance:
        weights = (self.ce_weight, self.teacher_weight, self.last_weight)
        if not any(isinstance(weight, Schedule) or weight > 0 for weight in weights):
            raise ValueError("ce_weight, teacher_weight and last_weight are all 0")
        return self

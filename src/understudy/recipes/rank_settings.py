"""How candidate teachers are compared. Importing this module does not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from understudy.settings import Section

# The folders of the probes without a teacher are named so.
CONTROL_NAME = "control"


def _no_reserved_name(name: str) -> str:
    if name == CONTROL_NAME:
        raise ValueError(f"`{CONTROL_NAME}` is the student without a teacher: choose another name")
    return name


CandidateName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), AfterValidator(_no_reserved_name)
]


class ProbeSection(Section):
    """The short student trainings by which `understudy teachers rank` compares teachers.

    Every candidate's student, and one without a teacher, has the same first weights, samples, views
    and number of updates.
    """

    num_epochs: Annotated[int, Field(gt=0)] = 3
    num_samples: Annotated[
        int | None, Field(gt=0, description="Training samples; null: as `fraction` says.")
    ] = None
    fraction: Annotated[
        float | None, Field(gt=0, le=1, description="Part of the training split; null: all of it.")
    ] = None
    num_seeds: Annotated[
        int,
        Field(gt=0, description="Trainings of each student; with one, chance cannot be told."),
    ] = 3

    @model_validator(mode="after")
    def _one_size(self) -> ProbeSection:
        if self.num_samples is not None and self.fraction is not None:
            raise ValueError("give num_samples or fraction, not both")
        return self

    def num_of(self, num_available: int) -> int | None:
        """Return the number of training samples, None for all that there are."""
        if self.fraction is not None:
            return max(1, round(self.fraction * num_available))
        return self.num_samples

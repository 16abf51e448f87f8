"""What is shipped, and where it is to run. Importing this does not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from understudy.export.target_names import TARGETS
from understudy.settings import Section


class ReleaseSection(Section):
    """The files that ship; each is proved and measured in the runtime that runs it."""

    targets: Annotated[
        tuple[str, ...],
        Field(
            min_length=1,
            description="Each a target, or TARGET/PRECISION with `float32` or `int8`; "
            "without a precision that of the compressed student.",
        ),
    ] = ("onnx",)
    device: Annotated[
        str | None,
        Field(description="A device profile, by name or file: it fills the budget's limits."),
    ] = None
    strict: Annotated[
        bool, Field(description="A limit that was not measured counts as missed.")
    ] = True
    min_agreement: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Least share of test pictures that an int8 file answers as its network.",
        ),
    ] = 0.95
    licence: Annotated[str, Field(description="Of the package, for its model card.")] = "not stated"
    intended_use: Annotated[str, Field(description="For the model card.")] = ""

    @field_validator("targets")
    @classmethod
    def _targets_are_known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for text in targets:
            name, slash, precision = text.partition("/")
            if name not in TARGETS:
                raise ValueError(f"no target '{name}': expected one of {', '.join(TARGETS)}")
            if slash and precision not in ("float32", "int8"):
                raise ValueError(f"no precision '{precision}': expected float32 or int8")
        if len(set(targets)) != len(targets):
            raise ValueError("a target is named twice")
        return targets

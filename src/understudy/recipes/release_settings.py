"""What is shipped, and where it is to run. Importing this does not import torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, field_validator

from understudy.errors import InputError
from understudy.evaluate.devices import load_device
from understudy.export.target_names import FLOAT_TARGETS, TARGETS
from understudy.settings import Section


def release_changes(targets: Sequence[str] | None, device: str | None) -> list[str]:
    """Return what the options of `understudy release` change in a recipe.

    A device without targets is released for in its own runtime and precision.
    """
    changes = []
    if device is not None:
        profile = load_device(device)
        targets = targets or [f"{profile.runtime}/{profile.precision}"]
        changes.append(f"release.device={json.dumps(device)}")
    if targets:
        changes.append(f"release.targets={json.dumps(list(targets))}")
    return changes


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
            if name in FLOAT_TARGETS and precision == "int8":
                raise ValueError(f"the target {name} cannot be int8: expected {name}/float32")
        if len(set(targets)) != len(targets):
            raise ValueError("a target is named twice")
        return targets

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str | None) -> str | None:
        if device is not None:
            try:
                load_device(device)
            except InputError as error:
                raise ValueError("; ".join(error.problems)) from None
        return device

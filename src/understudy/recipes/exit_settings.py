"""What a recipe says about early exits. Importing this does not import torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from understudy.settings import MAX_THREADS, Section
from understudy.train.exit_settings import ExitGuidance


class ExitPolicySection(Section):
    """When a picture leaves: thresholds on confidence, chosen on the validation split."""

    target: Annotated[
        Literal["accuracy_drop", "mean_macs", "mean_latency_ms"],
        Field(
            description="The cheapest policy within a drop of accuracy below the last exit's "
            "(0.005 is half a point); or the most accurate within mean multiply-adds, or within a "
            "mean time as measured here, a picture."
        ),
    ] = "accuracy_drop"
    at_most: Annotated[float, Field(ge=0, description="Of the target.")] = 0.005
    temperature_scaling: Annotated[
        bool, Field(description="Calibrate each exit's confidence first (Guo et al. 2017).")
    ] = True
    num_threads: Annotated[
        int, Field(gt=0, le=MAX_THREADS, description="Of the measured times.")
    ] = 1

    @model_validator(mode="after")
    def _target_makes_sense(self) -> ExitPolicySection:
        if self.target == "accuracy_drop" and self.at_most >= 1:
            raise ValueError(
                f"a drop of accuracy of {self.at_most:g} allows everything: it is a share, 0.005 "
                "is half a point"
            )
        return self


class ExitsSection(Section):
    """Side heads at which easy pictures leave the student early."""

    layers: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="Module paths of the student, each with a side head."),
    ]
    head_channels: Annotated[
        int | None,
        Field(gt=0, description="Of a 1x1 convolution in each side head; null: none."),
    ] = None
    guidance: Annotated[
        ExitGuidance,
        Field(description="Losses of the side heads; strategy `deep_to_shallow` has its own."),
    ] = ExitGuidance()
    policy: ExitPolicySection = ExitPolicySection()

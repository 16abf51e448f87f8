"""How a trained student is made smaller, and how much each step may lose.

Importing this module does not import torch: recipes are validated with it before anything runs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, model_validator

from understudy.settings import Section
from understudy.train.settings import TrainSettings

Share = Annotated[float, Field(ge=0, le=1)]
Guidance = Annotated[
    Literal["teacher", "labels"] | None,
    Field(description="Train as the student was, or on labels alone; null: with the teacher."),
]


class Gates(Section):
    """The most that one step may lose on the validation split, against what went into it."""

    accuracy_drop: Annotated[
        Share | None, Field(description="Of the accuracy; null: not checked, as for the others.")
    ] = 0.01
    worst_class_drop: Annotated[
        Share | None, Field(description="Of the accuracy of the worst class.")
    ] = 0.05
    agreement_drop: Annotated[
        Share | None, Field(description="Of the share of pictures answered as the teacher does.")
    ] = 0.02
    ece_rise: Annotated[Share | None, Field(description="Of the expected calibration error.")] = (
        0.03
    )
    budget: Annotated[
        bool, Field(description="Whether a limit of the budget that was kept may not be broken.")
    ] = True


class PruneStep(Section):
    """Structured pruning: whole channels, until every limit that is given holds."""

    name: Literal["prune"]
    num_params: Annotated[int | None, Field(gt=0, description="At most so many parameters.")] = None
    num_macs: Annotated[
        int | None, Field(gt=0, description="At most so many multiply-adds a picture.")
    ] = None
    latency_ms: Annotated[
        float | None,
        Field(gt=0, description="At most so long a picture in ONNX Runtime with one thread."),
    ] = None
    importance: Annotated[
        Literal["l1", "batch_norm", "taylor"],
        Field(description="Weights, batch-norm scales, or first-order effect on the loss."),
    ] = "l1"
    scope: Annotated[
        Literal["global", "layer"], Field(description="Compared over the network, or in a layer.")
    ] = "global"
    num_rounds: Annotated[int, Field(gt=0, description="Rounds of pruning and fine-tuning.")] = 1
    round_to: Annotated[
        int, Field(gt=0, description="Channel counts are multiples of this; 8 is quick on CPUs.")
    ] = 1
    guidance: Guidance = None
    training: Annotated[
        TrainSettings | None, Field(description="Fine-tuning after each round; null: none.")
    ] = None
    gates: Annotated[Gates | None, Field(description="null: those of the section.")] = None

    @model_validator(mode="after")
    def _has_a_goal(self) -> PruneStep:
        if self.num_params is None and self.num_macs is None and self.latency_ms is None:
            raise ValueError("give num_params, num_macs or latency_ms: pruning stops at a limit")
        return self


class QuantizeStep(Section):
    """Eight-bit weights and activations: after training, or learnt in further training."""

    name: Literal["quantize"]
    method: Annotated[
        Literal["static", "aware"],
        Field(description="Calibrated after training, or quantisation-aware training."),
    ] = "static"
    guidance: Guidance = None
    training: Annotated[
        TrainSettings | None, Field(description="The quantisation-aware training.")
    ] = None
    float_layers: Annotated[
        tuple[str, ...],
        Field(description="Layers, or modules that hold some, that stay in float: their names."),
    ] = ()
    max_float_layers: Annotated[
        int,
        Field(
            ge=0,
            description="Of method static: so many more of the worst layers may stay in float if a "
            "gate asks; above 0 the report lists what every layer loses alone.",
        ),
    ] = 0
    gates: Annotated[Gates | None, Field(description="null: those of the section.")] = None

    @model_validator(mode="after")
    def _training_belongs_to_aware(self) -> QuantizeStep:
        if (self.method == "aware") != (self.training is not None):
            raise ValueError("`training` belongs to method `aware`, which needs it")
        if self.method == "aware" and self.max_float_layers:
            raise ValueError(
                "`max_float_layers` belongs to method `static`; name `float_layers` for `aware`"
            )
        return self


Step = Annotated[PruneStep | QuantizeStep, Discriminator("name")]
STEPS: dict[str, type[Section]] = {"prune": PruneStep, "quantize": QuantizeStep}


class CompressionSection(Section):
    """How the student is made smaller; a step that loses more than its gates is taken back."""

    steps: Annotated[tuple[Step, ...], Field(description="In this order.")] = ()
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _quantized_last(self) -> CompressionSection:
        if any(step.name == "quantize" for step in self.steps[:-1]):
            raise ValueError("quantize is the last step, and there is one at most")
        return self

    @property
    def quantizes(self) -> bool:
        """Whether the last step makes the student int8."""
        return bool(self.steps) and self.steps[-1].name == "quantize"

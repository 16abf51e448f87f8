"""What the training loop can be told: one frozen description, the same in recipes and in Python.

Importing this module does not import torch: recipes are validated with it before anything runs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from understudy.settings import Section

Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(Section):
    """A weight or temperature that moves from ``start`` to ``end`` over training."""

    start: Annotated[float, Field(ge=0, description="Value at the first update.")]
    end: Annotated[float, Field(ge=0, description="Value at the last update.")]
    shape: Annotated[
        Literal["linear", "cosine", "step"], Field(description="How the value moves.")
    ] = "linear"
    steps: Annotated[
        tuple[Share, ...],
        Field(description="For `step`: shares of training at which the value moves."),
    ] = ()

    @model_validator(mode="after")
    def _steps_fit_shape(self) -> Schedule:
        if (self.shape == "step") != bool(self.steps):
            raise ValueError("`steps` belongs to shape `step`, which needs at least one")
        return self


def _number_or_schedule(value: Any) -> str:
    """Tell pydantic which of the two was meant, so that only its errors are reported."""
    return "schedule" if isinstance(value, dict | Schedule) else "number"


def _above_zero(value: float | Schedule) -> float | Schedule:
    """Logits are divided by a temperature, at its end too."""
    if isinstance(value, Schedule) and min(value.start, value.end) == 0:
        raise ValueError("a temperature must stay above 0")
    return value


Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[Schedule, Tag("schedule")],
    Discriminator(_number_or_schedule),
]
Temperature = Annotated[
    Annotated[float, Field(gt=0), Tag("number")] | Annotated[Schedule, Tag("schedule")],
    Discriminator(_number_or_schedule),
    AfterValidator(_above_zero),
]


class Optimizer(Section):
    """The optimiser. SGD is with Nesterov momentum; AdamW is Loshchilov and Hutter 2019.

    Muon (Jordan et al. 2024) makes the updates of weight matrices orthogonal; norms, biases,
    depthwise kernels and the classifier move by SGD with the same momentum.
    """

    name: Literal["sgd", "adamw", "muon"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1, description="SGD, Muon: momentum.")] = 0.9
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(description="AdamW: decay of the two moments."),
    ] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0, description="Not applied to biases and norms.")] = (
        5e-4
    )
    matrix_learning_rate: Annotated[
        float, Field(gt=0, description="Muon: peak learning rate of the weight matrices.")
    ] = 0.05
    matrix_weight_decay: Annotated[
        float, Field(ge=0, description="Muon: decoupled weight decay of the weight matrices.")
    ] = 0.05


class LearningRate(Section):
    """How the learning rate moves over the updates."""

    shape: Literal["cosine", "one_cycle", "linear", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0, description="Epochs of linear warm-up.")] = 0.0
    final_factor: Annotated[
        float, Field(ge=0, le=1, description="Last learning rate over the peak.")
    ] = 0.0


class LastViews(Section):
    """Views kept for the end: the epochs before show only the others."""

    num_epochs: Annotated[int, Field(gt=0, description="Last epochs that show them.")]
    num_views: Annotated[int, Field(gt=0, description="How many, counted from the last.")]


class TrainSettings(Section):
    """Everything the loop needs to know besides network, data and losses."""

    num_epochs: Annotated[int, Field(gt=0)] = 30
    batch_size: Annotated[
        int, Field(gt=0, description="Samples an update, over all processes and micro-batches.")
    ] = 128
    optimizer: Optimizer = Optimizer()
    learning_rate_schedule: LearningRate = LearningRate()
    num_micro_batches: Annotated[
        int, Field(gt=0, description="Gradient accumulation: parts a batch is cut into.")
    ] = 1
    clip_norm: Annotated[
        float | None, Field(gt=0, description="Largest gradient norm; null: no clipping.")
    ] = None
    ema_decay: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Exponential moving average of the weights; null: none."),
    ] = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    last_views: Annotated[
        LastViews | None,
        Field(
            description="Views for the last epochs alone, for instance unmixed ones; null: every "
            "view comes again and again. Of a student only: teachers and heads refuse it.",
            exclude_if=lambda value: value is None,  # so that older trainings keep their keys
        ),
    ] = None
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="bfloat16: autocast.")
    ] = "float32"
    channels_last: bool = True
    compile: Annotated[bool, Field(description="torch.compile the network.")] = False
    keep: Annotated[
        Literal["last", "best"],
        Field(description="Weights kept: of the last epoch, or of the best validation accuracy."),
    ] = "last"
    validate_every_epochs: Annotated[int, Field(gt=0)] = 1
    checkpoint_every_epochs: Annotated[int, Field(gt=0)] = 1
    checkpoint_every_steps: Annotated[
        int | None, Field(gt=0, description="Checkpoints within an epoch too; null: none.")
    ] = None
    max_rollbacks: Annotated[
        int, Field(ge=0, description="Rollbacks after a non-finite loss before giving up.")
    ] = 3
    rollback_factor: Annotated[
        float, Field(gt=0, le=1, description="Learning-rate factor of each rollback.")
    ] = 0.5

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainSettings:
        if self.batch_size % self.num_micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of num_micro_batches "
                f"{self.num_micro_batches}"
            )
        if self.learning_rate_schedule.warmup_epochs >= self.num_epochs:
            raise ValueError("warmup_epochs must be less than num_epochs")
        if self.last_views is not None and self.last_views.num_epochs > self.num_epochs:
            raise ValueError(
                f"last_views.num_epochs is {self.last_views.num_epochs}, more than num_epochs "
                f"{self.num_epochs}: lower it"
            )
        return self

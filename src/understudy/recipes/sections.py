"""The sections that say what data and networks are. Importing this does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from understudy.settings import Section
from understudy.train.settings import TrainSettings

Fraction = Annotated[float, Field(ge=0, lt=1)]


class DataSection(Section):
    """Where the pictures come from and how they are split."""

    source: Annotated[
        str,
        Field(
            description="`digits`, a Parquet or Arrow file or a folder of them "
            "(`train*.parquet`, `test*.parquet`), an image folder (`CLASS/*.png` or "
            "`train/CLASS/*.png`), a `save_to_disk` folder, or the name of a data set on the "
            "Hugging Face hub."
        ),
    ] = "digits"
    splits: Annotated[
        dict[Literal["train", "validation", "test"], str] | None,
        Field(description="The source's own names of its parts; null: recognised by name."),
    ] = None
    image_column: Annotated[str | None, Field(description="null: found by its type.")] = None
    label_column: Annotated[str | None, Field(description="null: found by type and name.")] = None
    image_size: Annotated[
        tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None,
        Field(description="Height and width that pictures are resized to; null: all are alike."),
    ] = None
    unlabelled: Annotated[
        str | None,
        Field(
            description="A source of more training pictures, without labels: as `source`, a table "
            "without labels, or a folder of pictures."
        ),
    ] = None
    labelled_fraction: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Part of each class's training rows whose labels are used; below 1 the "
            "others count as unlabelled.",
        ),
    ] = 1.0
    validation_fraction: Annotated[
        Fraction, Field(gt=0, description="Part of the training rows, unless the source has some.")
    ] = 0.1
    calibration_fraction: Annotated[
        Fraction, Field(description="Part of the training rows kept for calibration.")
    ] = 0.0
    test_fraction: Annotated[
        Fraction, Field(gt=0, description="Used only where the source has no test rows.")
    ] = 0.2
    split_seed: Annotated[
        int | None,
        Field(ge=0, description="Seed of the splits; null: the recipe's. Fix it to repeat a run."),
    ] = None
    num_train_samples: Annotated[
        int | None,
        Field(gt=0, description="So many of the training rows, drawn at random; null: all."),
    ] = None
    on_bad: Annotated[
        Literal["error", "skip"],
        Field(description="Bad rows stop the run, or are skipped, counted and listed."),
    ] = "error"
    memory_limit_bytes: Annotated[
        int, Field(gt=0, description="Larger data is streamed from disk.")
    ] = 4 << 30

    @property
    def all_labelled(self) -> bool:
        """Whether every training picture has a label."""
        return self.unlabelled is None and self.labelled_fraction == 1

    @field_validator("source", mode="before")
    @classmethod
    def _source_is_given(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("the data is yours to give: --set data.source=FOLDER_OR_NAME")
        return value


class Normalization(Section):
    """Per-channel mean and standard deviation of pictures in [0, 1]."""

    mean: Annotated[tuple[float, ...], Field(min_length=1)]
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _equal_lengths(self) -> Normalization:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")
        return self


class ModelSection(Section):
    """A network by name, with the arguments of its family."""

    name: Annotated[
        str,
        Field(
            description="A family (`understudy doctor` lists them), `module:callable`, "
            "`timm:NAME`, `transformers:NAME_OR_FOLDER`, or a teacher's `.onnx` file."
        ),
    ]
    arguments: Annotated[dict[str, Any], Field(default_factory=dict)]
    normalization: Annotated[
        Normalization | None,
        Field(
            description="null: what preprocessor_config.json of a `transformers:` folder says; for "
            "other networks mean and deviation of the training split, for an `.onnx` file none."
        ),
    ] = None


class ViewsSection(Section):
    """How pictures vary. Epoch `e` shows view `e mod num_views`, or one of the `last_views`."""

    num_views: Annotated[int, Field(gt=0)] = 10
    seed: Annotated[
        int | None,
        Field(
            ge=0,
            description="null: the recipe's. Fix it to repeat a run with another seed and the "
            "stored outputs of the first.",
        ),
    ] = None
    transforms: Annotated[
        tuple[dict[str, dict[str, Any] | None], ...],
        Field(description="In this order, each a name with its parameters."),
    ] = ()

    @property
    def spec(self) -> list[dict[str, dict[str, Any]]]:
        """The transforms; one without parameters has an empty mapping."""
        return [
            {name: arguments or {} for name, arguments in transform.items()}
            for transform in self.transforms
        ]


class TeacherSection(Section):
    """The trained model that is learnt from."""

    model: ModelSection
    checkpoint: Annotated[
        Path | None,
        Field(description="`.safetensors`, `.pt`, `.pth` or `.th`; null: the teacher is trained."),
    ] = None
    color_order: Annotated[
        Literal["rgb", "bgr"], Field(description="Channel order the teacher was trained with.")
    ] = "rgb"
    class_names: Annotated[
        tuple[str, ...] | None,
        Field(description="Order of the teacher's outputs; null: that of the data."),
    ] = None
    training: Annotated[
        TrainSettings | None, Field(description="How to train a teacher that has no checkpoint.")
    ] = None

    @model_validator(mode="after")
    def _weights_come_from_somewhere(self) -> TeacherSection:
        is_file = self.model.name.endswith(".onnx")
        if is_file and (self.checkpoint or self.training):
            raise ValueError("an .onnx teacher holds its weights: drop checkpoint and training")
        if self.checkpoint is not None and self.training is not None:
            raise ValueError("give either checkpoint or training, not both")
        if self.training is not None and self.training.last_views is not None:
            raise ValueError("a teacher's epochs each have a view of their own: drop last_views")
        return self

    @property
    def has_weights(self) -> bool:
        """Whether the recipe says where the teacher's weights come from."""
        own = self.model.name.endswith(".onnx")
        own = own or self.model.name.startswith(("timm:", "transformers:"))
        return own or self.checkpoint is not None or self.training is not None


class StudentSection(Section):
    """The small network that is trained."""

    model: ModelSection
    checkpoint: Annotated[
        Path | None,
        Field(description="Weights of a student that is trained already and only compressed."),
    ] = None
    flip_average: Annotated[
        bool,
        Field(
            description="Average the logits of the picture and its mirror image, in evaluation and "
            "in every file that is made: twice the multiply-adds, no weights. Training sees one of "
            "the two at a time and costs the same, quantisation-aware training too. For pictures "
            "whose mirror image has the same class."
        ),
    ] = False

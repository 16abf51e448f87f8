"""What a recipe may say. Importing this module does not import torch."""

from __future__ import annotations

import difflib
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from understudy.errors import RecipeError, problem
from understudy.evaluate.budget import Budget
from understudy.settings import Section
from understudy.train.settings import DistillSettings, TrainSettings

Fraction = Annotated[float, Field(ge=0, lt=1)]


class DataSection(Section):
    """Where the pictures come from and how they are split."""

    source: Annotated[
        str,
        Field(
            description="`digits`, a Parquet or Arrow file or a folder of them, an image folder, "
            "or the name of a data set on the Hugging Face hub."
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
    validation_fraction: Annotated[
        Fraction, Field(gt=0, description="Part of the training rows, unless the source has some.")
    ] = 0.1
    calibration_fraction: Annotated[
        Fraction, Field(description="Part of the training rows kept for calibration.")
    ] = 0.0
    test_fraction: Annotated[
        Fraction, Field(gt=0, description="Used only where the source has no test rows.")
    ] = 0.2
    on_bad: Annotated[
        Literal["error", "skip"],
        Field(description="Bad rows stop the run, or are skipped, counted and listed."),
    ] = "error"
    memory_limit_bytes: Annotated[
        int, Field(gt=0, description="Larger data is streamed from disk.")
    ] = 4 << 30

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
        Normalization | None, Field(description="null: mean and deviation of the training split.")
    ] = None


class ViewsSection(Section):
    """How training pictures are varied. Epoch `e` shows view `e mod num_views`."""

    num_views: Annotated[int, Field(gt=0)] = 10
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
        has_own_weights = is_file or self.model.name.startswith(("timm:", "transformers:"))
        if is_file and (self.checkpoint or self.training):
            raise ValueError("an .onnx teacher holds its weights: drop checkpoint and training")
        if self.checkpoint is not None and self.training is not None:
            raise ValueError("give either checkpoint or training, not both")
        if self.checkpoint is None and self.training is None and not has_own_weights:
            raise ValueError(
                "give its weights (--set teacher.checkpoint=FILE), or training to train it"
            )
        return self


class StudentSection(Section):
    """The small network that is trained."""

    model: ModelSection


class LabellingSection(Section):
    """How the teacher's outputs are computed and stored."""

    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "int8"],
        Field(description="auto: the fastest that equals float32 to its tolerance here."),
    ] = "auto"
    batch_size: Annotated[int, Field(gt=0)] = 500
    top_k: Annotated[
        int | None, Field(gt=0, description="Keep the k largest outputs; null: all of them.")
    ] = None


class ExportSection(Section):
    """The file that ships, and how closely it must compute what the model computes."""

    opset: Annotated[int, Field(ge=18, le=24)] = 18
    parity_tolerance: Annotated[
        float, Field(gt=0, description="Largest difference of a logit, relative to their scale.")
    ] = 1e-3
    num_parity_images: Annotated[int, Field(gt=0)] = 1000


class MeasurementSection(Section):
    """How the exported file is timed in ONNX Runtime, in a fresh process."""

    batch_sizes: tuple[Annotated[int, Field(gt=0)], ...] = (1, 100)
    num_threads: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...] | None, Field(description="null: 1 and all.")
    ] = None
    min_seconds: Annotated[float, Field(gt=0, description="Time spent on each combination.")] = 1.0


class DeviceSection(Section):
    """Where training and labelling run. The same recipe runs on all of them."""

    accelerator: Literal["cpu", "cuda", "auto"] = "cpu"
    num_processes: Annotated[int, Field(gt=0, description="Data-parallel processes.")] = 1
    num_threads: Annotated[int | None, Field(gt=0, description="null: all cores.")] = None


class Recipe(Section):
    """One job, whole: data, teacher, student, training, proof and budget."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataSection = DataSection()
    views: ViewsSection = ViewsSection()
    teacher: TeacherSection
    student: StudentSection
    training: TrainSettings = TrainSettings()
    distillation: DistillSettings = DistillSettings()
    control: Annotated[
        bool, Field(description="Train the same student without the teacher as well.")
    ] = True
    labelling: LabellingSection = LabellingSection()
    export: ExportSection = ExportSection()
    measurement: MeasurementSection = MeasurementSection()
    budget: Budget = Budget()
    device: DeviceSection = DeviceSection()

    def section(self, *names: str) -> dict[str, Any]:
        """Return sections as JSON-able values, to key a stage by what it depends on."""
        values = self.model_dump(mode="json", include=set(names))
        return {name: values[name] for name in names}


def parse_recipe(values: Any, *, origin: str = "recipe") -> Recipe:
    """Return the recipe, or raise one RecipeError that lists every problem in it."""
    if not isinstance(values, dict):
        raise RecipeError(
            problem(
                f"{origin} holds {type(values).__name__}",
                expected="a mapping of sections",
                mend="See `understudy recipes show digits` for one.",
            )
        )
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        problems = [_sentence(item, origin) for item in error.errors(include_url=False)]
        raise RecipeError(*dict.fromkeys(problems)) from None


def _sentence(item: Any, origin: str) -> str:
    where = ".".join(str(part) for part in item["loc"] if not _is_union_tag(part)) or "recipe"
    if item["type"] == "extra_forbidden":
        key = str(item["loc"][-1])
        known = _known_keys(item["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1)
        mend = f"Did you mean `{near[0]}`?" if near else "Remove it."
        return problem(
            f"{origin}: unknown key `{where}`", expected=f"one of {', '.join(known)}", mend=mend
        )
    if item["type"] == "missing":
        return problem(f"{origin}: `{where}` is missing", expected="a value", mend="Add it.")
    message = item["msg"].removeprefix("Value error, ")
    message = re.sub(r"valid dictionary or instance of \w+", "mapping of keys to values", message)
    return f"{origin}: `{where}` is {item['input']!r:.100}: {message}."


def _is_union_tag(part: Any) -> bool:
    """Pydantic puts the tried member of a union into the location, which no user wrote."""
    return part in ("number", "schedule")


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Return the keys that the section at ``location`` knows."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        for candidate in _models_in(field.annotation if field else None):
            section = candidate
    return list(section.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]

"""What a recipe may say. Importing this module does not import torch."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from understudy.compress.settings import STEPS, CompressionSection
from understudy.errors import RecipeError, problem
from understudy.evaluate.budget import Budget
from understudy.export.target_names import DEFAULT_OPSET, FLOAT_TARGETS
from understudy.recipes.exit_settings import ExitsSection
from understudy.recipes.head_settings import HeadSettings, TaskName
from understudy.recipes.rank_settings import CandidateName, ProbeSection
from understudy.recipes.release_settings import ReleaseSection
from understudy.recipes.sections import DataSection, StudentSection, TeacherSection, ViewsSection
from understudy.recipes.strategies import STRATEGIES, Offline, Strategy, label_users
from understudy.settings import MAX_THREADS, Section
from understudy.train.distill_settings import DistillSettings
from understudy.train.settings import TrainSettings


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
    live: Annotated[
        bool,
        Field(
            description="Store nothing and run the teacher on every batch: for feature maps that "
            "are too large to store."
        ),
    ] = False


class ExportSection(Section):
    """The file that ships, and how closely it must compute what the model computes."""

    opset: Annotated[int, Field(ge=18, le=23)] = DEFAULT_OPSET
    parity_tolerance: Annotated[
        float, Field(gt=0, description="Largest difference of a logit, relative to their scale.")
    ] = 1e-3
    num_parity_images: Annotated[int, Field(gt=0)] = 1000


class MeasurementSection(Section):
    """How the exported file is timed in ONNX Runtime, in a fresh process."""

    batch_sizes: tuple[Annotated[int, Field(gt=0)], ...] = (1, 100)
    num_threads: Annotated[
        tuple[Annotated[int, Field(gt=0, le=MAX_THREADS)], ...] | None,
        Field(description="null: 1 and all."),
    ] = None
    min_seconds: Annotated[float, Field(gt=0, description="Time spent on each combination.")] = 1.0


class DeviceSection(Section):
    """Where training and labelling run. The same recipe runs on all of them."""

    accelerator: Literal["cpu", "cuda", "auto"] = "cpu"
    num_processes: Annotated[int, Field(gt=0, description="Data-parallel processes.")] = 1
    num_threads: Annotated[
        int | None, Field(gt=0, le=MAX_THREADS, description="null: all cores.")
    ] = None


class Recipe(Section):
    """One job, whole: data, teacher, student, training, proof and budget."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataSection = DataSection()
    views: ViewsSection = ViewsSection()
    teacher: Annotated[
        TeacherSection | None, Field(description="Left out where the strategy has no teacher.")
    ] = None
    student: StudentSection
    training: TrainSettings = TrainSettings()
    distillation: DistillSettings = DistillSettings()
    strategy: Annotated[
        Strategy, Field(description="How knowledge is passed on; one of the sections below.")
    ] = Offline()
    finetuning: Annotated[
        TrainSettings | None,
        Field(description="Training on labels alone after the student's (and the control's) own."),
    ] = None
    control: Annotated[
        bool, Field(description="Train the same student without the teacher as well.")
    ] = True
    heads: Annotated[
        dict[TaskName, HeadSettings],
        Field(default_factory=dict, description="Further tasks on the student's embedding."),
    ]
    exits: Annotated[
        ExitsSection | None, Field(description="Early exits of the student; null: none.")
    ] = None
    candidates: Annotated[
        dict[CandidateName, TeacherSection],
        Field(
            default_factory=dict,
            description="Teachers to choose from, for `understudy teachers rank`.",
        ),
    ]
    probe: ProbeSection = ProbeSection()
    labelling: LabellingSection = LabellingSection()
    export: ExportSection = ExportSection()
    compression: CompressionSection = CompressionSection()
    release: ReleaseSection = ReleaseSection()
    measurement: MeasurementSection = MeasurementSection()
    budget: Budget = Budget()
    device: DeviceSection = DeviceSection()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Recipe:
        problems = list(self.strategy.problems(self.teacher, self.distillation))
        if not self.data.all_labelled and self.strategy.name != "label_free":
            problems += [
                f"{name} needs the label of every training picture: drop it, or data.unlabelled "
                "and data.labelled_fraction"
                for name in label_users(self.distillation, uses_none=False)
            ]
        int8 = [text for text in self.release.targets if text.endswith("/int8")]
        if (self.compression.quantizes or int8) and self.data.calibration_fraction == 0:
            problems.append(
                "int8 is calibrated on pictures of its own: set data.calibration_fraction, for "
                "instance to 0.02"
            )
        if self.student.checkpoint is not None and (self.control or self.finetuning is not None):
            problems.append(
                "a student with a checkpoint is not trained: set control to false and drop "
                "finetuning"
            )
        if self.compression.quantizes:
            problems += [
                f"the compressed student is int8, which the target {name} cannot be: name it as "
                f"{name}/float32"
                for name in FLOAT_TARGETS.intersection(self.release.targets)
            ]
        if self.student.flip_average and (self.heads or self.exits is not None):
            problems.append(
                "student.flip_average averages the logits of one classifier at the end: set it to "
                "false, or drop heads and exits"
            )
        guidance = None if self.exits is None else self.exits.guidance
        if self.strategy.name == "label_free" and guidance is not None and guidance.ce_weight != 0:
            problems.append("strategy label_free uses no labels: set exits.guidance.ce_weight to 0")
        problems += self._last_views_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _last_views_problems(self) -> Iterator[str]:
        """Views kept for the end are some of the recipe's, and leave some for the epochs before."""
        trainings: dict[str, TrainSettings | None] = {
            "training": self.training,
            "finetuning": self.finetuning,
        }
        for number, step in enumerate(self.compression.steps):
            trainings[f"compression.steps.{number}.training"] = step.training
        for where, training in trainings.items():
            if training is None or training.last_views is None:
                continue
            last = training.last_views
            if training.num_epochs > last.num_epochs and last.num_views >= self.views.num_views:
                yield (
                    f"{where}.last_views keeps {last.num_views} of {self.views.num_views} views "
                    "for the end, which leaves none for the epochs before: raise views.num_views"
                )
            elif last.num_views > self.views.num_views:
                yield (
                    f"{where}.last_views are {last.num_views} of {self.views.num_views} views: "
                    "raise views.num_views"
                )

    def section(self, *names: str) -> dict[str, Any]:
        """Return sections as JSON-able values, to key a stage by what it depends on."""
        # Where data and checkpoints lie does not matter; what is in them counts by its hash.
        values = self.model_dump(
            mode="json",
            include=set(names),
            exclude={
                "data": {"source", "unlabelled", "memory_limit_bytes"},
                "teacher": {"checkpoint"},
                "student": {"checkpoint"},
                "strategy": {"teachers": {"__all__": {"checkpoint"}}},
            },
        )
        if "device" in values:
            # As with null, which is all cores of whatever machine: a matter of speed and rounding.
            values["device"]["num_threads"] = None
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
    if not item["loc"]:
        return f"{origin}: {message}."
    message = re.sub(r"valid dictionary or instance of \w+", "mapping of keys to values", message)
    return f"{origin}: `{where}` is {item['input']!r:.100}: {message}."


def _is_union_tag(part: Any) -> bool:
    """Pydantic puts the tried member of a union into the location, which no user wrote."""
    return part in ("number", "schedule", *STRATEGIES, *STEPS)


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Return the keys that the section at ``location`` knows."""
    section: type[BaseModel] = Recipe
    for part in location:
        section = STRATEGIES.get(part, STEPS.get(part, section))
        field = section.model_fields.get(str(part))
        for candidate in _models_in(field.annotation if field else None):
            section = candidate
    return list(section.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]

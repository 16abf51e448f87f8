"""What a run found out, as one typed record: the only thing the report and its checks read.

Numbers come from other stages as plain values; ``RunResults.from_values`` checks them once, so that
everything after it can trust types, lengths and the absence of NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from understudy.errors import InputError, problem
from understudy.report.compression_results import BudgetLine, CompressionFacts
from understudy.report.exit_results import ExitFacts
from understudy.report.sensitivity import LayerLoss
from understudy.report.strict import Strict

RESULTS_SCHEMA_VERSION = 1

Role = Literal["teacher", "student", "control"]
SplitName = Literal["train", "calibration", "validation", "test"]
ROLES: tuple[Role, ...] = ("teacher", "student", "control")

PNG_BASE64_START = "iVBORw0KGgo"
MEND = "Make the results again with this version of understudy."


@dataclass(frozen=True)
class IssueFacts(Strict):
    """One thing wrong with the data. ``row`` is -1 where it is not about one row."""

    kind: str
    row: int
    split: str
    message: str


@dataclass(frozen=True)
class DataFacts(Strict):
    """The data of a run. ``image_shape`` is (channels, height, width).

    ``class_counts`` holds, for each split, the number of samples of each class. ``num_unlabelled``
    of the training samples have no label.
    """

    source: str
    fingerprint: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    num_samples: dict[str, int]
    class_counts: dict[str, tuple[int, ...]]
    issues: tuple[IssueFacts, ...] = ()
    num_skipped: int = 0
    num_unlabelled: int = 0


@dataclass(frozen=True)
class ModelFacts(Strict):
    """What a model costs; None where it is not known (a black-box teacher, no exported file)."""

    name: str
    num_params: int | None = None
    macs: int | None = None
    weight_bytes: int | None = None
    peak_activation_bytes: int | None = None
    file_bytes: int | None = None


@dataclass(frozen=True)
class CalibrationBin(Strict):
    """Predictions whose confidence lies in (lower, upper]; the means are None in an empty bin."""

    lower: float
    upper: float
    confidence: float | None
    accuracy: float | None
    count: int


@dataclass(frozen=True)
class SplitMetrics(Strict):
    """One model on one split. Rates are in [0, 1]; ``confusion`` has true classes as rows.

    ``per_class_accuracy`` is None for a class without samples.
    """

    accuracy: float
    per_class_accuracy: tuple[float | None, ...]
    nll: float
    brier: float
    ece: float
    confusion: tuple[tuple[int, ...], ...]
    calibration_bins: tuple[CalibrationBin, ...]
    num_samples: int
    agreement_with_teacher: float | None = None


@dataclass(frozen=True)
class PairedCounts(Strict):
    """Test samples that exactly one of student and control gets right."""

    only_student_right: int
    only_control_right: int


@dataclass(frozen=True)
class ParityFacts(Strict):
    """How far the exported file's outputs are from the trained model's, on real test images.

    ``batch_max_abs_difference`` is between images run alone and in a batch.
    """

    max_abs_difference: float
    mean_abs_difference: float
    top1_agreement: float
    tolerance: float
    num_images: int
    passed: bool
    batch_max_abs_difference: float | None = None


@dataclass(frozen=True)
class Measurement(Strict):
    """Time of one call of the exported file in its runtime, in milliseconds.

    ``load_ms`` is the time to make it ready for the first call.
    """

    batch_size: int
    num_threads: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    images_per_second: float
    num_runs: int
    num_warmup: int
    load_ms: float | None = None


@dataclass(frozen=True)
class Mistake(Strict):
    """One test image that the student gets wrong. Classes are indices into the class names."""

    index: int
    true_class: int
    student_class: int
    png_base64: str
    teacher_class: int | None = None
    control_class: int | None = None
    student_confidence: float | None = None


@dataclass(frozen=True)
class StageFacts(Strict):
    """One stage of the run; a reused stage was not run again."""

    name: str
    seconds: float
    reused: bool


@dataclass(frozen=True)
class LineageRow(Strict):
    """One network of a chain, each taught by the one before it, or one trained beside another."""

    name: str
    model: str
    num_params: int | None
    validation_accuracy: float


@dataclass(frozen=True)
class MemberRow(Strict):
    """One teacher of an ensemble, by itself."""

    name: str
    model: str
    num_params: int | None
    macs: int | None
    validation_accuracy: float
    test_accuracy: float


@dataclass(frozen=True)
class RunResults(Strict):
    """Everything a report says about one run.

    Attributes:
        created: time of the evaluation, ISO 8601.
        recipe: the recipe that ran, with every default filled in.
        models, metrics, curves, training_hours: by role; a role that did not run is absent.
            A curve is a list of one row an epoch (``epoch`` counts from 0; the other columns are
            those the training loop logs, None or absent where not measured).
        parity: None when no file was exported.
        peak_memory_bytes: largest resident memory of the process that ran the exported file;
            ``baseline_memory_bytes`` is what it was before the file was loaded.
        student_vs_control: paired counts on the test split, for a sharper comparison.
        teacher_confidence: the teacher's mean largest probability over the training views, at
            the temperature of the loss.
        lineage: of a chain, from the first teacher to the student; empty otherwise.
        members: the teachers of an ensemble, of which "teacher" is all together; empty otherwise.
        beside: peers, or the student's average, that were trained in the same updates.
        exits: early exits of the student; None where the recipe has none.
        compression: how the student was made smaller and what ships; None before that.
        sensitivity: what each layer loses alone in int8; empty where not measured.
    """

    run_name: str
    created: str
    seed: int
    recipe: dict[str, Any]
    recipe_hash: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    data: DataFacts
    models: dict[Role, ModelFacts]
    metrics: dict[Role, dict[SplitName, SplitMetrics]]
    curves: dict[Role, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    parity: ParityFacts | None = None
    measurements: tuple[Measurement, ...] = ()
    peak_memory_bytes: int | None = None
    baseline_memory_bytes: int | None = None
    budget: tuple[BudgetLine, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    stages: tuple[StageFacts, ...] = ()
    training_hours: dict[Role, float] = field(default_factory=dict)
    student_vs_control: PairedCounts | None = None
    teacher_confidence: float | None = None
    lineage: tuple[LineageRow, ...] = ()
    members: tuple[MemberRow, ...] = ()
    beside: tuple[LineageRow, ...] = ()
    exits: ExitFacts | None = None
    compression: CompressionFacts | None = None
    sensitivity: tuple[LayerLoss, ...] = ()

    @property
    def teaching(self) -> str:
        """What the student has and the control has not, in words."""
        return "the teacher" if self.has_teacher else "the strategy"

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher at all: peers and the own average need none."""
        return "teacher" in self.models or self.recipe.get("teacher", {}) is not None

    def test(self, role: Role) -> SplitMetrics | None:
        """Return the role's metrics on the test split, None where it was not evaluated there."""
        return self.metrics.get(role, {}).get("test")

    def curve(self, role: Role, column: str) -> list[tuple[int, float]]:
        """Return (epoch counted from 1, value) of one logged column, without the missing values.

        A loss term is named ``losses/TERM``.
        """
        table, _, name = column.rpartition("/")
        points = []
        for row in self.curves.get(role, ()):
            value = (row.get(table) or {} if table else row).get(name)
            if isinstance(value, int | float):
                points.append((int(row["epoch"]) + 1, float(value)))
        return points

    def to_values(self) -> dict[str, Any]:
        """Return the results as JSON-able values with their schema version first."""
        return {"schema_version": RESULTS_SCHEMA_VERSION, **asdict(self)}

    def to_json(self) -> str:
        """Return the results as JSON text."""
        return json.dumps(self.to_values(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build results from plain values (dictionaries, lists, numbers), checking all of them.

        NaN and infinity are read as "no value". Raises InputError with one line per problem:
        unknown and missing fields, wrong types, lists that do not fit the number of classes.
        """
        fields = {name: value for name, value in values.items() if name != "schema_version"}
        version = values.get("schema_version", RESULTS_SCHEMA_VERSION)
        if version != RESULTS_SCHEMA_VERSION:
            raise InputError(
                problem(
                    f"the results have schema version {version!r}",
                    expected=f"version {RESULTS_SCHEMA_VERSION}",
                    mend=MEND,
                )
            )
        try:
            results = TypeAdapter(cls).validate_python(finite_values(fields))
        except ValidationError as error:
            raise InputError(*map(field_problem, error.errors())) from None
        problems = list(consistency_problems(results))
        if problems:
            raise InputError(*problems)
        return results

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote; anything else is an InputError."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(
                problem(f"the results are not JSON ({error})", expected="JSON", mend=MEND)
            ) from None
        if not isinstance(values, dict):
            raise InputError(
                problem("the results are not a JSON object", expected="an object", mend=MEND)
            )
        return cls.from_values(values)


def finite_values(value: Any) -> Any:
    """Return a copy of nested plain values in which numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {key: finite_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def field_problem(error: Mapping[str, Any]) -> str:
    """Return one validation error in the house form."""
    name = ".".join(map(str, error["loc"])) or "the results"
    if error["type"] == "unexpected_keyword_argument":
        return problem(
            f"unknown field {name} in the results", expected="only known ones", mend=MEND
        )
    if error["type"] in ("missing", "missing_argument"):
        return problem(f"the results lack {name}", expected="all fields", mend=MEND)
    given = repr(error["input"])
    given = given if len(given) <= 60 else given[:57] + "..."
    return problem(f"{name} is {given} in the results", expected=error["msg"], mend=MEND)


def consistency_problems(results: RunResults) -> Iterator[str]:
    """Yield what types alone cannot say: lengths, class indices, pictures."""
    num_classes = len(results.data.class_names)

    def wrong(name: str, given: object, expected: str) -> str:
        return problem(f"{name} is {given} in the results", expected=expected, mend=MEND)

    for split, counts in results.data.class_counts.items():
        if len(counts) != num_classes:
            yield wrong(f"len(data.class_counts.{split})", len(counts), f"{num_classes} classes")
    for role, splits in results.metrics.items():
        for split_name, metrics in splits.items():
            name = f"metrics.{role}.{split_name}"
            if len(metrics.per_class_accuracy) != num_classes:
                length = len(metrics.per_class_accuracy)
                yield wrong(f"len({name}.per_class_accuracy)", length, f"{num_classes} classes")
            shape = {len(metrics.confusion), *map(len, metrics.confusion)}
            if shape != {num_classes}:
                expected = f"{num_classes} rows of {num_classes}"
                yield wrong(f"the set of lengths in {name}.confusion", shape, expected)
    for role, rows in results.curves.items():
        for number, row in enumerate(rows):
            if not isinstance(row.get("epoch"), int):
                yield wrong(f"curves.{role}.{number}.epoch", row.get("epoch"), "a whole number")
    for number, mistake in enumerate(results.mistakes):
        classes = [mistake.true_class, mistake.student_class]
        classes += [c for c in (mistake.teacher_class, mistake.control_class) if c is not None]
        if not all(0 <= index < num_classes for index in classes):
            yield wrong(f"a class of mistakes.{number}", classes, f"0 to {num_classes - 1}")
        if not mistake.png_base64.startswith(PNG_BASE64_START):
            given = repr(mistake.png_base64[:20])
            yield wrong(f"mistakes.{number}.png_base64", given, "a PNG file in Base64")

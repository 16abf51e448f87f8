"""What ranking teachers found out, as one typed record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from understudy.errors import InputError, problem
from understudy.report.results import field_problem
from understudy.report.strict import Strict

RANKING_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Gap(Strict):
    """A difference of two accuracies in [0, 1] units, and how far chance alone explains it."""

    value: float
    margin: float

    @property
    def is_noise(self) -> bool:
        """Whether chance alone explains it."""
        return abs(self.value) <= self.margin


@dataclass(frozen=True)
class PairRow(Strict):
    """Two candidates: the first one's accuracy minus the second's, of teachers and of students."""

    first: str
    second: str
    teacher: Gap
    student: Gap


@dataclass(frozen=True)
class Throughput(Strict):
    """How fast a teacher labels, in its fastest exact runtime, measured in a process of its own.

    ``images_per_second`` is that of the median batch; slowest and fastest are of single batches.
    """

    runtime: str
    precision: str
    images_per_second: float
    slowest: float
    fastest: float
    batch_size: int
    num_batches: int
    num_threads: int


@dataclass(frozen=True)
class CandidateRow(Strict):
    """One teacher: what it is, what it costs, and the students that it made.

    Attributes:
        place: from 1; tied candidates have places of their own, by labelling cost.
        tied_with: the candidates whose students are within noise of the same best one.
        teacher_accuracy: on the validation split, as all accuracies here.
        params_ratio, macs_ratio: over the student's; the capacity gap.
        labelling_seconds: for all views of the recipe's training split, at this throughput.
        peak_memory_bytes: largest resident memory of a process that labels with it, and
            ``baseline_memory_bytes`` before it was loaded; None where the system does not tell.
        energy_mj: of one picture; None: not measured.
        confidence: mean largest probability of its soft targets at the probe's temperature.
        view_accuracy: how often it is right on the probe's training views; None where views mix
            two pictures.
        student_accuracies: of the probes, by seed.
        student_spread: their standard deviation; None with one seed.
        against_control: the students' mean accuracy minus that of students without a teacher.
        reasons: why it stands where it stands, one sentence each.
    """

    name: str
    model: str
    place: int
    tied_with: tuple[str, ...]
    teacher_accuracy: float
    num_params: int
    macs: int | None
    weight_bytes: int
    peak_activation_bytes: int | None
    params_ratio: float
    macs_ratio: float | None
    throughput: Throughput
    labelling_seconds: float
    peak_memory_bytes: int | None
    baseline_memory_bytes: int | None
    energy_mj: float | None
    confidence: float
    view_accuracy: float | None
    student_accuracies: tuple[float, ...]
    student_accuracy: float
    student_spread: float | None
    against_control: Gap
    reasons: tuple[str, ...] = ()

    @property
    def memory_growth_bytes(self) -> int | None:
        """What the process grew by when it loaded the teacher and labelled."""
        if self.peak_memory_bytes is None or self.baseline_memory_bytes is None:
            return None
        return self.peak_memory_bytes - self.baseline_memory_bytes


@dataclass(frozen=True)
class ProbeFacts(Strict):
    """The short trainings: equal in everything but the teacher."""

    num_epochs: int
    num_samples: int
    num_steps: int
    num_views: int
    seeds: tuple[int, ...]
    temperature: float
    student: str
    student_params: int
    student_macs: int | None


@dataclass(frozen=True)
class Ranking(Strict):
    """The candidates from best to worst.

    Attributes:
        num_train, num_validation: samples of the recipe's splits; test is never read.
        training_deviation: standard deviation of a student's accuracy from seed to seed, what all
            students share of a seed taken off; None with one seed.
        control_accuracies: of students without a teacher, by seed.
        comparisons: of every two candidates.
        inversions: those in which the first is the better teacher and makes the worse student.
        headline: the result in a sentence.
        caveats: what the ranking does not show.
    """

    run_name: str
    created: str
    seed: int
    recipe_hash: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    data: str
    num_classes: int
    num_train: int
    num_validation: int
    probe: ProbeFacts
    training_deviation: float | None
    control_accuracies: tuple[float, ...]
    control_accuracy: float
    candidates: tuple[CandidateRow, ...]
    comparisons: tuple[PairRow, ...]
    inversions: tuple[PairRow, ...]
    headline: str = ""
    caveats: tuple[str, ...] = ()

    def candidate(self, name: str) -> CandidateRow:
        """Return one candidate by its name."""
        return next(row for row in self.candidates if row.name == name)

    def pair(self, first: str, second: str) -> PairRow:
        """Return the comparison of two candidates in this order."""
        for row in self.comparisons:
            if (row.first, row.second) == (first, second):
                return row
            if (row.second, row.first) == (first, second):
                teacher, student = (
                    Gap(-gap.value, gap.margin) for gap in (row.teacher, row.student)
                )
                return PairRow(first, second, teacher, student)
        raise KeyError((first, second))

    def to_json(self) -> str:
        """Return the ranking as JSON text."""
        values = {"schema_version": RANKING_SCHEMA_VERSION, **asdict(self)}
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build a ranking from plain values, checking all of them.

        Raises:
            InputError: with one line per problem.
        """
        fields = {name: value for name, value in values.items() if name != "schema_version"}
        version = values.get("schema_version", RANKING_SCHEMA_VERSION)
        if version != RANKING_SCHEMA_VERSION:
            raise InputError(
                problem(
                    f"the ranking has schema version {version!r}",
                    expected=f"version {RANKING_SCHEMA_VERSION}",
                    mend="Rank the teachers again with this version of understudy.",
                )
            )
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            raise InputError(*map(field_problem, error.errors())) from None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote."""
        return cls.from_values(json.loads(text))

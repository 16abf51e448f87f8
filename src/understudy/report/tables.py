"""The report's tables as formatted text, shared by the page, the Markdown and the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from understudy.report import formats
from understudy.report.checks import Verdict
from understudy.report.compression_results import BudgetLine
from understudy.report.results import ROLES, Role, RunResults, SplitMetrics
from understudy.report.sampling import (
    NUM_STANDARD_ERRORS,
    accuracy_difference,
    rate_standard_error,
)

NOT_APPLICABLE = "\u2014"
STATUS_WORDS = {
    "passed": "passed",
    "failed": "missed",
    "not_measured": "not measured",
    "issue": "issue",
    "tip": "tip",
    "not_applicable": "not applicable",
    "skipped": "skipped",
}


@dataclass(frozen=True)
class Cell:
    """One formatted value; ``judgement`` says in a word how a difference is to be read."""

    text: str
    judgement: Literal["", "better", "worse", "within noise"] = ""


@dataclass(frozen=True)
class ComparisonRow:
    """One measure for teacher, student and control, and the student's differences to both."""

    measure: str
    note: str
    values: tuple[str, ...]
    against_teacher: Cell
    against_control: Cell


@dataclass(frozen=True)
class Measure:
    """How one row of the comparison is read from the results and written."""

    title: str
    note: str
    read: Callable[[RunResults, Role], float | None]
    write: Callable[[float | None], str]
    better: Literal["higher", "lower"]
    difference: Literal["points", "decimal", "ratio"]


def metric(name: str) -> Callable[[RunResults, Role], float | None]:
    """Return a reader of one test metric."""

    def read(results: RunResults, role: Role) -> float | None:
        metrics = results.test(role)
        return None if metrics is None else getattr(metrics, name)

    return read


def cost(name: str) -> Callable[[RunResults, Role], float | None]:
    """Return a reader of one property of a model."""

    def read(results: RunResults, role: Role) -> float | None:
        model = results.models.get(role)
        return None if model is None else getattr(model, name)

    return read


def training_seconds(results: RunResults, role: Role) -> float | None:
    """Return how long the role was trained in this run, None where it was not."""
    hours = results.training_hours.get(role)
    return None if hours is None else 3600 * hours


MEASURES = (
    Measure(
        "Accuracy", "share of test images", metric("accuracy"), formats.percent, "higher", "points"
    ),
    Measure(
        "Negative log-likelihood",
        "nats an image",
        metric("nll"),
        formats.decimal,
        "lower",
        "decimal",
    ),
    Measure("Brier score", "0 to 2", metric("brier"), formats.decimal, "lower", "decimal"),
    Measure(
        "Expected calibration error", "0 to 1", metric("ece"), formats.decimal, "lower", "decimal"
    ),
    Measure(
        "Agreement with the teacher",
        "same answer",
        metric("agreement_with_teacher"),
        formats.percent,
        "higher",
        "points",
    ),
    Measure("Parameters", "", cost("num_params"), formats.count, "lower", "ratio"),
    Measure("Multiply-adds", "an image", cost("macs"), formats.large_count, "lower", "ratio"),
    Measure("Weights", "in memory", cost("weight_bytes"), formats.size, "lower", "ratio"),
    Measure(
        "Peak activations",
        "one image",
        cost("peak_activation_bytes"),
        formats.size,
        "lower",
        "ratio",
    ),
    Measure("File", "exported", cost("file_bytes"), formats.size, "lower", "ratio"),
    Measure("Training time", "in this run", training_seconds, formats.duration, "lower", "ratio"),
)


def comparison_rows(results: RunResults) -> list[ComparisonRow]:
    """Return the table teacher / student / control; measures that nobody has are left out."""
    rows = []
    for measure in MEASURES:
        numbers = {role: measure.read(results, role) for role in ROLES}
        if all(number is None for number in numbers.values()):
            continue
        values = [value_text(results, measure, role, numbers[role]) for role in ROLES]
        differences = [difference_cell(results, measure, role) for role in ("teacher", "control")]
        rows.append(ComparisonRow(measure.title, measure.note, tuple(values), *differences))
    return rows


def value_text(results: RunResults, measure: Measure, role: Role, number: float | None) -> str:
    """Return one value; the accuracy comes with two standard errors."""
    metrics = results.test(role)
    if measure.title == "Accuracy" and metrics is not None:
        error = rate_standard_error(metrics.accuracy, metrics.num_samples)
        margin = formats.fixed(100 * NUM_STANDARD_ERRORS * error, 2)
        return f"{formats.percent(number)} ± {margin}"
    if measure.title.startswith("Agreement") and role == "teacher":
        return NOT_APPLICABLE
    if number is None and measure.read is training_seconds and results.curves.get(role):
        return "with the student"
    if number is None and measure.read is training_seconds and role in results.models:
        return "not trained here"
    if number is None and measure.title == "File" and role in results.models:
        return "not exported"
    if number is None and role not in results.models and role not in results.metrics:
        return NOT_APPLICABLE
    return measure.write(number)


def difference_cell(
    results: RunResults, measure: Measure, other: Literal["teacher", "control"]
) -> Cell:
    """Return the student's value against another's and whether that is better."""
    ours, theirs = measure.read(results, "student"), measure.read(results, other)
    if ours is None or theirs is None:
        return Cell(NOT_APPLICABLE)
    if measure.title.startswith("Agreement") and other == "teacher":
        return Cell(NOT_APPLICABLE)
    if measure.difference == "ratio":
        is_time = measure.read is training_seconds
        words = ("shorter", "longer") if is_time else ("smaller", "larger")
        # "Smaller" already says which is better.
        return Cell(formats.ratio(ours, theirs, words=words))
    if measure.difference == "points":
        text = formats.points(ours - theirs)
    else:
        text = formats.signed(ours - theirs, 4)
    if measure.difference == "points" and is_noise(results, measure, other):
        return Cell(text, "within noise")
    if ours == theirs:
        return Cell(text)
    is_better = (ours > theirs) == (measure.better == "higher")
    return Cell(text, "better" if is_better else "worse")


def is_noise(results: RunResults, measure: Measure, other: Literal["teacher", "control"]) -> bool:
    """Return whether chance alone explains the difference of two rates on the test split."""
    student, metrics = results.test("student"), results.test(other)
    ours, theirs = measure.read(results, "student"), measure.read(results, other)
    if student is None or metrics is None or ours is None or theirs is None:
        return False
    if measure.title == "Accuracy":
        paired = results.student_vs_control if other == "control" else None
        return accuracy_difference(student, metrics, paired=paired).is_noise
    error = math.hypot(
        rate_standard_error(ours, student.num_samples),
        rate_standard_error(theirs, metrics.num_samples),
    )
    return abs(ours - theirs) <= NUM_STANDARD_ERRORS * error


@dataclass(frozen=True)
class Headline:
    """The verdict in one line and one sentence; ``kind`` chooses its colour and sign."""

    kind: Literal["good", "bad", "open"]
    title: str
    sentence: str
    issues: str


def headline(results: RunResults, verdicts: Sequence[Verdict]) -> Headline:
    """Return whether the budget is met and everything was made, and what the student is worth."""
    missed = [line.name for line in results.budget if line.status == "failed"]
    unknown = [line.name for line in results.budget if line.status == "not_measured"]
    kind: Literal["good", "bad", "open"] = "open"
    if missed:
        kind, title = "bad", f"Budget missed: {', '.join(missed)}"
    elif not results.budget:
        title = "No budget was given"
    elif unknown:
        title = f"Budget not proven: {', '.join(unknown)} not measured"
    else:
        kind, title = "good", "Budget met"
    failed = () if results.compression is None else results.compression.failed
    if failed:
        kind, title = "bad", f"Not made: {', '.join(found.name for found in failed)}. {title}"
    return Headline(kind, title, student_sentence(results), issue_sentence(verdicts))


def student_sentence(results: RunResults) -> str:
    """Return what the student keeps of the teacher, at what share of its size."""
    student, teacher = results.test("student"), results.test("teacher")
    if student is None:
        return "The student was not evaluated on the test split."
    text = f"The student gets {formats.percent(student.accuracy)} of the test images right"
    if teacher is not None:
        text += f", the teacher {formats.percent(teacher.accuracy)}"
    sizes = [cost("num_params")(results, role) for role in ("student", "teacher")]
    if sizes[0] and sizes[1] and sizes[0] < sizes[1]:
        text += f", with {formats.percent(sizes[0] / sizes[1], 1)} of its parameters"
    control = results.test("control")
    if control is None:
        return f"{text}. There is no control to say what {results.teaching} was worth."
    difference = accuracy_difference(student, control, paired=results.student_vs_control)
    noise = ", which is within noise" if difference.is_noise else ""
    return f"{text}. Against the control: {formats.points(difference.value)}{noise}."


def issue_sentence(verdicts: Sequence[Verdict]) -> str:
    """Return how many checks found something, and how many could not say."""
    counts = dict.fromkeys(("issue", "tip", "skipped"), 0)
    for verdict in verdicts:
        if verdict.status in counts:
            counts[verdict.status] += 1
    parts = [
        f"{number} {word}{'' if number == 1 or word == 'skipped' else 's'}"
        for word, number in counts.items()
        if number
    ]
    return f"Checks: {', '.join(parts) if parts else 'all passed'}."


def budget_rows(results: RunResults) -> list[tuple[BudgetLine, str, str]]:
    """Return each part of the budget with its limit and what was measured, as text."""
    return [
        (line, formats.quantity(line.limit, line.unit), formats.quantity(line.measured, line.unit))
        for line in results.budget
    ]


@dataclass(frozen=True)
class Confusion:
    """One true class taken for another by the student, and how often by the others."""

    true_class: int
    taken_for: int
    num_student: int
    num_true: int
    num_teacher: int | None
    num_control: int | None


def confused_pairs(results: RunResults, *, at_most: int = 5) -> list[Confusion]:
    """Return the student's most frequent confusions on the test split, largest first."""
    student = results.test("student")
    if student is None:
        return []
    pairs = [
        (number, i, j)
        for i, row in enumerate(student.confusion)
        for j, number in enumerate(row)
        if i != j and number
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))

    def others(metrics: SplitMetrics | None, i: int, j: int) -> int | None:
        return None if metrics is None else metrics.confusion[i][j]

    return [
        Confusion(
            true_class=i,
            taken_for=j,
            num_student=number,
            num_true=sum(student.confusion[i]),
            num_teacher=others(results.test("teacher"), i, j),
            num_control=others(results.test("control"), i, j),
        )
        for number, i, j in pairs[:at_most]
    ]

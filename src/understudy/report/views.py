"""Small tables that only the page shows, as text ready for the template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from understudy.report import formats
from understudy.report.results import RunResults
from understudy.report.sampling import accuracy_difference

MAX_EPOCH_ROWS = 40

EPOCH_COLUMNS: tuple[tuple[str, Callable[[float | None], str]], ...] = (
    ("train_loss", formats.decimal),
    ("train_accuracy", formats.percent),
    ("validation_accuracy", formats.percent),
    ("validation_nll", formats.decimal),
    ("learning_rate", formats.significant),
)


@dataclass(frozen=True)
class Tile:
    """One large number at the top of the page."""

    title: str
    value: str
    note: str


def tiles(results: RunResults) -> list[Tile]:
    """Return the five numbers that people look for first."""
    found = []
    student, control = results.test("student"), results.test("control")
    if student is not None:
        note = f"of {formats.count(student.num_samples)} test images"
        found.append(Tile("Student's accuracy", formats.percent(student.accuracy), note))
    if student is not None and control is not None:
        difference = accuracy_difference(student, control, paired=results.student_vs_control)
        note = f"± {formats.fixed(100 * difference.margin, 2)}"
        note += ", within noise" if difference.is_noise else ", beyond noise"
        found.append(Tile(f"Worth of {results.teaching}", formats.points(difference.value), note))
    else:
        found.append(Tile(f"Worth of {results.teaching}", formats.NOT_MEASURED, "needs a control"))
    model, teacher = results.models.get("student"), results.models.get("teacher")
    if model is not None:
        note = "in the student"
        if teacher is not None and teacher.num_params and model.num_params:
            note = f"{formats.ratio(model.num_params, teacher.num_params)} than the teacher"
        found.append(Tile("Parameters", formats.count(model.num_params), note))
        found.append(Tile("File", formats.size(model.file_bytes), "as exported"))
    first = min(results.measurements, key=lambda m: (m.batch_size, m.num_threads), default=None)
    if first is None:
        found.append(Tile("Latency", formats.NOT_MEASURED, "no exported file was timed"))
    else:
        threads = "1 thread" if first.num_threads == 1 else f"{first.num_threads} threads"
        images = "1 image" if first.batch_size == 1 else f"{first.batch_size} images"
        note = f"median, {images}, {threads}"
        found.append(Tile("Latency", formats.milliseconds(first.p50_ms), note))
    return found


@dataclass(frozen=True)
class EpochTable:
    """The curves as a table; ``num_left_out`` epochs are not shown."""

    titles: list[str]
    rows: list[list[str]]
    num_left_out: int


def epoch_table(results: RunResults) -> EpochTable:
    """Return the curves of student and control as a table of evenly spaced epochs."""
    titles, columns = ["Epoch"], []
    for role in ("student", "control"):
        for name, write in EPOCH_COLUMNS:
            values = dict(results.curve(role, name))
            if values:
                titles.append(f"{role.capitalize()}: {name.replace('_', ' ')}")
                columns.append((values, write))
    epochs = sorted({epoch for values, _ in columns for epoch in values})
    step = max(1, -(-len(epochs) // MAX_EPOCH_ROWS))
    # Counted from the end, so that the last epoch is always shown.
    shown = epochs[::-1][::step][::-1]
    rows = [
        [str(epoch), *(write(v[epoch]) if epoch in v else "\u2014" for v, write in columns)]
        for epoch in shown
    ]
    return EpochTable(titles, rows, len(epochs) - len(shown))


@dataclass(frozen=True)
class ConfusionCell:
    """One cell of the confusion matrix; ``share`` is its per cent of the row."""

    number: int
    share: float
    kind: str


def confusion_cells(results: RunResults, *, at_most: int) -> list[list[ConfusionCell]]:
    """Return the student's confusion matrix, empty where there are more classes."""
    student = results.test("student")
    if student is None or len(student.confusion) > at_most:
        return []
    rows = []
    for i, row in enumerate(student.confusion):
        total = max(sum(row), 1)
        rows.append(
            [
                ConfusionCell(
                    number=number,
                    share=round(100 * number / total, 1),
                    kind="right" if i == j else "wrong" if number else "none",
                )
                for j, number in enumerate(row)
            ]
        )
    return rows


def hardware_facts(results: RunResults) -> list[tuple[str, str]]:
    """Return the machine's facts with readable names, the processor and its cores first."""
    facts = dict(results.hardware)
    found = []
    if "processor" in facts:
        found.append(("Processor", str(facts.pop("processor"))))
    if "num_cores" in facts:
        num_cores = facts.pop("num_cores")
        found.append(("Cores", f"{num_cores} core{'' if num_cores == 1 else 's'}"))
    if "memory_bytes" in facts:
        found.append(("Memory", formats.size(facts.pop("memory_bytes"))))
    found += [(name.replace("_", " ").capitalize(), str(value)) for name, value in facts.items()]
    return found

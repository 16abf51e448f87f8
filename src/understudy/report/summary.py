"""The result in the terminal: the same numbers as on the page's first screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from understudy.report import formats, tables
from understudy.report.checks import Verdict, run_checks
from understudy.report.results import RunResults

STYLES = {
    "better": "green",
    "worse": "red",
    "within noise": "yellow",
    "passed": "green",
    "failed": "red",
    "not_measured": "yellow",
    "issue": "red",
    "tip": "yellow",
    "good": "bold green",
    "bad": "bold red",
    "open": "bold yellow",
}


def summary_table(results: RunResults, verdicts: Sequence[Verdict] | None = None) -> RenderableType:
    """Return headline, comparison, budget and findings for a Rich console."""
    verdicts = run_checks(results) if verdicts is None else verdicts
    head = tables.headline(results, verdicts)
    parts: list[RenderableType] = [Text(head.title, style=STYLES[head.kind]), Text(head.sentence)]
    parts += [Text(), comparison_renderable(results)]
    if results.budget:
        parts += [Text(), budget_renderable(results)]
    raised = [verdict for verdict in verdicts if verdict.status in ("issue", "tip")]
    for verdict in raised:
        line = Text(f"{verdict.code} {verdict.status}: ", style=STYLES[verdict.status])
        parts += [Text(), line.append(verdict.message, style="default")]
        parts.append(Text(f"      {verdict.mend}", style="dim"))
    if not raised:
        parts += [Text(), Text(head.issues)]
    return Group(*parts)


def comparison_renderable(results: RunResults) -> Table:
    """Return teacher, student and control as a Rich table."""
    table = Table(
        title="Test split",
        title_justify="left",
        caption="± two standard errors; ~ within noise",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for title in ("Teacher", "Student", "Control", "Against teacher", "Against control"):
        table.add_column(title, justify="right", overflow="fold")
    for row in tables.comparison_rows(results):
        differences = []
        for cell in (row.against_teacher, row.against_control):
            text = Text(cell.text)
            # A sign says better or worse too where a terminal has no colours.
            word = {"within noise": " ~"}.get(cell.judgement, "")
            text.append(word)
            text.stylize(STYLES.get(cell.judgement, ""))
            differences.append(text)
        table.add_row(Text(row.measure), *map(Text, row.values), *differences)
    return table


def budget_renderable(results: RunResults) -> Table:
    """Return the budget as a Rich table."""
    table = Table(title="Budget", title_justify="left")
    table.add_column("", no_wrap=True)
    for title in ("At most", "Measured", "Verdict"):
        table.add_column(title, justify="right", overflow="fold")
    for line, limit, measured in tables.budget_rows(results):
        word = Text(tables.STATUS_WORDS[line.status], style=STYLES[line.status])
        table.add_row(Text(line.name), Text(limit), Text(measured), word)
    return table


def summary_text(results: RunResults, verdicts: Sequence[Verdict] | None = None) -> str:
    """Return the same as plain ASCII-friendly lines, for logs and files."""
    verdicts = run_checks(results) if verdicts is None else verdicts
    head = tables.headline(results, verdicts)
    lines = [head.title, head.sentence, ""]
    header = ["", "teacher", "student", "control", "against teacher", "against control"]
    rows = [
        [row.measure, *row.values, cell_text(row.against_teacher), cell_text(row.against_control)]
        for row in tables.comparison_rows(results)
    ]
    lines += aligned([header, *rows])
    if results.budget:
        budget = [
            [line.name, limit, measured, tables.STATUS_WORDS[line.status]]
            for line, limit, measured in tables.budget_rows(results)
        ]
        lines += ["", *aligned([["budget", "at most", "measured", "verdict"], *budget])]
    raised = [v for v in verdicts if v.status in ("issue", "tip")]
    lines += ["", *(f"{v.code} {v.status}: {v.message}" for v in raised)]
    lines.append(head.issues)
    return formats.plain("\n".join(lines)) + "\n"


def cell_text(cell: tables.Cell) -> str:
    """Return a difference with its judgement in words."""
    return f"{cell.text} ({cell.judgement})" if cell.judgement else cell.text


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as plain lines whose columns line up; the first column is flush left."""
    rows = [[formats.plain(text) for text in row] for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if k == 0 else text.rjust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

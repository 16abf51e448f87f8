"""The terminal's summary."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from understudy.report.results import RunResults
from understudy.report.summary import summary_table, summary_text


def printed(results: RunResults, *, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(summary_table(results))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_table_shows_roles_budget_and_findings(results: RunResults, width: int) -> None:
    text = printed(results, width=width)
    student = results.test("student")
    assert student is not None
    for words in ("Teacher", "Student", "Control", "Accuracy", "num_params", "US001", "US003"):
        assert words in text
    assert f"{100 * student.accuracy:.2f}" in text
    assert "Budget not proven: peak_memory_bytes not measured" in text
    assert max(map(len, text.splitlines())) <= width


def test_plain_text_is_aligned_ascii(results: RunResults) -> None:
    text = summary_text(results)
    assert text.isascii()
    lines = text.splitlines()
    header = next(line for line in lines if "against teacher" in line)
    rows = [line for line in lines if line.startswith(("Brier", "Parameters", "Accuracy"))]
    assert {len(line) for line in rows} <= {len(header)}
    assert "within noise" in text or "better" in text


def test_markup_in_names_is_shown_not_obeyed(values: dict[str, Any]) -> None:
    values["budget"][0]["name"] = "[bold red]num_params[/]"
    assert "[bold red]num_params[/]" in printed(RunResults.from_values(values), width=160)


def test_bare_run_is_told_plainly(bare_values: dict[str, Any]) -> None:
    results = RunResults.from_values(bare_values)
    for text in (printed(results, width=100), summary_text(results)):
        assert "No budget was given" in text
        assert "not evaluated on the test split" in text
        assert "nan" not in text.lower().replace("finance", "")

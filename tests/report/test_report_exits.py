"""Early exits in the report: the curve, the table, and words that are true of the numbers."""

from __future__ import annotations

from typing import Any

import pytest

from understudy.errors import InputError
from understudy.report.exit_curve import exit_charts, exit_rows, exit_sentence
from understudy.report.formats import plain
from understudy.report.render import render_html, render_markdown
from understudy.report.results import RunResults


def row(layer: str, macs: int, **changes: Any) -> dict[str, Any]:
    values = {
        "layer": layer,
        "macs": macs,
        "num_params": 100,
        "file_bytes": 2000,
        "median_ms": 0.1,
        "threshold": 0.9,
        "temperature": 1.0,
        "validation_accuracy": 0.8,
        "test_accuracy": 0.79,
        "share": 0.7,
        "leaver_accuracy": 0.95,
    }
    return values | changes


@pytest.fixture
def exit_values(values: dict[str, Any]) -> dict[str, Any]:
    last = {"threshold": None, "validation_accuracy": 0.9, "test_accuracy": 0.89, "share": 0.3}
    values["exits"] = {
        "target": "accuracy_drop",
        "at_most": 0.005,
        "exits": [
            row("stem<b>", 20_000),
            row("blocks.0", 40_000, threshold=2.0, share=0.0, leaver_accuracy=None),
            row("last", 100_000, **last),
        ],
        "validation": {"accuracy": 0.897, "mean_macs": 44_000.0},
        "test": {"accuracy": 0.885, "mean_macs": 44_000.0},
        "curve": [{"accuracy": 0.8, "mean_macs": 2e4}, {"accuracy": 0.9, "mean_macs": 6e4}],
        "num_threads": 1,
        "num_timed_images": 256,
        "choice_mean_ms": 0.2,
        "last_mean_ms": 0.4,
        "file_bytes": 9000,
    }
    return values


def test_the_sentence_tells_target_outcome_and_time(exit_values: dict[str, Any]) -> None:
    text = plain(exit_sentence(RunResults.from_values(exit_values)))
    assert "an accuracy at most 0.50 points below the last exit's" in text
    assert "88.50 % right with 44.0 k multiply-adds a picture, 44.0 % of the last exit's" in text
    assert "which alone gives 89.00 %" in text
    assert "takes 0.200 ms, the last exit's file 0.400 ms." in text
    exit_values["exits"] |= {"choice_mean_ms": 0.5, "target": "mean_latency_ms", "at_most": 0.3}
    text = plain(exit_sentence(RunResults.from_values(exit_values)))
    assert "the highest accuracy in at most 0.300 ms a picture" in text
    assert text.endswith("deciding costs more time than leaving saves.")


def test_rows_and_curve_hold_the_numbers(exit_values: dict[str, Any]) -> None:
    results = RunResults.from_values(exit_values)
    rows = [[plain(text) for text in row] for row in exit_rows(results)]
    assert rows[0][:3] == ["0", "stem<b>", "20.0 k"]
    assert rows[0][6:] == ["90.0 %", "70.0 %", "95.00 %", "79.00 %"]
    assert rows[1][6:9] == ["never", "0.0 %", "-"]
    assert rows[2][6] == "the rest"
    chart = exit_charts(results)["exits"]
    curve, alone, validation, test = chart.figure["data"]
    assert (curve["x"], curve["y"]) == ([2e4, 6e4], [80.0, 90.0])
    assert alone["x"] == [20_000, 40_000, 100_000]
    assert alone["text"][0] == "stem&lt;b&gt;"  # Plotly reads markup
    assert (validation["y"], test["y"]) == ([89.7], [88.5])


def test_page_and_markdown_show_them_where_there_are_some(exit_values: dict[str, Any]) -> None:
    results = RunResults.from_values(exit_values)
    page = render_html(results, ())
    assert '<h2 id="exits">' in page
    assert "stem&lt;b&gt;" in page
    assert "stem<b>" not in page
    assert "| 1 | blocks.0 |" in render_markdown(results, ())
    del exit_values["exits"]
    results = RunResults.from_values(exit_values)
    assert exit_charts(results) == {}
    assert exit_rows(results) == []
    assert exit_sentence(results) == ""
    assert 'id="exits"' not in render_html(results, ())
    assert "Early exits" not in render_markdown(results, ())


def test_unknown_fields_are_refused(exit_values: dict[str, Any]) -> None:
    exit_values["exits"]["exits"][0]["colour"] = "red"
    with pytest.raises(InputError, match="colour"):
        RunResults.from_values(exit_values)

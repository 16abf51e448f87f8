"""The table of what each layer loses alone in int8, on the page and in Markdown."""

from __future__ import annotations

from typing import Any

import pytest

from understudy.report.formats import plain
from understudy.report.render import render_html, render_markdown
from understudy.report.results import RunResults
from understudy.report.sensitivity import layer_row

WORST = {
    "name": "network.<stem>",
    "num_weights": 1200,
    "kl": 0.01234,
    "top1_agreement": 0.985,
    "accuracy_change": -0.005,
    "in_float": True,
}
OTHER = WORST | {"name": "network.linear", "kl": 0.0, "accuracy_change": None, "in_float": False}


@pytest.fixture
def measured(values: dict[str, Any], compression: dict[str, Any]) -> RunResults:
    return RunResults.from_values(
        values | {"compression": compression, "sensitivity": [WORST, OTHER]}
    )


def test_rows_hold_the_numbers(measured: RunResults) -> None:
    rows = [[plain(text) for text in layer_row(row)] for row in measured.sensitivity]
    assert rows == [
        ["network.<stem>", "1,200", "0.0123", "98.50 %", "-0.50 points", "float"],
        ["network.linear", "1,200", "0", "98.50 %", "not measured", "int8"],
    ]


def test_page_and_markdown_show_the_table(
    measured: RunResults, values: dict[str, Any], compression: dict[str, Any]
) -> None:
    page, markdown = render_html(measured, ()), render_markdown(measured, ())
    assert page.count("Layers in int8, one at a time") == 1
    assert "network.&lt;stem&gt;" in page
    lines = markdown.splitlines()
    (header,) = [k for k, line in enumerate(lines) if line.startswith("| Layer |")]
    assert lines[header - 1] == ""
    assert lines[header + 1] == "|---|---:|---:|---:|---:|---|"
    assert lines[header + 2].startswith(r"| network.\<stem\> | 1,200 | 0.0123 |")
    assert lines[header + 3].startswith("| network.linear |")
    assert lines[header + 4] == ""
    without = RunResults.from_values(values | {"compression": compression})
    assert "one at a time" not in render_html(without, ())
    assert "| Layer |" not in render_markdown(without, ())

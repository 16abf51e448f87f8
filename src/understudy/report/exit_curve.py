"""Early exits in the report: accuracy against mean multiply-adds, and one row an exit."""

from __future__ import annotations

from typing import Any

from understudy.report import formats
from understudy.report.charts import Chart, label
from understudy.report.exit_results import ExitFacts, ExitPoint, ExitRow
from understudy.report.results import RunResults

TARGETS = {
    "accuracy_drop": "the fewest multiply-adds with an accuracy at most {} below the last exit's",
    "mean_macs": "the highest accuracy with at most {} multiply-adds a picture on average",
    "mean_latency_ms": "the highest accuracy in at most {} a picture on average",
}
NOTHING = "\u2014"


def exit_charts(results: RunResults) -> dict[str, Chart]:
    """Return the curve of accuracy against mean multiply-adds where there are exits."""
    if results.exits is None:
        return {}
    facts = results.exits
    traces = [
        trace(
            [(point.mean_macs, point.accuracy) for point in facts.curve],
            name="policies, validation",
            mode="lines",
            line={"color": "@student", "width": 2.5},
        ),
        trace(
            [(row.macs, row.validation_accuracy) for row in facts.exits],
            name="one exit for all, validation",
            mode="markers+text",
            text=[label(row.layer) for row in facts.exits],
            textposition="bottom center",
            marker={"color": "@muted", "symbol": "square", "size": 9},
        ),
        chosen(facts.validation, name="chosen, validation", symbol="circle", colour="@student"),
        chosen(facts.test, name="chosen, test", symbol="diamond", colour="@accent"),
    ]
    layout = {
        "xaxis": {"title": {"text": "mean multiply-adds a picture"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "accuracy (%)"}},
    }
    chart = Chart(
        "exits",
        "Accuracy against mean multiply-adds",
        "What thresholds on confidence can reach on the validation split, against sending every "
        "picture out at the same exit. The test split was read once, for the chosen thresholds.",
        {"data": traces, "layout": layout},
        height_px=400,
    )
    return {chart.name: chart}


def trace(points: list[tuple[float, float]], **style: Any) -> dict[str, Any]:
    """Return a trace over multiply-adds; accuracies are shares."""
    return {
        "type": "scatter",
        "x": [macs for macs, _ in points],
        "y": [100 * accuracy for _, accuracy in points],
        "cliponaxis": False,
        "hovertemplate": "%{y:.2f} % at %{x:.4s} multiply-adds",
        **style,
    }


def chosen(point: ExitPoint, *, name: str, symbol: str, colour: str) -> dict[str, Any]:
    """Return the chosen policy as one large marker."""
    marker = {"color": colour, "symbol": symbol, "size": 13}
    marker["line"] = {"color": "@surface", "width": 1}
    points = [(point.mean_macs, point.accuracy)]
    return trace(points, name=name, mode="markers", marker=marker)


EXIT_COLUMNS = (
    "Exit",
    "Layer",
    "Multiply-adds",
    "Parameters",
    "File",
    "Time",
    "Leave from confidence",
    "Leave here",
    "Right of these",
    "Alone, test",
)


def exit_rows(results: RunResults) -> list[tuple[str, ...]]:
    """Return one row of text an exit, for ``EXIT_COLUMNS``."""
    if results.exits is None:
        return []
    return [
        (
            str(number),
            row.layer,
            formats.large_count(row.macs),
            formats.count(row.num_params),
            formats.size(row.file_bytes),
            formats.milliseconds(row.median_ms),
            threshold_text(row),
            formats.percent(row.share, 1),
            NOTHING if row.leaver_accuracy is None else formats.percent(row.leaver_accuracy),
            formats.percent(row.test_accuracy),
        )
        for number, row in enumerate(results.exits.exits)
    ]


def threshold_text(row: ExitRow) -> str:
    """Return from which confidence on pictures leave at an exit."""
    if row.threshold is None:
        return "the rest"
    return "never" if row.threshold > 1 else formats.percent(row.threshold, 1)


def exit_sentence(results: RunResults) -> str:
    """Return in words what was asked for and what the exits are worth."""
    facts = results.exits
    if facts is None:
        return ""
    last = facts.exits[-1]
    threads = "1 thread" if facts.num_threads == 1 else f"{facts.num_threads} threads"
    return (
        f"Asked for was {TARGETS[facts.target].format(limit_text(facts))}. On the test split the "
        f"chosen thresholds give {formats.percent(facts.test.accuracy)} right with "
        f"{formats.large_count(facts.test.mean_macs)} multiply-adds a picture, "
        f"{formats.percent(facts.test.mean_macs / last.macs, 1)} of the last exit's, which alone "
        f"gives {formats.percent(last.test_accuracy)}. Over {facts.num_timed_images} test pictures "
        f"one at a time with {threads}, the file with the choice inside "
        f"({formats.size(facts.file_bytes)}) takes {formats.milliseconds(facts.choice_mean_ms)}, "
        f"the last exit's file {formats.milliseconds(facts.last_mean_ms)}{verdict(facts)}."
    )


def verdict(facts: ExitFacts) -> str:
    """Say where fewer multiply-adds are no less time: the choice itself costs some."""
    if facts.choice_mean_ms < facts.last_mean_ms:
        return ""
    return ": for a network this small, deciding costs more time than leaving saves"


def limit_text(facts: ExitFacts) -> str:
    """Return the target's limit with its unit."""
    if facts.target == "accuracy_drop":
        return f"{formats.fixed(100 * facts.at_most, 2)}{formats.GAP}points"
    if facts.target == "mean_macs":
        return formats.large_count(facts.at_most)
    return formats.milliseconds(facts.at_most)

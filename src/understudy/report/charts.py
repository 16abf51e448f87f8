"""The page's charts as plain Plotly figures, drawn by the browser when they come into view.

A colour is written ``@name`` and replaced by the page with the one of the light or dark theme.
Plotly reads markup in labels, so every text that a user wrote is escaped here.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from understudy.report.formats import percent
from understudy.report.results import ROLES, Role, RunResults, SplitMetrics

# Roles differ in dash and marker too: colour alone is not enough for everyone.
DASHES: dict[Role, str] = {"teacher": "dot", "student": "solid", "control": "dash"}
SYMBOLS: dict[Role, str] = {"teacher": "square", "student": "circle", "control": "diamond"}
BAR_PATTERNS: dict[Role, str] = {"teacher": ".", "student": "", "control": "/"}
TERM_COLOURS = ("@student", "@control", "@teacher", "@accent", "@muted")
TERM_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

MAX_BAR_CLASSES = 25
MAX_UPRIGHT_BARS = 12
MAX_TABLE_CLASSES = 20
MAX_LABEL_CHARACTERS = 18


@dataclass(frozen=True)
class Chart:
    """One chart: ``figure`` has Plotly's data and layout, ``description`` says what it shows."""

    name: str
    title: str
    description: str
    figure: dict[str, Any]
    height_px: int = 330


def label(text: str) -> str:
    """Return a user's text as a Plotly label: markup escaped, one line, not too long."""
    text = " ".join(text.split())
    if len(text) > MAX_LABEL_CHARACTERS:
        text = text[: MAX_LABEL_CHARACTERS - 1] + "\u2026"
    return html.escape(text, quote=False)


def all_charts(results: RunResults) -> dict[str, Chart]:
    """Return every chart that the results have numbers for, by name."""
    charts = [
        loss_chart(results),
        term_chart(results),
        accuracy_chart(results),
        nll_chart(results),
        learning_rate_chart(results),
        class_chart(results),
        calibration_chart(results),
        confusion_chart(results),
    ]
    return {chart.name: chart for chart in charts if chart is not None}


def line(
    points: list[tuple[int, float]],
    *,
    name: str,
    colour: str,
    dash: str,
    unit: str = "",
    width: float = 2.5,
) -> dict[str, Any]:
    """Return one line over epochs."""
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 1 else "markers",
        "name": html.escape(name, quote=False),
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": colour, "dash": dash, "width": width},
        "hovertemplate": f"epoch %{{x}}: %{{y:.4g}}{unit}",
    }


def epochs_layout(y_title: str, **y_axis: Any) -> dict[str, Any]:
    """Return the layout of a chart over epochs."""
    return {
        "xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": y_title}, **y_axis},
        "hovermode": "x unified",
    }


def role_lines(results: RunResults, column: str) -> list[dict[str, Any]]:
    """Return one line for each role whose column was logged."""
    lines = []
    for role in ROLES:
        points = results.curve(role, column)
        if points:
            lines.append(line(points, name=role, colour=f"@{role}", dash=DASHES[role]))
    return lines


def loss_chart(results: RunResults) -> Chart | None:
    """Return the training loss of every role."""
    lines = role_lines(results, "train_loss")
    return lines_chart(
        "loss",
        "Training loss",
        "Mean loss of each epoch. Losses of different recipes have different terms: compare "
        "their shape, not their height.",
        lines,
        "loss (nats)",
    )


def lines_chart(
    name: str, title: str, description: str, lines: list[dict[str, Any]], y_title: str
) -> Chart | None:
    """Return a chart over epochs, or None where there is no line."""
    if not lines:
        return None
    return Chart(name, title, description, {"data": lines, "layout": epochs_layout(y_title)})


def term_chart(results: RunResults) -> Chart | None:
    """Return the student's loss terms where there is more than one."""
    names = sorted({name for row in results.curves.get("student", ()) for name in losses(row)})
    if len(names) < 2:
        return None
    lines = [
        line(
            results.curve("student", f"losses/{name}"),
            name=name,
            colour=TERM_COLOURS[number % len(TERM_COLOURS)],
            dash=TERM_DASHES[number % len(TERM_DASHES)],
        )
        for number, name in enumerate(names)
    ]
    whose = "the student's loss"
    if any(name.startswith(("teacher_", "peer")) for name in names):
        whose += ", and of the losses of what was trained beside it"
    description = f"Mean of each term of {whose}: {', '.join(names)}."
    return lines_chart("terms", "Loss terms of the student", description, lines, "loss (nats)")


def losses(row: dict[str, Any]) -> dict[str, Any]:
    """Return the loss terms of one logged row."""
    return row.get("losses") or {}


def accuracy_chart(results: RunResults) -> Chart | None:
    """Return train and validation accuracy, with the teacher's as a level to reach."""
    lines = []
    for role in ("student", "control"):
        for split, dash, width in (("validation", DASHES[role], 2.5), ("train", "dot", 1.5)):
            points = [(x, 100 * y) for x, y in results.curve(role, f"{split}_accuracy")]
            if points:
                name = f"{role}, {split}"
                lines.append(
                    line(points, name=name, colour=f"@{role}", dash=dash, width=width, unit=" %")
                )
    if not lines:
        return None
    teacher = results.metrics.get("teacher", {}).get("validation")
    if teacher is not None:
        last = max(max(item["x"]) for item in lines)
        level = 100 * teacher.accuracy
        points = [(1, level), (last, level)]
        name = "teacher, validation"
        lines.append(line(points, name=name, colour="@teacher", dash="longdashdot", unit=" %"))
    description = (
        "Accuracy on the validation split and on the training views. Training views are "
        "harder than untouched images, so train accuracy may be the lower one."
    )
    chart = lines_chart("accuracy", "Accuracy", description, lines, "accuracy (%)")
    if chart is not None:
        ys = [y for item in lines for y in item["y"]]
        # The start of training would squeeze the part that matters into a corner.
        low = max(0.0, min(max(ys) - 30, sorted(ys)[len(ys) // 20] - 2))
        chart.figure["layout"]["yaxis"]["range"] = [low, min(101.0, max(ys) + 2)]
    return chart


def nll_chart(results: RunResults) -> Chart | None:
    """Return the validation NLL of every role."""
    return lines_chart(
        "nll",
        "Validation loss",
        "Negative log-likelihood on the validation split. A rise while accuracy stays is "
        "over-confidence.",
        role_lines(results, "validation_nll"),
        "NLL (nats an image)",
    )


def learning_rate_chart(results: RunResults) -> Chart | None:
    """Return the learning rate of every role."""
    return lines_chart(
        "learning-rate",
        "Learning rate",
        "Learning rate at the end of each epoch.",
        role_lines(results, "learning_rate"),
        "learning rate",
    )


def class_order(results: RunResults) -> list[int]:
    """Return the classes to show: all, or the student's worst where there are too many."""
    student = results.test("student")
    num_classes = len(results.data.class_names)
    if student is None or num_classes <= MAX_BAR_CLASSES:
        return list(range(num_classes))
    rates = student.per_class_accuracy
    rated = [k for k in range(num_classes) if rates[k] is not None]
    return sorted(rated, key=lambda k: (rates[k], k))[:MAX_BAR_CLASSES]


def class_chart(results: RunResults) -> Chart | None:
    """Return each class's accuracy as bars, one colour a role."""
    tested = {role: metrics for role in ROLES if (metrics := results.test(role))}
    if not tested:
        return None
    order = class_order(results)
    names = [label(results.data.class_names[k]) for k in order]
    # Many or long names are readable only beside bars that lie.
    upright = len(order) <= MAX_UPRIGHT_BARS and max(map(len, names)) <= 8
    bars = [class_bars(role, tested[role], order, names, upright=upright) for role in tested]
    classes = {
        "title": {"text": "class"},
        # Positions, not names: two long names may be cut to the same label.
        "tickvals": list(range(len(order))),
        "ticktext": names,
        "range": [-0.6, len(order) - 0.4] if upright else [len(order) - 0.4, -0.6],
    }
    rates = {"title": {"text": "accuracy (%)"}, "range": [0, 101]}
    axes = {"xaxis": classes, "yaxis": rates} if upright else {"xaxis": rates, "yaxis": classes}
    shown = "" if len(order) == len(results.data.class_names) else f" The {len(order)} lowest."
    return Chart(
        "classes",
        "Accuracy by class",
        f"Share of each class's test images that is answered right.{shown}",
        {"data": bars, "layout": {"barmode": "group", **axes}},
        height_px=340 if upright else 110 + 30 * len(order),
    )


def class_bars(
    role: Role, metrics: SplitMetrics, order: list[int], names: list[str], *, upright: bool
) -> dict[str, Any]:
    """Return one role's bars, upright or lying."""
    rates = [metrics.per_class_accuracy[k] for k in order]
    lengths = [None if rate is None else 100 * rate for rate in rates]
    positions = list(range(len(order)))
    return {
        "type": "bar",
        "orientation": "v" if upright else "h",
        "name": role,
        "x": positions if upright else lengths,
        "y": lengths if upright else positions,
        "customdata": names,
        "marker": {
            "color": f"@{role}",
            "pattern": {
                "shape": BAR_PATTERNS[role],
                "fillmode": "overlay",
                "fgcolor": "@surface",
                "size": 6,
                "solidity": 0.25,
            },
        },
        "hovertemplate": "%{customdata}: %{" + ("y" if upright else "x") + ":.2f} %",
    }


def calibration_chart(results: RunResults) -> Chart | None:
    """Return confidence against accuracy, one marker a bin, larger for more images."""
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "perfect",
            "x": [0, 100],
            "y": [0, 100],
            "line": {"color": "@muted", "dash": "dot", "width": 1.5},
            "hoverinfo": "skip",
        }
    ]
    for role in ROLES:
        metrics = results.test(role)
        if metrics is not None and any(item.count for item in metrics.calibration_bins):
            traces.append(calibration_trace(role, metrics))
    if len(traces) == 1:
        return None
    layout = {
        "xaxis": {"title": {"text": "confidence (%)"}, "range": [0, 102]},
        "yaxis": {"title": {"text": "accuracy (%)"}, "range": [0, 102]},
    }
    return Chart(
        "calibration",
        "Confidence against accuracy",
        "A point below the diagonal is a model that is too sure of itself. The larger the "
        "point, the more test images have that confidence.",
        {"data": traces, "layout": layout},
        height_px=400,
    )


def calibration_trace(role: Role, metrics: SplitMetrics) -> dict[str, Any]:
    """Return one role's bins."""
    bins = [
        (100 * item.confidence, 100 * item.accuracy, item.count)
        for item in metrics.calibration_bins
        if item.confidence is not None and item.accuracy is not None and item.count
    ]
    largest = max(number for _, _, number in bins)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": role,
        "x": [confidence for confidence, _, _ in bins],
        "y": [accuracy for _, accuracy, _ in bins],
        "cliponaxis": False,
        "customdata": [number for _, _, number in bins],
        "line": {"color": f"@{role}", "dash": DASHES[role], "width": 1.2},
        "marker": {
            "color": f"@{role}",
            "symbol": SYMBOLS[role],
            "size": [7 + 15 * (number / largest) ** 0.5 for _, _, number in bins],
            "opacity": 0.85,
            "line": {"color": "@surface", "width": 1},
        },
        "hovertemplate": (
            "confidence %{x:.1f} %, accuracy %{y:.1f} %, %{customdata} images"
            f"<extra>{role}</extra>"
        ),
    }


def confusion_chart(results: RunResults) -> Chart | None:
    """Return the student's confusion matrix where it is too large for a table."""
    student = results.test("student")
    num_classes = len(results.data.class_names)
    if student is None or num_classes <= MAX_TABLE_CLASSES:
        return None
    rates = [[100 * number / max(sum(row), 1) for number in row] for row in student.confusion]
    names = [label(name) for name in results.data.class_names]
    ticks = list(range(num_classes)) if num_classes <= MAX_BAR_CLASSES else []
    axis = {"tickvals": ticks, "ticktext": [names[k] for k in ticks], "constrain": "domain"}
    heatmap = {
        "type": "heatmap",
        "z": [[round(rate, 2) for rate in row] for row in rates],
        "customdata": [[f"{true} taken for {taken}" for taken in names] for true in names]
        if num_classes <= 200
        else None,
        "colorscale": [[0, "@surface"], [1, "@student"]],
        # The diagonal would drown the mistakes, which are what one looks for.
        "zmin": 0,
        "zmax": max(
            5.0, max(r for i, row in enumerate(rates) for j, r in enumerate(row) if i != j)
        ),
        "colorbar": {"title": {"text": "% of row", "font": {"size": 12}}, "thickness": 14},
        "hovertemplate": "%{customdata}: %{z} %<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "student's answer"}, **axis},
        "yaxis": {"title": {"text": "true class"}, "autorange": "reversed", **axis},
    }
    return Chart(
        "confusion",
        "Confusion matrix of the student",
        f"Rows are true classes, columns the student's answers, in % of the row; the diagonal is "
        f"what it gets right, {percent(student.accuracy)} of all.",
        {"data": [heatmap], "layout": layout},
        height_px=560,
    )

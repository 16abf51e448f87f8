"""The lab's figures: curves, grids, and the ways of teaching, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from understudy.lab.paper_readings import (
    reading_of_dropout,
    reading_of_grid,
    reading_of_online,
    reading_of_pretrained,
    seconds_with_teacher,
)
from understudy.lab.paper_values import (
    ACCURACIES,
    EPOCHS,
    OFFLINE_HOURS,
    ONLINE_HOURS,
    PARAMETERS,
    PRETRAINED_ACCURACY,
    PRETRAINED_SECONDS,
    VIT_ACCURACY,
)
from understudy.report.charts import Chart
from understudy.report.document import Grid, Part
from understudy.report.formats import NOT_MEASURED, count, fixed, percent, points

COLOURS = ("@student", "@teacher", "@control", "@accent", "@muted")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def curves_chart(name: str, title: str, networks: Mapping[str, Any], *, column: int) -> Chart:
    """Return one line a network over epochs."""
    lines = []
    for number, (network, found) in enumerate(networks.items()):
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": network,
                "x": [row[0] for row in found["curve"]],
                "y": [row[column] for row in found["curve"]],
                "line": {
                    "color": COLOURS[number % len(COLOURS)],
                    "dash": DASHES[(number // len(COLOURS) + number) % len(DASHES)],
                },
            }
        )
    layout = {
        "xaxis": {"title": {"text": "epoch"}},
        "yaxis": {"title": {"text": title.lower()}, "tickformat": ".0%"},
    }
    return Chart(name, title, "Every network over its epochs.", {"data": lines, "layout": layout})


def dropout_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return the student's accuracy for each rate."""
    curves = payload["curves"]
    rows = tuple(
        (rate, str(int(curve[-1][0])), percent(curve[-1][1]), percent(curve[-1][2]))
        for rate, curve in curves.items()
    )
    titles = ("Rate", "Epochs", "Training accuracy", "Validation accuracy")
    theirs = ACCURACIES["Student"]
    caption = (
        f"The paper's student: {percent(theirs[0])} and {percent(theirs[1])} at {EPOCHS} epochs."
    )
    shown = {f"dropout {rate}": {"curve": curve} for rate, curve in curves.items()}
    chart = curves_chart("dropout", "Validation accuracy", shown, column=2)
    return (Grid(caption, titles, rows), chart, reading_of_dropout(payload))


def online_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return both ways of teaching side by side."""
    online, offline = payload["curve"][-1], payload["offline_curve"][-1]
    hours = (payload["epoch_seconds"] / 36, payload["offline_epoch_seconds"] / 36)
    rows = (
        ("online", percent(online[2]), f"{ONLINE_HOURS:g} h", f"{fixed(hours[0], 2)} h"),
        ("offline", percent(offline[2]), f"{OFFLINE_HOURS:g} h", f"{fixed(hours[1], 2)} h"),
    )
    caption = (
        f"After {int(online[0])} epochs; hours are for {EPOCHS} epochs at the median time of one: "
        "online teacher and student together, offline the teacher's and then the student's. "
        f"Labelling between the two, once: {seconds(payload['label_seconds'], 0)}."
    )
    shown = {
        "TS Online": {"curve": payload["curve"]},
        "TS 6 (offline)": {"curve": payload["offline_curve"]},
    }
    return (
        Grid(caption, ("Way", "Validation accuracy", "Time, paper", "Here"), rows),
        curves_chart("online", "Validation accuracy", shown, column=2),
        reading_of_online(payload),
    )


def pretrained_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return the student of the large teacher, and what an epoch costs with and without a store."""
    epoch, _, validation = payload["curve"][-1]
    teacher = payload["teacher_accuracy"]
    rows = (
        (
            "student's validation accuracy",
            percent(PRETRAINED_ACCURACY),
            percent(validation),
            points(validation - PRETRAINED_ACCURACY),
        ),
        ("epoch with stored outputs", "", seconds(payload["epoch_seconds"], 1), ""),
        (
            "epoch that runs the teacher",
            f"{PRETRAINED_SECONDS:g} s",
            seconds(seconds_with_teacher(payload), 1),
            "",
        ),
        (
            "teacher's parameters",
            count(PARAMETERS["ViT-B/16, 10 classes"]),
            count(payload["teacher_params"]),
            "",
        ),
        (
            "teacher's validation accuracy",
            percent(VIT_ACCURACY),
            percent(teacher),
            points(teacher - VIT_ACCURACY),
        ),
    )
    caption = (
        f"Teacher here: {payload['teacher']}; {int(epoch)} epochs. Without the store an epoch has "
        "the teacher's pass over the training pictures besides, which labelling timed."
    )
    titles = ("", "Paper (ViT)", "Here", "Points")
    return (Grid(caption, titles, rows), reading_of_pretrained(payload))


def seconds(value: float | None, digits: int) -> str:
    """Return seconds."""
    return NOT_MEASURED if value is None else f"{fixed(value, digits)} s"


def grid_parts(payload: Mapping[str, Any], path: str, title: str) -> tuple[Part, ...]:
    """Return accuracy over one varied parameter."""
    found = sorted((point["settings"][path], point["curve"]) for point in payload["points"])
    rows = tuple(
        (f"{value:g}", str(int(curve[-1][0])), percent(curve[-1][1]), percent(curve[-1][2]))
        for value, curve in found
    )
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [value for value, _ in found],
            "y": [curve[-1][column] for _, curve in found],
            "line": {"color": colour},
        }
        for column, name, colour in ((1, "training", "@control"), (2, "validation", "@student"))
    ]
    axis: dict[str, Any] = {"title": {"text": title}}
    if path.endswith("temperature"):
        axis["type"] = "log"
    layout = {"xaxis": axis, "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%"}}
    chart = Chart(path.split(".")[-1], title, "After the last epoch.",
                  {"data": data, "layout": layout})  # fmt: skip
    titles = (title, "Epochs", "Training accuracy", "Validation accuracy")
    return (
        Grid("Taught by Teacher 6.", titles, rows),
        chart,
        reading_of_grid(path, found, payload),
    )


def alpha_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return Figure 3."""
    return grid_parts(payload, "distillation.kl_weight", "alpha")


def temperature_parts(payload: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return Figure 4."""
    return grid_parts(payload, "distillation.temperature", "temperature")

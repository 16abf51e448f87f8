"""A design search as a page, as Markdown and in the terminal. Reads plain attributes only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from understudy.report.charts import Chart
from understudy.report.document import Chapter, Document, Grid
from understudy.report.formats import count, fixed, large_count, percent, significant, size
from understudy.report.summary import aligned

TITLES = (
    "Candidate",
    "Network",
    "Epochs",
    "Validation accuracy",
    "Parameters",
    "Multiply-adds",
    "Activations",
    "Latency",
    "Training step",
    "Whole training",
)


def design_document(design: Any, *, facts: tuple[str, ...]) -> Document:
    """Return everything that a design search found; ``design`` is ``recipes.design.Design``."""
    front = set(design.front)
    best_rows = tuple(row(design, score) for k, score in enumerate(design.scores) if k in front)
    note = "Accuracies of different numbers of epochs do not compare; the test split was not read."
    if design.failed:
        note += f" The training failed of {', '.join(map(str, design.failed))}: see design.json."
    networks = tuple(
        (str(item.number), item.name, ", ".join(f"{k}={v}" for k, v in item.arguments.items()))
        for item in design.candidates
    )
    return Document(
        eyebrow="design",
        title=design.name,
        headline=headline(design),
        facts=facts,
        chapters=(
            Chapter(
                "Pareto front",
                (
                    front_chart(design),
                    Grid(
                        "No other candidate of the last round is as accurate, small, fast and "
                        "frugal at once.",
                        TITLES,
                        best_rows,
                        texts=(1,),
                    ),
                    design.gap,
                ),
            ),
            Chapter(
                "Candidates",
                (
                    Grid(note, TITLES, tuple(row(design, s) for s in design.scores), texts=(1,)),
                    Grid("The networks.", ("Candidate", "Family", "Arguments"), networks, (1, 2)),
                ),
            ),
            Chapter("How", (how(design),)),
        ),
    )


def headline(design: Any) -> str:
    """Return the answer in a sentence."""
    best = design.scores[0]
    item = design.candidate(best.candidate)
    return (
        f"Candidate {item.number}, {item.name}: {percent(best.accuracy)} on validation with "
        f"{count(item.num_params)} parameters after {design.plan['epochs'][best.rung]} epochs."
    )


def how(design: Any) -> str:
    """Return how candidates were found and compared."""
    plan = design.plan
    limits = ", ".join(limit(name, value) for name, value in design.budget.items() if value)
    if design.budget.get("num_params"):
        limits += f"; at least {percent(plan['fill'], 0)} of its parameters used"
    return (
        f"{count(design.num_drawn)} networks of the families {', '.join(plan['families'])} were "
        f"drawn until {len(design.candidates)} kept the budget ({limits}). Rounds of "
        f"{', '.join(map(str, plan['epochs']))} epochs, each a whole short schedule with the "
        f"teacher's stored outputs; every round keeps one in {plan['factor']}. Activations: peak "
        "of float32 tensors for one picture. Latency: exported with first weights, in ONNX "
        "Runtime. Whole training: the recipe's epochs at the measured time of a step, which is "
        "the student's alone with cross-entropy, in float32 on this machine's processor."
    )


def limit(name: str, value: Any) -> str:
    """Return one limit of a budget as text."""
    if not isinstance(value, Mapping):
        return f"{name} {value}"
    setting = " ".join(f"{key} {value[key]}" for key in value if key != "at_most")
    return f"{name} {value['at_most']:g} ({setting})"


def row(design: Any, score: Any) -> tuple[str, ...]:
    """Return one candidate's figures as text."""
    item = design.candidate(score.candidate)
    return (
        str(item.number),
        item.name,
        str(design.plan["epochs"][score.rung]),
        percent(score.accuracy),
        count(item.num_params),
        large_count(item.macs),
        size(item.peak_activation_bytes),
        f"{significant(item.latency_ms)} ms",
        f"{significant(item.step_ms)} ms",
        f"{fixed(design.hours[item.number], 2)} h",
    )


def front_chart(design: Any) -> Chart:
    """Return accuracy against parameters for the last round."""
    last = [score for score in design.scores if score.rung == design.scores[0].rung]
    front = set(design.front)
    data = []
    for name, colour, chosen in (("others", "@muted", False), ("front", "@accent", True)):
        some = [score for k, score in enumerate(last) if (k in front) is chosen]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [design.candidate(score.candidate).num_params for score in some],
                "y": [score.accuracy for score in some],
                "text": [f"candidate {score.candidate}" for score in some],
                "marker": {"color": colour, "size": 9},
            }
        )
    layout = {
        "xaxis": {"title": {"text": "parameters"}},
        "yaxis": {"title": {"text": "validation accuracy"}, "tickformat": ".1%"},
    }
    text = "Candidates of the last round; the front also counts latency and activation memory."
    return Chart("front", "Accuracy against size", text, {"data": data, "layout": layout})


def design_text(design: Any) -> str:
    """Return headline, table and advice as plain lines."""
    rows = [list(row(design, score)) for score in design.scores]
    return "\n".join([headline(design), "", *aligned([list(TITLES), *rows]), "", design.gap])

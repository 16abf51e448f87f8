"""A search as a page, as Markdown and in the terminal."""

from __future__ import annotations

import html
from typing import Any

from understudy.report.charts import Chart
from understudy.report.document import Chapter, Document, Grid, Part
from understudy.report.formats import count, duration, fixed, percent, significant
from understudy.report.summary import aligned
from understudy.search.plan import OBJECTIVES
from understudy.search.results import SearchResults, TrialRow

TITLES = {
    "accuracy": "Validation accuracy",
    "nll": "Validation NLL",
    "ece": "Validation ECE",
    "num_params": "Parameters",
    "macs": "Multiply-adds",
    "latency_ms": "Latency",
    "train_seconds": "Training time",
}


def search_document(results: SearchResults, *, facts: tuple[str, ...]) -> Document:
    """Return everything that a search found."""
    chapters = [Chapter("Best", best_parts(results)), Chapter("Trials", trial_parts(results))]
    if results.importances:
        chapters.append(Chapter("What mattered", importance_parts(results)))
    chapters.append(Chapter("How", how_parts(results)))
    return Document(
        eyebrow="search",
        title=results.name,
        headline=headline(results),
        facts=facts,
        chapters=tuple(chapters),
        kind="good" if results.best else "open",
    )


def headline(results: SearchResults) -> str:
    """Return the answer in a sentence."""
    num = len(results.complete)
    if not results.best:
        return f"No trial of {len(results.trials)} is complete."
    rows = {row.number: row for row in results.trials}
    first = rows[results.best[0]]
    told = ", ".join(f"{p}={shown(v)}" for p, v in first.settings.items())
    if len(results.objectives) == 1:
        name = results.objectives[0]
        return f"Best of {num}: trial {first.number}, {measure(name, first)}, with {told}."
    return f"{len(results.best)} of {num} trials are on the Pareto front."


def best_parts(results: SearchResults) -> tuple[Part, ...]:
    """Return the trials that no other beats, and the front where there are two objectives."""
    rows = {row.number: row for row in results.trials}
    table = trial_grid(
        results,
        [rows[number] for number in results.best],
        "No other trial is as good in every objective. Measured on the validation split; the test "
        "split was not read.",
    )
    chart = front_chart(results)
    return (table,) if chart is None else (chart, table)


def trial_parts(results: SearchResults) -> tuple[Part, ...]:
    """Return history and table of all trials."""
    charts = [history_chart(results), *slice_charts(results)]
    note = (
        "Stopped trials were behind the others at the same epoch; failed ones have their reason "
        "in search.json."
    )
    return (
        *(chart for chart in charts if chart is not None),
        trial_grid(results, list(results.trials), note),
    )


def importance_parts(results: SearchResults) -> tuple[Part, ...]:
    """Return each parameter's share of the variance."""
    paths = list(next(iter(results.importances.values())))
    rows = tuple(
        (path, *(percent(shares.get(path, 0.0)) for shares in results.importances.values()))
        for path in paths
    )
    caption = (
        "Share of the objective's variance over the complete trials that a parameter explains by "
        "itself (functional ANOVA, Hutter, Hoos and Leyton-Brown 2014), from "
        f"{len(results.complete)} trials: with few, a rough guide. What is left to 100 % is of "
        "several parameters together."
    )
    titles = ("Parameter", *(TITLES[name] for name in results.importances))
    return (Grid(caption, titles, rows),)


def how_parts(results: SearchResults) -> tuple[Part, ...]:
    """Return what was varied, and how."""
    space = tuple((path, text) for path, text in results.plan["space"].items())
    return (
        f"Sampler {results.plan['sampler']}, seed {results.plan['seed']}; objectives "
        f"{', '.join(f'{name} ({OBJECTIVES[name]})' for name in results.objectives)}. Every trial "
        "trains the student alone, without its control, and is judged on the validation split.",
        Grid("The space.", ("Parameter", "Values"), space, texts=(1,)),
    )


def trial_grid(results: SearchResults, rows: list[TrialRow], caption: str) -> Grid:
    """Return trials as a table."""
    paths = list(results.plan["space"])
    names = list(dict.fromkeys([*results.objectives, "accuracy", "num_params"]))
    titles = ("Trial", "State", *paths, *(TITLES[name] for name in names), "Time")
    cells = tuple(
        (
            str(row.number),
            row.state,
            *(shown(row.settings.get(path, "")) for path in paths),
            *(measure(name, row) for name in names),
            "" if row.seconds is None else duration(row.seconds),
        )
        for row in rows
    )
    return Grid(caption, titles, cells, texts=(1,))


def shown(value: Any) -> str:
    """Return a setting as text."""
    return significant(value, 4) if isinstance(value, float) else str(value)


def measure(name: str, row: TrialRow) -> str:
    """Return a measure of a trial with its unit; empty where there is none."""
    value = row.measures.get(name)
    if value is None:
        return ""
    if name == "accuracy":
        return percent(value)
    if name in ("num_params", "macs"):
        return count(value)
    if name == "latency_ms":
        return f"{significant(value, 3)} ms"
    return duration(value) if name == "train_seconds" else fixed(value, 3)


def history_chart(results: SearchResults) -> Chart | None:
    """Return the first objective of every trial, and the best so far."""
    name, rows = results.objectives[0], results.complete
    if len(rows) < 2:
        return None
    values = [row.measures[name] for row in rows]
    better = max if OBJECTIVES[name] == "maximize" else min
    best = [better(values[: k + 1]) for k in range(len(values))]
    numbers = [row.number for row in rows]
    data = [
        points(numbers, values, name="trial", colour="@student"),
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": numbers,
            "y": best,
            "line": {"color": "@accent", "shape": "hv"},
        },
    ]
    return Chart("history", "History", f"{TITLES[name]} of each trial.", axes(data, "trial", name))


def slice_charts(results: SearchResults) -> list[Chart]:
    """Return the first objective against each parameter."""
    name, rows = results.objectives[0], results.complete
    charts = []
    for number, path in enumerate(results.plan["space"]) if len(rows) > 1 else ():
        values = [row.settings[path] for row in rows]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        x = values if numeric else [html.escape(str(value)) for value in values]
        data = [points(x, [r.measures[name] for r in rows], name="trial", colour="@student")]
        figure = axes(data, html.escape(path), name)
        figure["layout"]["showlegend"] = False
        if ":" in results.plan["space"][path] and "log" in results.plan["space"][path]:
            figure["layout"]["xaxis"]["type"] = "log"
        elif not numeric:
            figure["layout"]["xaxis"]["type"] = "category"
        charts.append(Chart(f"slice-{number}", path, f"{TITLES[name]} by this one.", figure, 260))
    return charts


def front_chart(results: SearchResults) -> Chart | None:
    """Return the first two objectives against each other."""
    if len(results.objectives) < 2 or not results.best:
        return None
    first, second = results.objectives[:2]
    rows, best = results.complete, set(results.best)
    front = sorted((r for r in rows if r.number in best), key=lambda r: r.measures[second])
    rest = [row for row in rows if row.number not in best]
    data = [
        points(
            [row.measures[second] for row in some],
            [row.measures[first] for row in some],
            name=title,
            colour=colour,
        )
        for some, title, colour in ((rest, "others", "@muted"), (front, "front", "@accent"))
    ]
    data[1] |= {"mode": "lines+markers", "line": {"color": "@accent", "dash": "dot"}}
    return Chart(
        "front", "Pareto front", f"{TITLES[first]} against {TITLES[second].lower()}.",
        axes(data, TITLES[second], first),
    )  # fmt: skip


def points(x: list[Any], y: list[Any], *, name: str, colour: str) -> dict[str, Any]:
    """Return markers."""
    marker = {"color": colour, "size": 8}
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": marker}


def axes(data: list[dict[str, Any]], x_title: str, objective: str) -> dict[str, Any]:
    """Return a figure with titled axes."""
    y_axis: dict[str, Any] = {"title": {"text": TITLES[objective].lower()}}
    if objective == "accuracy":
        y_axis["tickformat"] = ".1%"
    return {"data": data, "layout": {"xaxis": {"title": {"text": x_title}}, "yaxis": y_axis}}


def search_text(results: SearchResults) -> str:
    """Return headline, trials and importances as plain lines."""
    grid = trial_grid(results, list(results.trials), "")
    lines = [headline(results), "", *aligned([list(grid.titles), *map(list, grid.rows)])]
    for name, shares in results.importances.items():
        told = ", ".join(f"{path} {percent(share)}" for path, share in shares.items())
        lines += ["", f"importance for {name}: {told}"]
    return "\n".join(lines)

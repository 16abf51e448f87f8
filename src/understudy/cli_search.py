"""The commands that look for better values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from understudy.cli_groups import SetOption
from understudy.errors import EXIT_FAILURE


def search(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe, or the folder of a search to go on with."),
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            "--space",
            metavar="PATH=VALUES|FILE",
            help="log:0.01..0.5, 0..1, int:1..8, 1|2|4 or 1 - OTHER; repeatable. Default: learning "
            "rate, weights, temperature, augmentation strength.",
        ),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="tpe, grid, random or nsga2. Default: tpe.")
    ] = None,
    pruner: Annotated[
        str | None, typer.Option(help="median, halving, hyperband or none. Default: median.")
    ] = None,
    objectives: Annotated[
        list[str] | None,
        typer.Option("--objective", metavar="NAME", help="Default: accuracy. Repeatable."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="In all. Default: 20, or the whole grid.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes.")] = 1,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL", help="Default: a file in the folder.")
    ] = None,
    changes: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: runs/NAME-search.")
    ] = None,
) -> None:
    """Try settings of a recipe, on validation only; given its folder, a search goes on."""
    from understudy import stages
    from understudy.recipes.search import BEST_NAME, PAGE_NAME
    from understudy.report.search_views import search_text

    results = stages.search(
        recipe,
        space=space or None,
        sampler=sampler,
        pruner=pruner,
        objectives=objectives or None,
        trials=trials,
        workers=workers,
        storage=storage,
        changes=changes or (),
        out=out,
    )
    print(search_text(results))
    folder = results.folder
    print(f"report: {Path(folder) / PAGE_NAME}.html")
    if not results.best:
        raise typer.Exit(EXIT_FAILURE)
    print(f"recipe: {Path(folder) / BEST_NAME}")


def design(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="LIMIT=VALUE",
            help="As num_params=12000, latency_ms=50 (one picture, one thread), train_hours=2; "
            "repeatable. Default: the recipe's.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="A device profile's limits.")
    ] = None,
    families: Annotated[
        list[str] | None,
        typer.Option("--family", help="inverted, separable, resnet, paper_student; repeatable."),
    ] = None,
    candidates: Annotated[int, typer.Option("--candidates", help="In the first round.")] = 18,
    epochs: Annotated[
        list[int] | None, typer.Option("--epochs", help="Of each round. Default: 1, 3 and 9.")
    ] = None,
    factor: Annotated[int, typer.Option("--factor", help="A round keeps one in so many.")] = 3,
    fill: Annotated[
        float, typer.Option("--fill", help="Least share of num_params that a candidate uses.")
    ] = 0.5,
    changes: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: runs/NAME-design.")
    ] = None,
) -> None:
    """Look for a student's architecture under a budget; the same command continues a search."""
    from understudy import stages
    from understudy.recipes.design import BEST_NAME, DesignPlan
    from understudy.recipes.design_job import page_of
    from understudy.report.design_views import design_text

    default = DesignPlan()
    plan = DesignPlan(
        families=tuple(families or default.families),
        num_candidates=candidates,
        epochs=tuple(epochs or default.epochs),
        factor=factor,
        fill=fill,
    )
    found = stages.design(
        recipe, budget=budget or (), device=device, plan=plan, changes=changes or (), out=out
    )
    print(design_text(found))
    print(f"report: {page_of(found)}")
    print(f"recipe: {Path(found.folder) / BEST_NAME}")

"""The command's groups: recipes, heads, teachers, stored outputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

recipes_app = typer.Typer(help="Recipes that are shipped with the package.", no_args_is_help=True)
teachers_app = typer.Typer(help="Teachers to choose from.", no_args_is_help=True)
store_app = typer.Typer(help="Stored teacher outputs.", no_args_is_help=True)
heads_app = typer.Typer(
    help="Heads for more tasks on a finished run's student.", no_args_is_help=True
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value: path.to.key=value."),
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Default: the user's cache folder.")
]


@recipes_app.command("list")
def recipes_list() -> None:
    """List the shipped recipes."""
    from understudy.recipes.files import shipped_recipes

    for name, text in shipped_recipes().items():
        print(f"{name:16}{text.splitlines()[0].removeprefix('# ')}")


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """Print a shipped recipe."""
    from understudy.recipes.files import shipped_recipe

    print(shipped_recipe(name), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: str, target: Annotated[Path, typer.Argument(help="A file or folder.")] = Path()
) -> None:
    """Copy a shipped recipe, to change it."""
    from understudy.recipes.files import copy_recipe

    print(copy_recipe(name, target))


@heads_app.command("add")
def heads_add(
    run: RunArgument,
    task: Annotated[str, typer.Option("--task", help="Name of the task.")],
    label_column: Annotated[
        str, typer.Option("--label-column", help="Column of the data with the task's labels.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of the head: teacher=true, hidden=[64]."),
    ] = None,
) -> None:
    """Train a head for one more task; the student and its trunk stay as they are."""
    from understudy import stages
    from understudy.recipes.head_report import heads_table

    stages.add_head(run, task=task, label_column=label_column, changes=changes or ())
    print(heads_table(Path(run)))


@heads_app.command("list")
def heads_list(run: RunArgument) -> None:
    """Show the heads of a run: size, accuracy, and what needs no head."""
    from understudy.recipes.head_report import heads_table
    from understudy.recipes.job import existing_run

    print(heads_table(existing_run(run)))


@heads_app.command("remove")
def heads_remove(
    run: RunArgument, task: Annotated[str, typer.Option("--task", help="Name of the task.")]
) -> None:
    """Remove a task's head from a run."""
    from understudy import stages

    stages.remove_head(run, task=task)


@teachers_app.command("rank")
def teachers_rank(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe with candidates, or an earlier ranking."),
    ],
    changes: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: runs/NAME-teachers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ranking as JSON.")] = False,
) -> None:
    """Profile and probe candidate teachers: which one makes the best student, and why."""
    from understudy import stages

    ranking = stages.rank_teachers(recipe, changes=changes or (), out=out)
    if as_json:
        print(ranking.to_json(), end="")
        return
    from understudy.report.ranking_views import ranking_table, ranking_text

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(ranking_table(ranking))
    else:
        print(ranking_text(ranking), end="")


@store_app.command("list")
def store_list(store: StoreOption = None) -> None:
    """List what is stored: teacher, data, view, samples, size, complete or not."""
    from understudy.recipes.store import list_store

    print(list_store(store))


@store_app.command("verify")
def store_verify(
    run: Annotated[
        str | None,
        typer.Argument(help="A run folder: its entries are also recomputed in part."),
    ] = None,
    store: StoreOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged chunks; labelling makes them again.")
    ] = False,
) -> None:
    """Check every stored byte; with a run, recompute a random sample and compare."""
    from understudy.recipes.store import verify

    print(verify(store, run_folder=run, repair=repair))


@store_app.command("gc")
def store_gc(
    store: StoreOption = None,
    older_than_days: Annotated[
        float | None, typer.Option(help="Remove what was not used for this long.")
    ] = None,
    incomplete: Annotated[
        bool, typer.Option(help="Remove entries left unfinished for an hour.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
) -> None:
    """Remove stored outputs that are no longer wanted."""
    from understudy.recipes.store import remove

    print(remove(store, older_than_days=older_than_days, incomplete=incomplete, dry_run=dry_run))

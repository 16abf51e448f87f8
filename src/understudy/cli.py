"""The ``understudy`` command. Everything heavy is imported inside the commands: --help is quick."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from understudy import __version__
from understudy.errors import EXIT_BUDGET_MISSED, EXIT_FAILURE, EXIT_INTERRUPTED, UnderstudyError
from understudy.progress import setup_logging

if TYPE_CHECKING:
    from understudy.recipes.report import Outcome

app = typer.Typer(
    name="understudy",
    help="Teacher-student distillation: a trained teacher, data and a budget in; "
    "a proven small student out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="Recipes that are shipped with the package.", no_args_is_help=True)
teachers_app = typer.Typer(help="Teachers to choose from.", no_args_is_help=True)
store_app = typer.Typer(help="Stored teacher outputs.", no_args_is_help=True)
heads_app = typer.Typer(
    help="Heads for more tasks on a finished run's student.", no_args_is_help=True
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(heads_app, name="heads")
app.add_typer(store_app, name="store")
app.add_typer(teachers_app, name="teachers")

RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, a run folder, or the name of a shipped recipe. Default: digits.",
    ),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value: path.to.key=value."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run folder. Default: runs/NAME.")
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Default: the user's cache folder.")
]


def main() -> None:
    """Run the command line: one clear message for what went wrong, and an exit code."""
    setup_logging()
    # Threads that wait by spinning take the cores from whatever else runs: two threads beside one
    # other job were three times slower that way. Read when torch is imported, so set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # What ends a job politely is an interruption like any other.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Typer turns its exits, and Ctrl-C, into the code that it returns.
        code = app(standalone_mode=False)
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except UnderstudyError as error:
        for line in error.problems:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        # Threads of libraries may be at work still; everything is on disk already.
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)
    except OSError as error:
        mend = "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend that"
        message = f"error: {error}. {mend} and run the same command again: what is done is kept."
        print(message, file=sys.stderr)
        sys.exit(EXIT_FAILURE)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            _usage_error(error)
        raise


def _usage_error(error: Any) -> None:
    """Show a wrong command line as Click does."""
    error.show()
    sys.exit(error.exit_code)


def _version(value: bool) -> None:
    if value:
        print(f"understudy {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Teacher-student distillation under a budget."""


def _show(outcome: Outcome) -> None:
    """Print the result table and the report's path; exit 3 where the budget is missed."""
    from rich.console import Console

    from understudy.report.summary import summary_table, summary_text

    if sys.stdout.isatty():
        Console().print(summary_table(outcome.results))
    else:
        print(summary_text(outcome.results))
    print(f"report: {outcome.page}")
    if outcome.budget_missed:
        raise typer.Exit(EXIT_BUDGET_MISSED)


@app.command()
def distill(
    recipe: RecipeArgument = None, changes: SetOption = None, out: OutOption = None
) -> None:
    """Run the whole job: teacher, stored outputs, student, control, proof, report."""
    from understudy import stages

    _show(stages.distill(recipe, changes=changes or (), out=out))


@app.command()
def resume(run: RunArgument) -> None:
    """Continue a run that was killed or interrupted, to the same result."""
    from understudy import stages

    _show(stages.distill(stages.existing_run(run)))


@app.command()
def teach(recipe: RecipeArgument = None, changes: SetOption = None, out: OutOption = None) -> None:
    """Split the data; load or train the teacher; check it on the validation split."""
    from understudy import stages

    stages.teach(recipe, changes=changes or (), out=out)


@app.command()
def label(recipe: RunArgument, changes: SetOption = None, out: OutOption = None) -> None:
    """Compute and store the teacher's outputs for every view of the training split."""
    from understudy import stages

    stages.label(recipe, changes=changes or (), out=out)


@app.command()
def train(recipe: RunArgument, changes: SetOption = None, out: OutOption = None) -> None:
    """Train student and control from the stored outputs."""
    from understudy import stages

    stages.train(recipe, changes=changes or (), out=out)


@app.command()
def evaluate(recipe: RunArgument, changes: SetOption = None, out: OutOption = None) -> None:
    """Evaluate teacher, student and control on validation and test."""
    from understudy import stages

    stages.evaluate(recipe, changes=changes or (), out=out)


@app.command()
def export(recipe: RunArgument, changes: SetOption = None, out: OutOption = None) -> None:
    """Export the student as ONNX, check that it computes the same, and measure it."""
    from understudy import stages

    stages.export(recipe, changes=changes or (), out=out)


@app.command()
def exits(recipe: RunArgument, changes: SetOption = None, out: OutOption = None) -> None:
    """Choose where pictures leave the student early, for another target with --set."""
    from understudy import stages
    from understudy.recipes.exit_report import exits_table

    print(exits_table(stages.exits(recipe, changes=changes or (), out=out)))


@app.command()
def report(recipe: RunArgument, changes: SetOption = None, out: OutOption = None) -> None:
    """Write the report from the records of a run."""
    from understudy import stages

    _show(stages.report(recipe, changes=changes or (), out=out))


@app.command()
def doctor() -> None:
    """Show the machine, the versions, and which extras are there."""
    from understudy.recipes.doctor import describe

    print(describe())


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
    from understudy import stages
    from understudy.recipes.head_report import heads_table

    print(heads_table(stages.existing_run(run)))


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
    incomplete: Annotated[bool, typer.Option(help="Remove unfinished entries.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
) -> None:
    """Remove stored outputs that are no longer wanted."""
    from understudy.recipes.store import remove

    print(remove(store, older_than_days=older_than_days, incomplete=incomplete, dry_run=dry_run))

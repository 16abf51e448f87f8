"""The ``understudy`` command. Everything heavy is imported inside the commands: --help is quick."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from understudy import __version__
from understudy.cli_groups import (
    RunArgument,
    SetOption,
    heads_app,
    recipes_app,
    store_app,
    teachers_app,
)
from understudy.cli_lab import lab_app
from understudy.cli_search import design, search
from understudy.errors import (
    EXIT_BAD_INPUT,
    EXIT_BUDGET_MISSED,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    InputError,
    MissingExtraError,
    UnderstudyError,
    shown_problem,
)
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
app.add_typer(recipes_app, name="recipes")
app.add_typer(heads_app, name="heads")
app.add_typer(lab_app, name="lab")
app.add_typer(store_app, name="store")
app.add_typer(teachers_app, name="teachers")
app.command()(search)
app.command()(design)

RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, a run folder, or the name of a shipped recipe. Default: digits.",
    ),
]
# Imported by every command but help and predict; an installation may be without them.
TRAIN_MODULES = (
    "torch",
    "lightning_fabric",
    "datasets",
    "kornia",
    "zarr",
    "onnx",
    "onnxscript",
    "safetensors",
    "scipy",
    "sklearn",
    "plotly",
    "jinja2",
    "markupsafe",
    "tensorboard",
    "psutil",
)
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Run folder. Default: runs/NAME.")
]


def main() -> None:
    """Run the command line: one clear message for what went wrong, and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Names of classes and files hold what not every terminal's encoding has.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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
            print(f"error: {shown_problem(line)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        # Threads of libraries may be at work still; everything is on disk already.
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in TRAIN_MODULES:
            raise
        for line in MissingExtraError(error.name, "train").problems:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
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
    """Print the outcome; exit 3 where the budget is missed."""
    _print(outcome)
    if outcome.budget_missed:
        raise typer.Exit(EXIT_BUDGET_MISSED)


def _print(outcome: Outcome) -> None:
    """Print the result table and the report's path."""
    from rich.console import Console

    from understudy.report.compression_views import compression_text
    from understudy.report.summary import summary_table, summary_text

    if sys.stdout.isatty():
        Console().print(summary_table(outcome.results))
    else:
        print(summary_text(outcome.results))
    if text := compression_text(outcome.results):
        print(f"\n{text}\n")
    print(f"report: {outcome.page}")


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
    from understudy.recipes.job import existing_run

    _show(stages.distill(existing_run(run)))


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
def compress(
    recipe: RecipeArgument = None,
    steps_of: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="Of a run: compress it by the steps of this recipe; it is not trained again.",
        ),
    ] = None,
    changes: SetOption = None,
    out: OutOption = None,
) -> None:
    """Make the student smaller: prune and quantise, each step behind its gates."""
    from understudy import stages

    _show(stages.compress(recipe, steps_of=steps_of, changes=changes or (), out=out))


@app.command()
def release(
    recipe: RecipeArgument = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="TARGET[/PRECISION]", help="As onnx/int8; repeatable."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="A device profile's limits.")
    ] = None,
    package: Annotated[
        Path | None,
        typer.Option("--package", metavar="PATH", help="Folder or .zip. Default: RUN/release."),
    ] = None,
    skip_failed: Annotated[
        bool, typer.Option("--skip-failed", help="Pack without the targets that failed.")
    ] = False,
    changes: SetOption = None,
    out: OutOption = None,
) -> None:
    """Compress, export to every target, prove, measure, check the budget, and pack."""
    from understudy import stages
    from understudy.recipes.release_settings import release_changes

    asked = [*(changes or ()), *release_changes(targets, device)]
    released = stages.release(
        recipe, changes=asked, out=out, package=package, skip_failed=skip_failed
    )
    _print(released.outcome)
    if released.package is not None:
        print(f"package: {released.package}")
        return
    if released.failed and not (skip_failed and released.budget_missed):
        lines = [f"{name} was not made: {reason}" for name, reason in released.failed.items()]
        raise InputError(
            *lines,
            "nothing is packed. What was made is kept: run the same command again when that is "
            "mended, leave these targets out, or pack without them (--skip-failed)",
        )
    raise typer.Exit(EXIT_BUDGET_MISSED)


@app.command()
def predict(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A released folder or .zip.")],
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="PNG, JPEG ...")],
    top: Annotated[int, typer.Option("--top", help="So many classes a picture.")] = 3,
    artifact: Annotated[
        str | None, typer.Option("--artifact", metavar="NAME", help="As onnx-int8.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify pictures with a released package; needs its runtime and no torch."""
    from understudy.package.predict import predict_command

    print(predict_command(package, pictures, top=top, artifact=artifact, as_json=as_json))


@app.command()
def profile(
    what: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT|MODEL",
            help="A file or its folder; a network: RUN, RUN/teacher, RECIPE.yaml, or a name, as "
            "resnet20, module:callable, timm:NAME, transformers:NAME.",
        ),
    ],
    against: Annotated[
        str | None, typer.Option("--against", metavar="OTHER", help="Measured in turns with it.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="NAME")] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="USER@DEVICE", help="Measured there, by ssh.")
    ] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="Repeatable.")] = None,
    threads: Annotated[list[str] | None, typer.Option("--threads", help="Or `all`.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape", metavar="C,H,W", help="Of a named network, or where a file does not say."
        ),
    ] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", help="Of a named network. Default: 10.")
    ] = None,
    ssh_options: Annotated[
        list[str] | None, typer.Option("--ssh-option", metavar="KEY=VALUE", help="Repeatable.")
    ] = None,
    python: Annotated[str, typer.Option("--python", help="Of the device.")] = "python3",
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime", metavar="TARGET", help="As tflm. Default: of the record, else the suffix."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time, memory, size and energy of an artifact, or the operators of a network."""
    from understudy.evaluate.profile import profile_command
    from understudy.recipes.run_network import run_network

    print(
        profile_command(
            what,
            against=against,
            device=device,
            host=host,
            batches=batches,
            threads=threads,
            as_json=as_json,
            shape=shape,
            classes=classes,
            ssh_options=ssh_options or (),
            python=python,
            runtime=runtime,
            find_network=run_network,
        )
    )


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

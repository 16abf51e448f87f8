"""The command's lab: published experiments run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from understudy.errors import InputError, problem

lab_app = typer.Typer(help="Published experiments, run again.", no_args_is_help=True)
IMAGENET_PIXELS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@lab_app.callback()
def lab() -> None:
    """Published experiments, run again."""


@lab_app.command()
def paper(
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help="CIFAR-10: a folder or hub name.")
    ] = "cifar10",
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="ITEM", help="parameters, operators, dropout, accuracy, "
                     "online, pretrained, alpha, temperature; repeatable. Default: all; pretrained "
                     "only with --teacher or --vit."),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="More of them go on later.")] = 100,
    grid_epochs: Annotated[
        int | None, typer.Option("--grid-epochs", help="Of the grids. Default: as --epochs.")
    ] = None,
    layers: Annotated[
        list[int] | None, typer.Option("--layers", help="Of the teachers of Table 6: 4, 6, 8.")
    ] = None,
    rates: Annotated[
        list[float] | None, typer.Option("--rates", help="Of dropout. Default: 0 0.1 0.2 0.3 0.5.")
    ] = None,
    dropout: Annotated[
        float, typer.Option("--dropout", help="The paper states none. Each has its own Table 6.")
    ] = 0.5,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="NAME=FILE", help="Pretrained, as resnet56=FILE."),
    ] = None,
    vit: Annotated[
        str | None, typer.Option("--vit", metavar="NAME_OR_FOLDER", help="A transformer instead.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", help="Default: all.")] = None,
    accelerator: Annotated[
        str, typer.Option("--accelerator", help="Of the trainings: cpu, cuda or auto.")
    ] = "cpu",
    out: Annotated[Path, typer.Option("--out", metavar="DIR")] = Path("runs/lab-paper"),
) -> None:  # fmt: skip
    """Lin and Shen 2024, "Efficient Knowledge Distillation": tables and figures beside ours."""
    check_epochs(epochs, grid_epochs, dropout)
    section = teacher_section(teacher, vit)
    from understudy.lab.paper import ITEMS, Lab
    from understudy.lab.paper_recipes import DROPOUT_RATES, TEACHER_LAYERS, Setting
    from understudy.lab.paper_records import run_items
    from understudy.lab.paper_views import paper_document
    from understudy.report.document import document_markdown, write_document

    setting = Setting(data, epochs, dropout, seed, threads, accelerator)
    asked = Lab(
        setting,
        out,
        teacher=section,
        grid_epochs=grid_epochs or epochs,
        layers=tuple(layers or TEACHER_LAYERS),
        rates=tuple(rates or DROPOUT_RATES),
    )
    names = only or [name for name in ITEMS if name != "pretrained" or section is not None]
    document = paper_document(run_items(asked, names))
    page = write_document(document, out, "paper")
    print(document_markdown(document))
    print(f"report: {page}")


def check_epochs(epochs: int, grid_epochs: int | None, dropout: float) -> None:
    """Raise InputError unless the trainings can be made."""
    if epochs < 1 or (grid_epochs is not None and grid_epochs < 1) or not 0 <= dropout < 1:
        raise InputError(
            problem(
                f"--epochs {epochs} --grid-epochs {grid_epochs} --dropout {dropout}",
                expected="at least 1 epoch, and a dropout rate from 0 to below 1",
                mend="Correct them.",
            )
        )
    if grid_epochs is not None and grid_epochs > epochs:
        raise InputError(
            problem(
                f"--grid-epochs {grid_epochs} with --epochs {epochs}",
                expected="grids of at most as many epochs: the student alone is one of them",
                mend="Raise --epochs, or lower --grid-epochs.",
            )
        )


def teacher_section(teacher: str | None, vit: str | None) -> dict[str, Any] | None:
    """Return the pretrained teacher as a recipe writes it; None where none is named."""
    if vit is not None:
        return {"model": {"name": f"transformers:{vit}"}}
    if teacher is None:
        return None
    name, equals, path = teacher.partition("=")
    if not equals or not name or not path:
        raise InputError(
            problem(
                f"--teacher {teacher}",
                expected="NAME=FILE",
                mend="For example --teacher resnet56=resnet56.th.",
            )
        )
    model = {"name": name, "normalization": IMAGENET_PIXELS}
    return {"model": model, "checkpoint": path}
